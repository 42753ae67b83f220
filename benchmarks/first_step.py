"""Why the first step after a synchronisation is slow on a GPU: `python benchmarks/first_step.py`.

A CUDA graph of matrix multiplications stands for the training step, and 8 MiB that the host needs
0.3 ms for (a kept run waits 0.2 to 0.4 ms) for its batch. The device is synchronised before the
first timed step, as logs of schema 1 were made, or before the last warm-up step, as the loop does.
"""

from statistics import median
from time import sleep

import torch
from tabulate import tabulate

from xdimo.train.instruments.step_timer import Clock, StepMeter

WARMUP, TIMED = 50, 200
LENGTHS = (150, 300, 600)  # products in a step
BATCH_S = 0.0003


def main() -> None:
    device = torch.device("cuda", 0)
    rows = [
        [products, name, *ratios(device, products, before)]
        for products in LENGTHS
        for name, before in (("first timed", WARMUP + 1), ("last warm-up", WARMUP))
    ]
    columns = [
        "products",
        "synchronised before the",
        "median ms",
        "last warm-up",
        "timed 1",
        "2",
        "3",
    ]
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; steps over the median")
    print(tabulate(rows, columns, floatfmt=".3f"))


def ratios(device: torch.device, products: int, before: int) -> list[float]:
    """Median step in ms; the last warm-up step and the first three timed ones over it."""
    square = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16) / 100
    on_host = torch.empty(8 << 20, dtype=torch.uint8).pin_memory()
    on_device = on_host.to(device)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = square
        for _ in range(products):
            out = torch.relu(out @ square)
        return out.float().mean(), out.float().std()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    clock = Clock(device)
    timer = StepMeter(clock)
    for number in range(1, WARMUP + TIMED + 1):
        if number in (1, before):
            clock.together()
            timer.start()
        sleep(BATCH_S)
        on_device.copy_(on_host, non_blocking=True)
        graph.replay()
        timer.step({}, *results)
    seconds = [fields["step_s"] for fields in timer.finished(wait=True)]
    usual = median(seconds[WARMUP:])
    return [1e3 * usual, *(value / usual for value in seconds[WARMUP - 1 : WARMUP + 3])]


if __name__ == "__main__":
    main()
