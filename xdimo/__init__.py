"""XDiMo: how fast, and how well used, is each GPU type when it trains a video diffusion model?

config, load   what is to be measured: every key, typed; read and checked once
spec           the self-contained description of one run
data           videos -> manifest -> latents -> clips
model          Latte with experts, its diffusion loss, its FLOPs
train          launch (parent of the process group), the loop, checkpoints, the record
measure        records -> metrics
report         metrics -> tables and plots
"""

__version__ = "0.1.0"
