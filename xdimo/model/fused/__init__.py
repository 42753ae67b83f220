"""The same network with fused kernels (Triton): one step without the host waiting for the device.

network    the forward pass over Latte's own parameters
storage    all weights in one buffer, and linear layers on it; optimizer: AdamW and the average
adaln      residual, LayerNorm and modulation in one pass; its kernels: adaln_kernels
routing    experts of each token, and rows sorted by expert
experts    the mixture of experts as grouped matrix products; its kernels: expert_kernels
spatial    attention over the positions of a frame, read where they lie
temporal   attention over the frames of a position, the same
"""
