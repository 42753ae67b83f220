"""XDiMo: how fast, and how well used, is each GPU type when it trains a video diffusion transformer?

config, spec   what is to be measured, typed; the self-contained description of one run
data           videos -> manifest -> latents -> clips
model          Latte with experts, its diffusion loss, its FLOPs
train          launch (parent of the process group), the loop, checkpoints, the record
measure        records -> metrics
report         metrics -> tables and plots
"""

__version__ = "0.1.0"
