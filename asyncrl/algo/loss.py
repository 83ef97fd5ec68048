"""The policy loss: one formula for every preset, on flat columns of trained tokens.

    L = - sum_t n * stop_gradient[M * c * A + kappa] * logprob

Everything in the brackets is computed from detached log-probs by small functions, in the log domain where a ratio could
overflow, so a removed token never turns into inf or nan. Inputs that are not finite and not removed stay visible in the
loss; all of them are flagged in the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from asyncrl.algo import custom as own
from asyncrl.algo.advantage import estimate
from asyncrl.algo.loss_spec import Estimator, Loss, Outside, PolicyWeight
from asyncrl.utils.importing import line_of
from asyncrl.utils.quote import quote

_TINY = 1e-6
"""Probabilities are kept this far from 0 and 1 in the binary KL of the trust mask, whose logarithms would diverge."""

_GATE_CLOSED = 1e4
"""A soft gate is as good as closed there, and its logarithm is still finite."""


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Trained tokens of one micro-batch: flat tensors of length n on one device. Log-probs are natural logarithms.

    `logprobs` of the current policy is the only one with a gradient. `sequence` int64[n] is the index of the trajectory
    inside this micro-batch, 0..num_sequences-1; a trajectory never spans micro-batches. `lag` int64[n] is the learner's
    version minus the token's. `advantages` and `normalizers` are those of the trajectory, repeated for its tokens; a
    normalizer of 0 leaves it out of every term of the loss.
    RuntimeError if the columns differ in shape or the behavior log-probs or versions are missing.
    """

    logprobs: Tensor
    behavior_logprobs: Tensor
    proximal_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    advantages: Tensor
    normalizers: Tensor
    sequence: Tensor
    lag: Tensor
    num_sequences: int

    def __post_init__(self) -> None:
        _require(self.behavior_logprobs, "behavior_logprobs")
        _require(self.lag, "lag")
        shapes = {
            field.name: tuple(value.shape)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if len(set(shapes.values())) != 1 or self.logprobs.dim() != 1:
            raise RuntimeError(f"columns must be flat and of one length, got {shapes}")


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What the loss did with each token; detached columns of length n.

    `coefficient` is M c A + kappa. `log_weight` is log c after capping and before masks. `capped`: a weight was
    clamped. `dropped`: outside the bounds of a weight that drops. `trust_masked`: that, or removed by the trust mask.
    `guard_masked`: removed with its sequence. `log_ratio` is current minus behavior. `nonfinite`: a log-ratio, weight
    or coefficient is not finite.
    """

    coefficient: Tensor
    log_weight: Tensor
    capped: Tensor
    dropped: Tensor
    trust_masked: Tensor
    guard_masked: Tensor
    log_ratio: Tensor
    nonfinite: Tensor


def policy_loss(columns: Columns, loss: Loss, m2_bound: float | None = None) -> tuple[Tensor, Outcome]:
    """The scalar to minimise for one micro-batch, and what it did to each token.

    The losses of the micro-batches of a step add up to the loss of the step. With trust "m2" that takes `m2_bound`, the
    `second_moment_bound` of the whole step; without it the bound is that of the tokens given. RuntimeError if a column
    that the loss needs is missing.
    """
    if loss.function:
        return _own_loss(columns, loss)
    # The one stop-gradient: nothing below sees `columns.logprobs` until the last sum.
    current = columns.logprobs.detach()
    log_ratio = current - columns.behavior_logprobs
    anchor = columns.behavior_logprobs
    if loss.needs_proximal:
        anchor = _require(columns.proximal_logprobs, "proximal_logprobs")
    log_weight, capped, dropped = _log_weight(current, anchor, columns, loss)
    trust_masked = dropped | _trust_mask(current, anchor, columns, loss, m2_bound)
    guard_masked = _guard_mask(log_ratio, columns, loss)

    # A token of advantage 0 has no gradient, whatever its ratio.
    keep = ~(trust_masked | guard_masked) & (columns.advantages != 0)
    weighted = torch.where(keep, log_weight, -math.inf).exp() * columns.advantages
    kappa = _kappa(current, anchor, columns, loss)
    coefficient = weighted + kappa
    terms = columns.normalizers * coefficient * columns.logprobs
    total = -torch.where(keep | (kappa != 0), terms, 0.0).sum()
    nonfinite = ~(log_ratio.isfinite() & log_weight.isfinite() & coefficient.isfinite())
    return total, Outcome(coefficient, log_weight, capped, dropped, trust_masked, guard_masked, log_ratio, nonfinite)


def try_own(loss: Loss, num_groups: int, group_size: int) -> None:
    """Calls the functions of the user once, on a made-up batch of such a size, with two tokens a trajectory.

    Raises `ValueError` for whatever they raise, and for a loss or slopes that are not finite: better here than after
    the actors' start.
    """
    groups = torch.arange(num_groups).repeat_interleave(group_size)
    path = loss.advantage
    try:
        if loss.advantage:
            estimate((torch.arange(len(groups)) * 7 % 5 < 2).float(), groups, torch.full_like(groups, 2), loss)
        path = loss.function
        if loss.function:
            total, outcome = policy_loss(_made_up(loss, len(groups)), loss)
    except Exception as error:
        raise ValueError(f"{path!r}, tried on made-up numbers: {quote(error, 400)}{line_of(error)}") from error
    if loss.function and (not total.isfinite() or outcome.nonfinite.any()):
        raise ValueError(
            f"{path!r}, tried on made-up numbers of lag 0 and ratio 1, as of fresh tokens, gave a loss or slopes by "
            f"logprobs ({int(outcome.nonfinite.sum())} of {len(outcome.nonfinite)}) that are not finite: keep what it "
            "divides by, or takes a logarithm or root of, away from 0"
        )


def _made_up(loss: Loss, num_sequences: int) -> Columns:
    sequence = torch.arange(num_sequences).repeat_interleave(2)
    logprobs = -1.0 - sequence / 10
    return Columns(
        logprobs=logprobs,
        behavior_logprobs=logprobs,
        proximal_logprobs=logprobs if loss.needs_proximal else None,
        reference_logprobs=logprobs if loss.needs_reference else None,
        advantages=sequence - sequence.float().mean(),
        normalizers=torch.full_like(logprobs, 0.5 / num_sequences),
        sequence=sequence,
        lag=torch.zeros_like(sequence),
        num_sequences=num_sequences,
    )


def _own_loss(columns: Columns, loss: Loss) -> tuple[Tensor, Outcome]:
    """A loss of the user in the form of all others: its slope by a log-prob is -n times the token's coefficient.

    It is not asked about a micro-batch of no trajectories, which a rank has where another has one more. ValueError
    unless it returns a scalar that depends on `columns.logprobs`.
    """
    function = own.load(loss.function) if columns.num_sequences else _nothing
    with torch.enable_grad():
        leaf = columns.logprobs.detach().requires_grad_()
        total = function(replace(columns, logprobs=leaf))
        if not isinstance(total, Tensor) or total.dim() or not total.requires_grad:
            got: Any = total
            if isinstance(total, Tensor):
                got = f"shape {list(total.shape)}{'' if total.requires_grad else ' without a gradient'}"
            raise ValueError(
                f"{loss.function!r} must return a scalar tensor that depends on columns.logprobs, got {got}"
            )
        (slope,) = torch.autograd.grad(total, leaf)
    counts = columns.normalizers != 0
    slope = torch.where(counts, slope, 0.0)
    current = columns.logprobs
    nothing = torch.zeros_like(slope, dtype=torch.bool)
    coefficient = torch.where(counts, -slope / columns.normalizers, 0.0)
    weight = torch.where(columns.advantages != 0, coefficient / columns.advantages, 1.0).abs()
    log_ratio = current.detach() - columns.behavior_logprobs
    nonfinite = ~(log_ratio.isfinite() & coefficient.isfinite())
    value = total.detach() + (slope * (current - current.detach())).sum()
    return value, Outcome(coefficient, weight.log(), nothing, nothing, nothing, nothing, log_ratio, nonfinite)


def _nothing(columns: Columns) -> Tensor:
    return columns.logprobs.sum()


def concatenate(columns: Sequence[Columns], outcomes: Sequence[Outcome]) -> tuple[Columns, Outcome]:
    """The micro-batches of a step as one, detached, with trajectories renumbered."""
    joined: dict[str, Tensor | None] = {}
    for field in fields(Columns):
        parts = [getattr(part, field.name) for part in columns]
        if field.name != "num_sequences":
            joined[field.name] = None if parts[0] is None else torch.cat([part.detach() for part in parts])
    starts = [sum(part.num_sequences for part in columns[:i]) for i in range(len(columns))]
    joined["sequence"] = torch.cat([part.sequence + start for part, start in zip(columns, starts, strict=True)])
    outcome = {field.name: torch.cat([getattr(part, field.name) for part in outcomes]) for field in fields(Outcome)}
    num_sequences = sum(part.num_sequences for part in columns)
    return Columns(**joined, num_sequences=num_sequences), Outcome(**outcome)  # type: ignore[arg-type]


def sequence_sum(values: Tensor, columns: Columns) -> Tensor:
    """Sum of `values` over each trajectory; [num_sequences]."""
    zeros = torch.zeros(columns.num_sequences, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, columns.sequence, values)


def kl_estimate(away: Tensor, estimator: Estimator) -> Tensor:
    """Estimate of KL(p || reference) at tokens sampled by p, in nats; `away` is log p - log reference of each."""
    if estimator == "k1":
        return away
    return away.square() / 2 if estimator == "k2" else (-away).expm1() + away


def _log_weight(current: Tensor, anchor: Tensor, columns: Columns, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """log c after capping, whether it was clamped, whether it drops the token: both weight slots together."""
    behavior = _at_level(anchor - columns.behavior_logprobs, loss.behavior_weight, columns)
    policy = current - anchor
    if loss.policy_weight == "clipped_geometric":
        policy = _clipped(policy, columns, loss)
    policy = _at_level(policy, loss.policy_weight, columns)
    if loss.policy_gate or loss.policy_gate_negative:
        policy = policy + _log_gate(policy, columns, loss)
    behavior, capped_w, dropped_w = _bound(behavior, loss.behavior_floor, loss.behavior_cap, loss.behavior_outside)
    policy, capped_r, dropped_r = _bound(policy, loss.policy_floor, loss.policy_cap, loss.policy_outside)
    if loss.policy_sign == "negative":
        negative = columns.advantages < 0
        policy, capped_r, dropped_r = torch.where(negative, policy, 0.0), capped_r & negative, dropped_r & negative
    return behavior + policy + math.log(loss.policy_factor), capped_w | capped_r, dropped_w | dropped_r


def _clipped(log_ratio: Tensor, columns: Columns, loss: Loss) -> Tensor:
    """Held inside the trust range on the side to which the advantage pushes (GMPO 2507.20673)."""
    low, high = _log(1.0 - loss.trust_low), math.log1p(loss.trust_high)
    return torch.where(columns.advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))


def _log_gate(log_ratio: Tensor, columns: Columns, loss: Loss) -> Tensor:
    """log of 4 s (1 - s) with s = sigmoid(tau (ratio - 1)): the slope of SAPO's soft clip (2511.20347)."""
    tau = torch.where(columns.advantages > 0, loss.policy_gate, loss.policy_gate_negative).to(log_ratio)
    z = (tau * log_ratio.expm1()).clamp(max=_GATE_CLOSED)
    gate = math.log(4.0) + nn.functional.logsigmoid(z) + nn.functional.logsigmoid(-z)
    return torch.where(tau > 0, gate, 0.0)


def _at_level(log_ratio: Tensor, weight: PolicyWeight, columns: Columns) -> Tensor:
    if weight == "none":
        return torch.zeros_like(log_ratio)
    if weight == "token":
        return log_ratio
    total = sequence_sum(log_ratio, columns)
    if weight != "sequence":  # a geometric mean
        total = total / sequence_sum(torch.ones_like(log_ratio), columns)
    return total[columns.sequence]


def _bound(log_ratio: Tensor, floor: float, cap: float, outside: Outside) -> tuple[Tensor, Tensor, Tensor]:
    low, high = _log(floor), _log(cap) if cap else math.inf
    beyond = (log_ratio < low) | (log_ratio > high)
    nowhere = torch.zeros_like(beyond)
    if outside == "drop":
        return log_ratio, nowhere, beyond
    return log_ratio.clamp(low, high), beyond, nowhere


def _trust_mask(current: Tensor, anchor: Tensor, columns: Columns, loss: Loss, m2_bound: float | None) -> Tensor:
    """bool[n]: the token left the trust region; if signed, on the side to which its advantage would push it further."""
    if loss.trust == "none":
        return torch.zeros_like(columns.advantages, dtype=torch.bool)
    if loss.trust == "m2":
        moved = current - anchor
        bound = second_moment_bound(moved, columns.advantages, loss) if m2_bound is None else m2_bound
        return _outward(moved, columns.advantages, loss) & (moved.square() >= bound)
    if loss.trust == "ratio":
        level = loss.policy_weight if loss.policy_weight in ("geometric", "sequence") else "token"
        moved = _at_level(current - anchor, level, columns)
        widening = columns.lag.clamp(min=1).to(moved) if loss.anchor == "loglinear" else 1.0
        above, below = moved > math.log1p(loss.trust_high) * widening, moved < _log(1.0 - loss.trust_low) * widening
    elif loss.trust == "tv":
        moved = current.exp() - anchor.exp()
        above, below = moved > loss.trust_high, moved < -loss.trust_low
    else:
        divergence = _binary_kl(anchor.exp(), current.exp())
        above = (current > anchor) & (divergence > loss.trust_high)
        below = (current < anchor) & (divergence > loss.trust_low)
    if not loss.trust_signed:
        return above | below
    return (above & (columns.advantages > 0)) | (below & (columns.advantages < 0))


def _binary_kl(before: Tensor, after: Tensor) -> Tensor:
    """KL between "this token" and "any other token" under the two policies (DPPO 2602.04879)."""
    p, q = before.clamp(_TINY, 1 - _TINY), after.clamp(_TINY, 1 - _TINY)
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def second_moment_bound(log_ratio: Tensor, advantages: Tensor, loss: Loss) -> float:
    """The square from which on log-ratios are removed so that the mean of the others is at most `trust_high` (M2PO
    2510.01161); nan if none has to be. `log_ratio` float[n] is current - anchor.

    Only tokens that the gradient would push further out are candidates, if signed. Equal values go together, so the
    order of the tokens does not matter.
    """
    ascending = log_ratio[_outward(log_ratio, advantages, loss)].square().sort().values
    counts = torch.arange(1, len(ascending) + 1, device=ascending.device)
    num_kept = int((ascending.cumsum(0) / counts <= loss.trust_high).sum())
    if num_kept == len(ascending):
        return math.nan
    removed = float(ascending[num_kept])
    # Halfway, as log-probs that are computed once more may differ in the last digit.
    return (float(ascending[num_kept - 1]) + removed) / 2 if num_kept else removed / 2


def _outward(log_ratio: Tensor, advantages: Tensor, loss: Loss) -> Tensor:
    return log_ratio * advantages > 0 if loss.trust_signed else torch.ones_like(log_ratio, dtype=torch.bool)


def _guard_mask(log_ratio: Tensor, columns: Columns, loss: Loss) -> Tensor:
    """bool[n]: the token's whole sequence is removed, judged on the ratio to the behavior policy."""
    if loss.guard == "none":
        return torch.zeros_like(log_ratio, dtype=torch.bool)
    if loss.guard == "max_kl":
        return _extreme(log_ratio.expm1() - log_ratio, columns, "amax") > loss.guard_high
    if loss.guard == "veto":
        return _extreme(log_ratio, columns, "amin") < math.log(loss.guard_low)
    mean = _at_level(log_ratio, "geometric", columns)
    if loss.guard == "negative_kl":
        return (columns.advantages < 0) & (-mean > loss.guard_high)
    return (mean < math.log(loss.guard_low)) | (mean > math.log(loss.guard_high))


def _extreme(values: Tensor, columns: Columns, reduce: str) -> Tensor:
    start = torch.zeros(columns.num_sequences, dtype=values.dtype, device=values.device)
    return start.scatter_reduce(0, columns.sequence, values, reduce, include_self=False)[columns.sequence]


def _kappa(current: Tensor, anchor: Tensor, columns: Columns, loss: Loss) -> Tensor:
    """Additive part of the coefficient: minus the gradients of the penalties with respect to the log-prob."""
    kappa = torch.zeros_like(current)
    if loss.penalty:
        log_ratio = _at_level(current - anchor, loss.penalty_level, columns)
        kappa = kappa - 2.0 * loss.penalty * log_ratio
    if loss.reference_kl:
        away = current - _require(columns.reference_logprobs, "reference_logprobs")
        kappa = kappa - loss.reference_kl * _kl_slope(away, current - columns.behavior_logprobs, loss)
    return torch.where(columns.normalizers != 0, kappa, 0.0)


def _kl_slope(away: Tensor, log_ratio: Tensor, loss: Loss) -> Tensor:
    """Derivative of the KL estimate k by the log-prob, or of ratio * k if weighted; `away` is current - reference."""
    slope = {"k1": torch.ones_like(away), "k2": away, "k3": -(-away).expm1()}[loss.reference_estimator]
    if not loss.reference_weighted:
        return slope
    return log_ratio.exp() * (kl_estimate(away, loss.reference_estimator) + slope)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _require(column: Tensor | None, name: str) -> Tensor:
    if column is None:
        raise RuntimeError(f"the loss needs the column {name}, which this batch does not carry")
    return column
