"""The same network with fused kernels (Triton): one step without the host waiting for the device.

latte      the forward pass over Latte's own parameters
experts    the mixture of experts as grouped matrix products; its kernels: expert_kernels
temporal   attention over the frames of a position, read where they lie
"""
