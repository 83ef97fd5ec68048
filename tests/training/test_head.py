"""The head's written-out gradient against the one that autograd makes of the plain formula."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from asyncrl.training.head import Head

NUM, HIDDEN, VOCABULARY = 11, 6, 17


def inputs(scale=3.0):
    torch.manual_seed(0)
    hidden = (scale * torch.randn(NUM, HIDDEN)).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (NUM,)), weight


def plain(hidden, targets, weight, temperature):
    """The formula in float64, for autograd."""
    logprobs = nn.functional.linear(hidden.double(), weight.double()).div(temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def gradients(function, hidden, targets, weight, *, of_entropy):
    logprobs, entropies = function(hidden, targets, weight)
    slopes = torch.linspace(-1, 2, NUM)
    value = (slopes * logprobs).sum()
    if of_entropy:
        value = value + (slopes.flip(0) * entropies).sum()
    return logprobs, entropies, *torch.autograd.grad(value, (hidden, weight))


def make(**changed):
    return Head(**{"temperature": 0.7, "chunk": 99, "bfloat16": False, "entropy": True, "compiled": False} | changed)


@pytest.mark.parametrize("of_entropy", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, NUM, 99])
def test_values_and_gradients_are_those_of_the_formula(chunk, temperature, of_entropy):
    head = make(chunk=chunk, temperature=temperature, entropy=of_entropy)
    found = gradients(head, *inputs(), of_entropy=of_entropy)
    expected = gradients(lambda *given: plain(*given, temperature), *inputs(), of_entropy=of_entropy)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other.float(), rtol=1e-4, atol=1e-5)


def test_it_is_compiled_once_whatever_is_left_for_the_last_chunk(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    head, expected = make(chunk=5, compiled=True), gradients(make(), *inputs(), of_entropy=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for head.chunk in (5, 4, 3, 99):  # the last chunks of 11 have 1, 3, 2 and 11 rows
            found = gradients(head, *inputs(), of_entropy=True)
            assert all(
                torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(found, expected, strict=True)
            )


def test_entropy_has_no_gradient_unless_it_is_asked_for():
    assert not make(entropy=False)(*inputs())[1].requires_grad
    assert make(entropy=True)(*inputs())[1].requires_grad


def test_a_frozen_weight_gets_no_gradient():
    hidden, targets, weight = inputs()
    logprobs, _ = make()(hidden, targets, weight.detach())
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("chunk", [4, 99])
def test_bfloat16_products_stay_within_their_rounding(chunk):
    found = gradients(make(bfloat16=True, chunk=chunk), *inputs(), of_entropy=True)
    expected = gradients(make(), *inputs(), of_entropy=True)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).norm() / other.norm() < 0.02


def test_the_slope_of_a_nearly_certain_token_survives_bfloat16():
    """As a difference of rounded numbers it would be lost: 1 - p is 3e-4 here, and bfloat16 steps by 4e-3 below 1."""
    hidden, weight = torch.tensor([[8.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    logprobs, _ = make(bfloat16=True, temperature=1.0)(hidden, torch.tensor([0]), weight)
    logprobs.sum().backward()
    assert hidden.grad.item() == pytest.approx(1 - torch.tensor(8.0).sigmoid().item(), rel=0.01)


def test_no_token_at_all():
    hidden, _, weight = inputs()
    logprobs, entropies = make()(hidden[:0], torch.zeros(0, dtype=torch.int64), weight)
    (logprobs.sum() + entropies.sum()).backward()
    assert len(logprobs) == len(entropies) == 0
    assert not weight.grad.any()
