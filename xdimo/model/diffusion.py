"""Gaussian diffusion: the noising process and the training loss. Sampling is not part of this.

1,000 steps with linear betas. The network predicts the noise, and where the variance lies between
the two analytic bounds (log-linear interpolation; Nichol and Dhariwal, arXiv 2102.09672). The loss
is the sum of the noise's mean squared error and the variational term, in bits a dimension, with
the mean detached, so that the term trains the variance alone. The variational term has **factor
1**: DiT and Latte train with loss type MSE; the factor steps/1000 of RESCALED_MSE is not in use
there (and would be 1 at 1,000 steps).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

BETA_FIRST, BETA_LAST = 1e-4, 0.02
BIN = 1 / 255  # half the width of one of 256 grey levels over [-1, 1]


class Diffusion(nn.Module):
    """The process with ``steps`` steps. Tables [steps] are computed in float64, kept in float32.

    ``compiled``: noising and loss through torch.compile.

    x0, noise [b, ...] are float32 of any shape; t [b] are steps 0 .. steps - 1, int64.
    """

    signal: Tensor  # x_t = signal x_0 + noise_level noise
    noise_level: Tensor
    mean_per_noise: Tensor  # change of the mean of p(x_{t-1} | x_t) for a change of the noise
    log_variance_low: Tensor  # of q(x_{t-1} | x_t, x_0), the true posterior
    log_variance_high: Tensor  # log beta

    def __init__(self, steps: int = 1000, compiled: bool = False):
        super().__init__()
        self.steps = steps
        beta = torch.linspace(BETA_FIRST, BETA_LAST, steps, dtype=torch.float64)
        kept = torch.cumprod(1 - beta, dim=0)  # alpha bar
        kept_before = torch.cat([kept.new_ones(1), kept[:-1]])
        posterior = beta * (1 - kept_before) / (1 - kept)
        # The first is 0, for x_0 is known exactly at step 0: its logarithm takes the next one's.
        posterior[0] = posterior[1]
        tables = {
            "signal": kept.sqrt(),
            "noise_level": (1 - kept).sqrt(),
            "mean_per_noise": beta / ((1 - kept).sqrt() * (1 - beta).sqrt()),
            "log_variance_low": posterior.log(),
            "log_variance_high": beta.log(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        self._noised, self._terms = self.q_sample, self.terms
        if compiled:
            self._noised = torch.compile(self.q_sample, dynamic=False)
            self._terms = torch.compile(self.terms, dynamic=False)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 noised to step t: a draw of q(x_t | x_0) where noise is standard normal."""
        return at(self.signal, t, x0) * x0 + at(self.noise_level, t, x0) * noise

    def loss(
        self, model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """``loss`` = ``mse`` + ``vb``, scalars, means over the batch.

        ``model(x_t, t)``: [b, f, c, h, w] -> [b, f, 2c, h, w]. Steps, then noise are drawn from
        ``generator``, which lives on x0's device. Computed in x0's precision whatever the model's.
        """
        t = torch.randint(self.steps, (len(x0),), generator=generator, device=x0.device)
        noise = torch.empty_like(x0).normal_(generator=generator)
        return self._terms(model(self._noised(x0, t, noise), t), x0, t, noise)

    def terms(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The same of what the model made of step t."""
        output = output.to(x0.dtype)
        predicted, fraction = output.chunk(2, dim=2)
        mse = (predicted - noise).square().mean()
        vb = self.variational_bits(x0, t, noise, predicted.detach(), fraction).mean()
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def variational_bits(
        self, x0: Tensor, t: Tensor, noise: Tensor, predicted: Tensor, fraction: Tensor
    ) -> Tensor:
        """The bound's term of step t, bits a dimension, [b].

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at step 0 -log p(x_0 | x_1).
        ``fraction``: -1 = the lower bound of the variance, 1 = the upper; it may pass them.
        """
        low, high = at(self.log_variance_low, t, x0), at(self.log_variance_high, t, x0)
        log_variance = low + (fraction + 1) / 2 * (high - low)
        # Both means are linear in x_t and the noise, so their difference has this form; it spares
        # the cancellation of going through a prediction of x_0. At step 0 the true mean is x_0.
        difference = at(self.mean_per_noise, t, x0) * (predicted - noise)
        kl = gaussian_kl(difference, low, log_variance)
        decoder = -log_probability_of_bin(x0, difference, log_variance)
        nats = torch.where(t == 0, decoder.flatten(1).mean(1), kl.flatten(1).mean(1))
        return nats / math.log(2)


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t] as [b, 1, ...], to multiply ``like`` [b, ...] with."""
    return table[t].view(-1, *[1] * (like.dim() - 1))


def gaussian_kl(difference: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) of scalar Gaussians whose means are ``difference`` apart, nats."""
    ratio = log_variance_q - log_variance_p
    return 0.5 * (ratio.exp() - 1 - ratio + difference.square() * torch.exp(-log_variance_p))


def log_probability_of_bin(x: Tensor, centred: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability, nats, of the bin x +- BIN under a Gaussian; ``centred`` is x - its mean.

    Beyond +-0.999 the bin is open, as for the darkest and brightest pixel. That means little for
    latents, but the public recipe does so, and with its approximate normal distribution, and keeps
    the logarithm finite at 1e-12: losses stay comparable.
    """
    scale = torch.exp(-0.5 * log_variance)
    below = normal_cdf(scale * (centred + BIN))
    above = normal_cdf(scale * (centred - BIN))
    inside = torch.where(x > 0.999, 1 - above, below - above)
    return torch.where(x < -0.999, below, inside).clamp(min=1e-12).log()


def normal_cdf(z: Tensor) -> Tensor:
    """The tanh approximation that GELU has too; within 3e-4 of the normal distribution."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
