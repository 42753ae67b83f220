"""The reference mixture of experts against a loop over tokens in float64."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xdimo.model.latte import mlp
from xdimo.model.moe import mixture, route

WIDTH = 8


@st.composite
def logits(draw):
    """[T, E] of few distinct values, so that ties are common and some experts get no token."""
    tokens, experts = draw(st.integers(1, 12)), draw(st.integers(2, 6))
    row = st.lists(st.integers(-1, 2), min_size=experts, max_size=experts)
    return torch.tensor(draw(st.lists(row, min_size=tokens, max_size=tokens))).double()


def chosen_by(row, k):
    """The k highest logits of one token; of equal ones the lowest index."""
    return sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:k]


def brute_force(x_TD, logits_TE, experts, k):
    rows = []
    for x_D, logits_E in zip(x_TD, logits_TE, strict=True):
        chosen = chosen_by(logits_E.tolist(), k)
        total = sum(torch.exp(logits_E[e]) for e in chosen)
        rows.append(sum(torch.exp(logits_E[e]) / total * experts[e](x_D) for e in chosen))
    return torch.stack(rows)


@given(logits(), st.data())
def test_ties_go_to_the_lowest_expert(logits_TE, data):
    k = data.draw(st.integers(1, logits_TE.shape[1]))
    weights_TK, experts_TK = route(logits_TE, k)
    assert experts_TK.tolist() == [chosen_by(row, k) for row in logits_TE.tolist()]
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(len(logits_TE)).double())


def test_ties_in_bf16_go_to_the_lowest_expert_in_every_row():
    logits_TE = torch.tensor([[1.0, 1.001, 0.0, 1.0]], dtype=torch.bfloat16).repeat(5000, 1)
    _, experts_TK = route(logits_TE, 2)
    assert torch.equal(experts_TK, torch.tensor([[0, 1]]).repeat(5000, 1))


@settings(deadline=None, max_examples=40)
@given(logits(), st.data(), st.integers(0, 1000))
def test_it_equals_a_loop_over_tokens_with_its_gradients(logits_TE, data, seed):
    torch.manual_seed(seed)
    tokens, count = logits_TE.shape
    k = data.draw(st.integers(1, count))
    experts = nn.ModuleList(mlp(WIDTH) for _ in range(count)).double()
    x_TD = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    logits_TE.requires_grad_()
    sources = [x_TD, logits_TE, *experts.parameters()]
    weight = torch.randn(tokens, WIDTH, dtype=torch.float64)

    got = mixture(x_TD, lambda _: logits_TE, experts, k)
    expected = brute_force(x_TD, logits_TE, experts, k)
    torch.testing.assert_close(got, expected)

    # Without materialize_grads: an expert with no token must have a gradient all the same.
    got_grads = torch.autograd.grad((got * weight).sum(), sources)
    expected_grads = torch.autograd.grad((expected * weight).sum(), sources, materialize_grads=True)
    torch.testing.assert_close(got_grads, expected_grads)


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    experts = nn.ModuleList(mlp(WIDTH) for _ in range(3))
    gate = nn.Linear(WIDTH, 3, bias=False)
    nn.init.zeros_(gate.weight)  # all logits tie, so expert 2 is never chosen
    mixture(torch.randn(5, WIDTH), gate, experts, 2).sum().backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in experts[2].parameters())
    assert all(torch.count_nonzero(p.grad) > 0 for p in experts[1].parameters())


def test_weights_are_a_softmax_over_the_chosen_alone():
    weights_TK, experts_TK = route(torch.tensor([[0.0, 2.0, 1.0, 5.0]]), 2)
    assert experts_TK.tolist() == [[3, 1]]
    high = 1 / (1 + math.exp(-3))
    torch.testing.assert_close(weights_TK, torch.tensor([[high, 1 - high]]))


def test_an_expert_is_an_mlp_of_ratio_4_with_tanh_gelu():
    expert = mlp(WIDTH).double()
    x = torch.randn(50, WIDTH, dtype=torch.float64) * 4
    hidden = x @ expert.fc1.weight.T + expert.fc1.bias
    assert hidden.shape == (50, 4 * WIDTH)
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(expert(x), gelu @ expert.fc2.weight.T + expert.fc2.bias)
