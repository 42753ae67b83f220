"""The diffusion loss against its textbook form in numpy, float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from xdimo.model.diffusion import Diffusion, gaussian_kl, normal_cdf

SHAPE = (5, 3, 4, 2, 2)  # b f c h w
BETA = np.linspace(1e-4, 0.02, 1000)
KEPT = np.cumprod(1 - BETA)
KEPT_BEFORE = np.append(1.0, KEPT[:-1])


def textbook_bits(x0, t, noise, predicted, fraction, cdf):
    """One clip's variational term by way of x_t, a prediction of x_0 and the posterior means."""
    x_t = np.sqrt(KEPT[t]) * x0 + np.sqrt(1 - KEPT[t]) * noise
    x0_predicted = (x_t - np.sqrt(1 - KEPT[t]) * predicted) / np.sqrt(KEPT[t])

    def mean(start):
        return (
            BETA[t] * np.sqrt(KEPT_BEFORE[t]) * start
            + (1 - KEPT_BEFORE[t]) * np.sqrt(1 - BETA[t]) * x_t
        ) / (1 - KEPT[t])

    s = max(t, 1)
    low = np.log(BETA[s] * (1 - KEPT_BEFORE[s]) / (1 - KEPT[s]))
    share = (fraction + 1) / 2
    log_variance = share * np.log(BETA[t]) + (1 - share) * low
    sigma, model_mean = np.exp(log_variance / 2), mean(x0_predicted)
    if t > 0:
        sigma_q = np.exp(low / 2)
        nats = (
            np.log(sigma / sigma_q)
            + (sigma_q**2 + (mean(x0) - model_mean) ** 2) / (2 * sigma**2)
            - 0.5
        )
    else:
        below, above = (cdf((x0 + edge - model_mean) / sigma) for edge in (1 / 255, -1 / 255))
        probability = np.where(x0 < -0.999, below, np.where(x0 > 0.999, 1 - above, below - above))
        nats = -np.log(np.maximum(probability, 1e-12))
    return np.mean(nats) / np.log(2)


def tanh_cdf(z):
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, *SHAPE, generator=generator)
    predicted = noise + 0.3 * torch.randn(SHAPE, generator=generator)
    fraction = torch.rand(SHAPE, generator=generator) * 2.4 - 1.2
    return x0, noise, predicted, fraction


@pytest.mark.parametrize("seed", range(3))
def test_variational_term_is_the_textbook_one(seed):
    x0, noise, predicted, fraction = draws(seed)
    t = torch.tensor([0, 1, 2, 500, 999])
    got = Diffusion().variational_bits(x0, t, noise, predicted, fraction)
    arrays = [tensor.double().numpy() for tensor in (x0, noise, predicted, fraction)]
    for i, step in enumerate(t.tolist()):
        start, *rest = (array[i] for array in arrays)
        expected = textbook_bits(start, step, *rest, tanh_cdf)
        assert got[i].item() == pytest.approx(expected, rel=2e-4, abs=1e-6), step
    start, *rest = (array[0] for array in arrays)
    # The recipe's approximate normal distribution costs little.
    assert got[0].item() == pytest.approx(textbook_bits(start, 0, *rest, norm.cdf), rel=0.02)


def test_normal_cdf_is_within_3e_4():
    z = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    error = np.abs(normal_cdf(z).numpy() - norm.cdf(z.numpy())).max()
    assert error < 3e-4


@given(*[st.floats(-5, 5)] * 3)
def test_kl_is_never_negative_and_zero_for_equals(difference, log_q, log_p):
    difference, log_q, log_p = torch.tensor([difference, log_q, log_p], dtype=torch.float64)
    assert gaussian_kl(difference, log_q, log_p) >= -1e-15
    assert gaussian_kl(torch.zeros(()).double(), log_q, log_q) == 0


def test_a_perfect_prediction_costs_no_bits_after_step_0():
    x0, noise, _, _ = draws()
    t = torch.tensor([1, 10, 100, 500, 999])
    bits = Diffusion().variational_bits(x0, t, noise, noise, torch.full(SHAPE, -1.0))
    assert torch.equal(bits, torch.zeros(5))


def test_q_sample_has_the_mean_and_variance_of_its_step():
    diffusion, generator = Diffusion(), torch.Generator().manual_seed(0)
    x0, noise = torch.full((3, 40_000), 2.0), torch.randn(3, 40_000, generator=generator)
    x_t = diffusion.q_sample(x0, torch.tensor([0, 300, 999]), noise)
    for row, step in zip(x_t, (0, 300, 999), strict=True):
        sigma = np.sqrt(1 - KEPT[step])
        assert row.mean().item() == pytest.approx(2 * np.sqrt(KEPT[step]), abs=5 * sigma / 200)
        assert row.std().item() == pytest.approx(sigma, rel=0.02)


class Recorder:
    """A model that answers two parameters, and keeps what it was asked."""

    def __init__(self):
        self.noise = torch.zeros(SHAPE, requires_grad=True)
        self.variance = torch.zeros(SHAPE, requires_grad=True)

    def __call__(self, x_t, t):
        self.x_t, self.t = x_t, t
        return torch.cat([self.noise, self.variance], dim=2)


def loss(seed, model):
    x0 = draws()[0]
    return Diffusion().loss(model, x0, torch.Generator().manual_seed(seed))


def test_loss_is_mse_plus_variational_term_with_the_mean_detached():
    model = Recorder()
    terms = loss(3, model)
    assert terms["loss"] == terms["mse"] + terms["vb"]
    terms["vb"].backward()
    assert not model.noise.grad.any() and model.variance.grad.abs().max() > 0

    model = Recorder()
    loss(3, model)["mse"].backward()
    assert model.noise.grad.abs().max() > 0 and not model.variance.grad.any()


def test_mse_is_that_of_the_noise_in_x_t():
    model = Recorder()
    terms = loss(3, model)
    kept = torch.tensor(KEPT)[model.t].view(-1, 1, 1, 1, 1)
    noise = (model.x_t - kept.sqrt() * draws()[0]) / (1 - kept).sqrt()
    assert terms["mse"].item() == pytest.approx(noise.square().mean().item(), rel=1e-4)


def test_the_generator_alone_decides_steps_and_noise():
    models = [Recorder() for _ in range(3)]
    torch.manual_seed(1)
    first = loss(5, models[0])
    torch.manual_seed(2)
    again, other = loss(5, models[1]), loss(6, models[2])
    assert torch.equal(models[0].x_t, models[1].x_t) and first["loss"] == again["loss"]
    assert not torch.equal(models[0].t, models[2].t) and first["loss"] != other["loss"]


def test_steps_are_uniform_over_all_of_them():
    x0, generator = torch.zeros(20_000, 1, 1, 1, 1), torch.Generator().manual_seed(0)
    seen = []

    def model(x_t, t):
        seen.append(t)
        return torch.zeros(len(t), 1, 2, 1, 1)

    Diffusion(10).loss(model, x0, generator)
    counts = torch.bincount(seen[0], minlength=10)
    assert len(counts) == 10 and (counts - 2000).abs().max() < 250  # 6 standard deviations


def test_the_loss_of_a_bf16_answer_is_computed_in_float32():
    x0, _, predicted, fraction = draws()
    answer = torch.cat([predicted, fraction], dim=2).bfloat16()
    rounded, exact = (
        Diffusion().loss(lambda x_t, t, a=a: a, x0, torch.Generator().manual_seed(0))
        for a in (answer, answer.float())
    )
    assert rounded == exact
    assert all(term.dtype == torch.float32 for term in rounded.values())
