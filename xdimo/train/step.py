"""One optimizer step, run as it stands or captured once and replayed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from xdimo.data import clips
from xdimo.model.diffusion import Diffusion
from xdimo.spec import RunSpec
from xdimo.train.checkpoint import State

# Steps run as they stand before one is captured: the first compiles and makes the optimizer's
# state, the second compares the ranks.
EAGER_STEPS = 3


class Step:
    """Loss and gradient norm of one step on one batch of the loader, both left on the device.

    ``wrapped``: the model, in what averages its gradients where there are several ranks. ``vae``:
    online mode's encoder.
    """

    def __init__(
        self,
        spec: RunSpec,
        state: State,
        wrapped: Callable[[Tensor, Tensor], Tensor],
        diffusion: Diffusion,
        vae: Any,
    ) -> None:
        self.spec, self.state, self.wrapped = spec, state, wrapped
        self.diffusion, self.vae = diffusion, vae
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]
        # Encloses each part of a step; a profiler gives them names.
        self.part: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
        self.kind = "eager"

    def __call__(self, batch: dict[str, Any], clips_norm: bool) -> tuple[Tensor, Tensor]:
        spec, state = self.spec, self.state
        with self.part("other" if self.vae is None else "vae"):
            latents = clips.to_latents(batch, self.vae, spec.vae.scaling_factor, state.generator)

        with self.part("forward"), autocast(spec):
            loss = self.diffusion.loss(self.wrapped, latents, state.generator)["loss"]

        with self.part("backward"):
            loss.backward()

        with self.part("optimizer"):
            limit, decay = spec.optimizer.clip_norm, spec.optimizer.ema_decay
            if hasattr(state.optimizer, "update"):  # the fused network's does all of it
                grad_norm = state.optimizer.update(limit if clips_norm else None, decay)
            else:
                grads = [p.grad for p in self.parameters if p.grad is not None]
                grad_norm = nn.utils.get_total_norm(grads)
                if clips_norm:
                    nn.utils.clip_grads_with_norm_(self.parameters, limit, grad_norm)
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)
                _average(state.ema, state.model, decay)
        return loss.detach(), grad_norm


class CapturedStep:
    """The same step as a CUDA graph: one launch instead of thousands.

    The first steps run as they stand. The step must not read the device from the host.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.taken = self.replays = 0
        self.stream = torch.cuda.Stream()
        self.buffers: dict[str, Tensor] = {}
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}
        self.kind = "eager"  # of the last step taken: eager, capture or replay

    def __call__(self, batch: dict[str, Any], clips_norm: bool) -> tuple[Tensor, Tensor]:
        self._take(batch)
        self.taken += 1
        if self.taken <= EAGER_STEPS:
            return self._on_side_stream(clips_norm)
        self.kind = "replay" if clips_norm in self.graphs else "capture"
        if clips_norm not in self.graphs:
            self.graphs[clips_norm] = self._capture(clips_norm)
        graph, results = self.graphs[clips_norm]
        graph.replay()
        self.replays += 1
        return results

    def uncaptured(self, batch: dict[str, Any], clips_norm: bool) -> tuple[Tensor, Tensor]:
        """The step as it stands, for a profiler. The graphs are gone after it: memory for one."""
        self.graphs.clear()
        torch.cuda.empty_cache()
        self._take(batch)
        return self._on_side_stream(clips_norm)

    def _take(self, batch: dict[str, Any]) -> None:
        """Copies a batch to where the step reads it."""
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        if not self.buffers:
            device = self.step.state.generator.device
            self.buffers = {key: value.to(device, copy=True) for key, value in tensors.items()}
        for key, value in tensors.items():
            self.buffers[key].copy_(value, non_blocking=True)

    def _on_side_stream(self, clips_norm: bool) -> tuple[Tensor, Tensor]:
        """A capture wants its warm-up steps on its own stream, nothing tied to the default one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.step(self.buffers, clips_norm)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _capture(self, clips_norm: bool) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.step.state.generator)
        # Other threads (pinning of batches, NCCL's watchdog) go on using the device meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            results = self.step(self.buffers, clips_norm)
        return graph, results


def autocast(spec: RunSpec) -> Any:
    if spec.precision == "bf16":
        return torch.autocast(spec.device, torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def _average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
