"""The one loss against every published surrogate, written out on its own in numpy and differentiated numerically."""

import dataclasses
import math
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algo.advantage import advantages
from asyncrl.algo.loss import Columns, concatenate, policy_loss, second_moment_bound, try_own
from asyncrl.algo.presets import PRESETS, Loss, resolve

LENGTHS = (9, 14, 6, 20, 11, 4)
PROMPTS = (0, 0, 1, 1, 2, 2)
ADVANTAGES = (0.9, -0.7, 1.3, -1.1, 0.4, -0.6)
MAX_LENGTH = 32
SEQUENCE = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
A = np.array(ADVANTAGES)[SEQUENCE]


def make_data(seed=0):
    """Log-probs of a batch: sequences 0, 1 and 2 hardly moved on average, the others moved a lot."""
    rng = np.random.default_rng(seed)
    current, behavior = rng.uniform(-4, -0.05, (2, len(A)))
    for i in (0, 1, 2):
        noise = rng.normal(0, 0.6, LENGTHS[i])
        chosen = i == SEQUENCE
        behavior[chosen] = rng.uniform(-4, -2, LENGTHS[i])
        current[chosen] = behavior[chosen] + noise - noise.mean() + 1e-4
    proximal = (current + behavior) / 2 + rng.normal(0, 0.3, len(A))
    return {
        "current": current,
        "behavior": behavior,
        "proximal": proximal,
        "reference": current + rng.normal(0, 0.5, len(A)),
        "lag": rng.integers(0, 4, len(A)),
    }


def normalizers_of(aggregate):
    tokens_of_prompt = [sum(n for n, q in zip(LENGTHS, PROMPTS, strict=True) if q == p) for p in PROMPTS]
    of_sequence = {
        "token": [1 / sum(LENGTHS)] * len(LENGTHS),
        "seq_mean": [1 / (len(LENGTHS) * n) for n in LENGTHS],
        "seq_sum": [1 / len(LENGTHS)] * len(LENGTHS),
        "prompt": [1 / (len(set(PROMPTS)) * n) for n in tokens_of_prompt],
        "constant": [1 / (len(LENGTHS) * MAX_LENGTH)] * len(LENGTHS),
    }[aggregate]
    return np.array(of_sequence)[SEQUENCE]


def make_columns(data, aggregate="token", **changes):
    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    columns = Columns(
        logprobs=tensor(data["current"]).requires_grad_(),
        behavior_logprobs=tensor(data["behavior"]),
        proximal_logprobs=tensor(data["proximal"]),
        reference_logprobs=tensor(data["reference"]),
        advantages=tensor(A),
        normalizers=tensor(normalizers_of(aggregate)),
        sequence=torch.tensor(SEQUENCE),
        lag=torch.tensor(data["lag"]),
        num_sequences=len(LENGTHS),
    )
    return dataclasses.replace(columns, **changes)


def gradient(columns, loss):
    total, outcome = policy_loss(columns, loss)
    (result,) = torch.autograd.grad(total, columns.logprobs)
    return result, outcome


# The published objectives, to be maximised. `logp` are the log-probs that vary, `d` the batch at which anything that a
# paper puts under a stop-gradient is evaluated.


def mean_tokens(values):
    return values.sum() / len(A)


def mean_sequences(values):
    return np.mean([values[i == SEQUENCE].mean() for i in range(len(LENGTHS))])


def ppo(ratio, low, high):
    return np.minimum(ratio * A, np.clip(ratio, 1 - low, 1 + high) * A)


def on_behavior(logp, d, low, high):
    return ppo(np.exp(logp - d["behavior"]), low, high)


def k3(logp, d):
    gap = d["reference"] - logp
    return np.exp(gap) - gap - 1


def rho(d):
    return np.exp(d["current"] - d["behavior"])


def whole(values, reduce):
    return np.array([reduce(values[i == SEQUENCE]) for i in range(len(LENGTHS))])[SEQUENCE]


def decoupled(logp, d, weight, high=0.2):
    """`weight` maps exp(proximal - behavior), a constant, to the weight of PPO-clip on the proximal policy."""
    return mean_tokens(weight(np.exp(d["proximal"] - d["behavior"])) * ppo(np.exp(logp - d["proximal"]), 0.2, high))


def geometric_mask(d, low, high):
    mean = whole(rho(d), lambda ratio: np.prod(ratio) ** (1 / len(ratio)))
    return (mean >= low) & (mean <= high)


def a3po(logp, d):
    """Decoupled PPO with the interpolated proximal policy under a stop-gradient."""
    alpha = 1 - 1 / np.maximum(d["lag"], 1)
    proximal = d["behavior"] + alpha * (d["current"] - d["behavior"])
    return mean_tokens(np.exp(proximal - d["behavior"]) * ppo(np.exp(logp - proximal), 0.2, 0.2))


def tv_keep(d, delta, signed=True):
    moved = np.exp(d["current"]) - np.exp(d["behavior"])
    outward = A * moved > 0 if signed else True
    return ~((np.abs(moved) > delta) & outward)


def kl_keep(d, delta):
    p, q = np.exp(d["behavior"]), np.exp(d["current"])
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return ~((divergence > delta) & (A * (q - p) > 0))


def m2_keep(d, limit):
    x = d["current"] - d["behavior"]
    keep = np.ones(len(A), dtype=bool)
    outward = x * A > 0
    while (x[keep & outward] ** 2).mean() > limit:
        keep[np.argmax(np.where(keep & outward, np.abs(x), -1))] = False
    return keep


def prime(logp, d, keep):
    x = logp - d["behavior"]
    return mean_tokens(keep * np.exp(x) * A - 1e-3 * x**2)


def gspo(logp, d):
    values = []
    for i in range(len(LENGTHS)):
        chosen = i == SEQUENCE
        ratio = math.exp((logp[chosen] - d["behavior"][chosen]).mean())
        a = ADVANTAGES[i]
        values.append(min(ratio * a, min(max(ratio, 1 - 3e-4), 1 + 4e-4) * a))
    return np.mean(values)


def topr(logp, d):
    taper = np.where(A > 0, 1.0, np.clip(whole(rho(d), np.prod), 0, 1))
    return mean_tokens(taper * A * logp)


def kimi(logp, d):
    values = []
    for i in range(len(LENGTHS)):
        chosen = i == SEQUENCE
        log_q = (logp[chosen] - d["behavior"][chosen]).sum()
        values.append(ADVANTAGES[i] * logp[chosen].sum() - 0.1 / 2 * log_q**2)
    return np.mean(values)


def gmpo(logp, d):
    """exp of the mean of the log-ratios, each min(sign x, clip(sign x, -0.4, 0.4)) with the sign of the advantage."""
    values = []
    for i in range(len(LENGTHS)):
        chosen = i == SEQUENCE
        sign = np.sign(ADVANTAGES[i])
        x = sign * (logp[chosen] - d["behavior"][chosen])
        values.append(ADVANTAGES[i] * np.exp((sign * np.minimum(x, np.clip(x, -0.4, 0.4))).mean()))
    return np.mean(values)


def sapo(logp, d):
    tau = np.where(A > 0, 1.0, 1.05)
    ratio = np.exp(logp - d["behavior"])
    return mean_sequences(4 / tau / (1 + np.exp(-tau * (ratio - 1))) * A)


def dsv32(logp, d):
    """PPO-clip under the off-policy sequence mask, and the KL estimate times the ratio, both differentiated."""
    stale = (A < 0) & (whole(d["behavior"] - d["current"], np.mean) > 0.05)
    unbiased_kl = np.exp(logp - d["behavior"]) * k3(logp, d)
    return mean_sequences(~stale * on_behavior(logp, d, 0.2, 0.2) - 1e-3 * unbiased_kl)


def prompts_equal(values):
    prompt = np.array(PROMPTS)[SEQUENCE]
    return np.mean([values[prompt == p].mean() for p in set(PROMPTS)])


SURROGATES = {
    "async_default": lambda logp, d: mean_tokens(tv_keep(d, 0.2) * np.minimum(rho(d), 2) * A * logp),
    "tis2": lambda logp, d: mean_tokens(np.minimum(rho(d), 2) * A * logp),
    "reinforce": lambda logp, _: mean_tokens(A * logp),
    "grpo": lambda logp, d: mean_sequences(on_behavior(logp, d, 0.2, 0.2) - 0.04 * k3(logp, d)),
    "dr_grpo": lambda logp, d: on_behavior(logp, d, 0.2, 0.2).sum() / (len(LENGTHS) * MAX_LENGTH),
    "dapo": lambda logp, d: mean_tokens(on_behavior(logp, d, 0.2, 0.28)),
    "decoupled_ppo": lambda logp, d: decoupled(logp, d, lambda w: np.where(w > 5, 0, w)),
    "a3po": a3po,
    "tis_recompute": lambda logp, d: decoupled(logp, d, lambda w: np.minimum(w, 2), 0.28),
    "tis_seq": lambda logp, d: decoupled(logp, d, lambda w: np.minimum(whole(w, np.prod), 2)),
    "icepop": lambda logp, d: decoupled(logp, d, lambda w: np.where((w < 0.5) | (w > 5), 0, w)),
    "seq_mask_tis": lambda logp, d: decoupled(logp, d, lambda w: np.minimum(w, 2) * geometric_mask(d, 0.999, 1.002)),
    "geo_rs_token_tis": lambda logp, d: decoupled(logp, d, lambda w: np.minimum(w, 2) * geometric_mask(d, 0.99, 1.01)),
    "aipo": lambda logp, d: mean_tokens(np.minimum(rho(d), 5) * A * logp),
    "cispo": lambda logp, d: mean_tokens(np.clip(rho(d), 0, 5) * A * logp),
    "scalerl": lambda logp, d: prompts_equal(np.clip(rho(d), 0, 5) * A * logp),
    "rollout_is": lambda logp, d: mean_tokens(((rho(d) > 0.8) & (rho(d) < 1.2)) * rho(d) * A * logp),
    "dppo_tv": lambda logp, d: mean_tokens(tv_keep(d, 0.2) * np.minimum(rho(d), 10) * A * logp),
    "dppo_kl": lambda logp, d: mean_tokens(kl_keep(d, 0.05) * np.minimum(rho(d), 10) * A * logp),
    "prime": lambda logp, d: prime(logp, d, tv_keep(d, 0.2)),
    "ipo": lambda logp, d: prime(logp, d, tv_keep(d, 0.1, signed=False)),
    "gspo": gspo,
    "m2po": lambda logp, d: mean_tokens(m2_keep(d, 0.04) * rho(d) * A * logp),
    "topr": topr,
    "kimi_k15": kimi,
    "gmpo": gmpo,
    "sapo": sapo,
    "dsv32": dsv32,
    "opmd": lambda logp, _: mean_tokens(A * logp) / (1 + 1),
    "vcpo": lambda logp, d: mean_tokens(np.minimum(whole(rho(d), np.prod), 8) * A * logp),
    "reinforce_pp": lambda logp, d: mean_tokens(on_behavior(logp, d, 0.2, 0.2)),
    "reinforce_pp_baseline": lambda logp, d: mean_tokens(on_behavior(logp, d, 0.2, 0.2)),
    "ppo": lambda logp, d: mean_tokens(on_behavior(logp, d, 0.2, 0.2)),
    "rloo_tis2": lambda logp, d: mean_tokens(np.minimum(rho(d), 2) * A * logp),
}


KL_ESTIMATES = {
    "k1": lambda logp, d: logp - d["reference"],
    "k2": lambda logp, d: (logp - d["reference"]) ** 2 / 2,
    "k3": k3,
}


def differences(surrogate, data, step=1e-6):
    result = np.zeros(len(A))
    for t in range(len(A)):
        shift = np.zeros(len(A))
        shift[t] = step
        result[t] = (surrogate(data["current"] + shift, data) - surrogate(data["current"] - shift, data)) / (2 * step)
    return result


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_is_that_of_the_published_surrogate(name, seed):
    data = make_data(seed)
    found, outcome = gradient(make_columns(data, PRESETS[name].aggregate), PRESETS[name])
    expected = -differences(SURROGATES[name], data)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-8)
    factors = make_columns(data, PRESETS[name].aggregate).normalizers
    torch.testing.assert_close(found, -factors * outcome.coefficient)


@pytest.mark.parametrize("estimator", KL_ESTIMATES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_every_kl_estimate(estimator, weighted):
    data = make_data()
    loss = Loss(reference_kl=0.3, reference_estimator=estimator, reference_weighted=weighted)

    def surrogate(logp, d):
        ratio = np.exp(logp - d["behavior"]) if weighted else 1.0
        return mean_tokens(A * logp - 0.3 * ratio * KL_ESTIMATES[estimator](logp, d))

    found, _ = gradient(make_columns(data), loss)
    np.testing.assert_allclose(found.numpy(), -differences(surrogate, data), rtol=1e-5, atol=1e-8)


def test_trajectory_balance_is_reinforce_on_the_kl_penalised_return():
    """TBA 2503.18929: the squared residual of log Z + log pi - log pi_ref - R / beta, log Z a constant."""
    data, beta, rewards = make_data(), 0.5, torch.tensor([1.0, 0.0, 0.3, 0.9, 0.2, 0.7], dtype=torch.float64)

    def log_ratio(logp):
        return np.array([(logp - data["reference"])[i == SEQUENCE].sum() for i in range(len(LENGTHS))])

    def residual_loss(logp, d):
        log_z = rewards.numpy() / beta - log_ratio(d["current"])
        log_z = np.array([log_z[np.array(PROMPTS) == p].mean() for p in PROMPTS])
        return -np.mean((log_z + log_ratio(logp) - rewards.numpy() / beta) ** 2)

    penalised = rewards - beta * torch.tensor(log_ratio(data["current"]))
    advantage = advantages(penalised, torch.tensor(PROMPTS), torch.tensor(LENGTHS), "mean", "none")[SEQUENCE]
    found, _ = gradient(make_columns(data, "seq_sum", advantages=advantage), Loss(aggregate="seq_sum"))
    expected = -differences(residual_loss, data)
    np.testing.assert_allclose(2 / beta * found.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_the_test_batches_exercise_every_mask_and_cap():
    for name, loss in PRESETS.items():
        outcomes = [gradient(make_columns(make_data(seed)), loss)[1] for seed in (0, 1, 2)]
        masked = torch.cat([outcome.trust_masked for outcome in outcomes]).double().mean()
        guarded = torch.cat([outcome.guard_masked for outcome in outcomes]).double().mean()
        capped = torch.cat([outcome.capped for outcome in outcomes]).double().mean()
        drops = loss.trust != "none" or "drop" in (loss.behavior_outside, loss.policy_outside)
        assert (0 < masked < 1) == drops, name
        assert (0 < guarded < 1) == (loss.guard != "none"), name
        clamps = [(loss.behavior_cap, loss.behavior_outside), (loss.policy_cap, loss.policy_outside)]
        assert (0 < capped < 1) == any(cap and outside == "clamp" for cap, outside in clamps), name


def guard_columns(log_ratios, signs):
    """Sequences of the given log-ratios to the behavior policy."""
    sequence = torch.tensor([i for i, row in enumerate(log_ratios) for _ in row])
    flat = torch.tensor([x for row in log_ratios for x in row], dtype=torch.float64)
    ones = torch.ones_like(flat)
    logprobs = torch.full_like(flat, -1.0).requires_grad_()
    lag = sequence * 0
    return Columns(
        logprobs, -1 - flat, None, None, torch.tensor(signs).double()[sequence], ones, sequence, lag, len(log_ratios)
    )


@pytest.mark.parametrize(
    ("guard", "low", "high", "removed"),
    [
        ("geometric_band", 0.9, 1.1, [False, True, True, False]),
        ("negative_kl", 0, 0.1, [False, False, True, False]),
        ("max_kl", 0, 0.25, [False, False, True, True]),
        ("veto", 0.5, 0, [False, False, True, False]),
    ],
)
def test_guards_remove_whole_sequences(guard, low, high, removed):
    columns = guard_columns([[0.3, -0.3], [0.2, 0.2], [-0.9, 0.1], [0.7, -0.6, -0.1]], [1.0, -1.0, -1.0, 1.0])
    found, outcome = gradient(columns, Loss(guard=guard, guard_low=low, guard_high=high))
    assert outcome.guard_masked.tolist() == [removed[i] for i in columns.sequence.tolist()]
    assert torch.equal(found == 0, outcome.guard_masked)


def test_the_policy_sign_leaves_positives_at_weight_one():
    columns = guard_columns([[1.0, 0.5], [-1.0], [1.0]], [1.0, -1.0, -1.0])
    loss = Loss(policy_weight="token", policy_sign="negative", policy_floor=0.5, policy_cap=2.0)
    _, outcome = gradient(columns, loss)
    torch.testing.assert_close(outcome.coefficient, torch.tensor([1, 1, -0.5, -2.0], dtype=torch.float64))
    assert outcome.capped.tolist() == [False, False, True, True]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(PRESETS)), st.permutations(range(len(A))))
def test_the_order_of_the_tokens_does_not_matter(name, order):
    columns = make_columns(make_data(), PRESETS[name].aggregate)
    total, _ = policy_loss(columns, PRESETS[name])
    before, _ = gradient(columns, PRESETS[name])
    moved = {
        field.name: value[order]
        for field in dataclasses.fields(columns)
        if isinstance(value := getattr(columns, field.name), torch.Tensor)
    }
    shuffled = dataclasses.replace(columns, **moved)
    torch.testing.assert_close(policy_loss(shuffled, PRESETS[name])[0], total)
    after = torch.autograd.grad(policy_loss(shuffled, PRESETS[name])[0], columns.logprobs)[0]
    torch.testing.assert_close(after, before)


def part_of(columns, members):
    """The micro-batch that holds the sequences `members`."""
    chosen = torch.tensor([i in members for i in columns.sequence.tolist()])
    parts = {
        field.name: value[chosen]
        for field in dataclasses.fields(columns)
        if isinstance(value := getattr(columns, field.name), torch.Tensor)
    }
    parts["sequence"] = torch.tensor([members.index(i) for i in parts["sequence"].tolist()], dtype=torch.int64)
    return dataclasses.replace(columns, **parts, num_sequences=len(members))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.permutations(range(len(LENGTHS))),
    st.integers(1, len(LENGTHS) - 1),
)
def test_the_split_into_micro_batches_does_not_matter(name, order, cut):
    loss = PRESETS[name]
    columns = make_columns(make_data(), loss.aggregate)
    whole_loss, _ = policy_loss(columns, loss)
    before, _ = gradient(columns, loss)
    parts = [part_of(columns, order[:cut]), part_of(columns, order[cut:])]
    log_ratio = (columns.logprobs - columns.behavior_logprobs).detach()
    bound = second_moment_bound(log_ratio, columns.advantages, loss)
    results = [policy_loss(part, loss, bound) for part in parts]
    total = results[0][0] + results[1][0]
    torch.testing.assert_close(total, whole_loss)
    torch.testing.assert_close(torch.autograd.grad(total, columns.logprobs)[0], before)
    joined, outcome = concatenate(parts, [outcome for _, outcome in results])
    torch.testing.assert_close(outcome.coefficient, policy_loss(joined, loss)[1].coefficient)
    assert not joined.logprobs.requires_grad


@pytest.mark.parametrize(
    "override", [{"trust": "tv"}, {"guard": "geometric_band", "guard_low": 0.9, "guard_high": 1.1}]
)
def test_masks_do_not_change_the_denominator_of_what_is_left(override):
    columns = make_columns(make_data())
    plain, _ = gradient(columns, PRESETS["tis2"])
    found, outcome = gradient(columns, resolve("tis2", override))
    removed = outcome.trust_masked | outcome.guard_masked
    assert 0 < removed.sum() < len(A)
    assert torch.equal(found, torch.where(removed, 0.0, plain))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("tis2", "behavior_logprobs"),
        ("reinforce", "behavior_logprobs"),
        ("reinforce", "lag"),
        ("icepop", "proximal_logprobs"),
        ("grpo", "reference_logprobs"),
    ],
)
def test_a_missing_column_is_an_error(name, column):
    with pytest.raises(RuntimeError, match=column):
        policy_loss(make_columns(make_data(), **{column: None}), PRESETS[name])


def test_columns_of_different_lengths_are_an_error():
    with pytest.raises(RuntimeError, match="of one length"):
        make_columns(make_data(), lag=torch.zeros(3, dtype=torch.int64))


def test_a_cap_keeps_the_token_and_a_band_drops_it():
    columns = guard_columns([[math.log(3.0)], [math.log(1.5)]], [1.0, 1.0])
    cap, capped = gradient(columns, Loss(policy_weight="token", policy_cap=2.0))
    band, dropped = gradient(columns, Loss(policy_weight="token", policy_cap=2.0, policy_outside="drop"))
    torch.testing.assert_close(cap, torch.tensor([-2.0, -1.5], dtype=torch.float64))
    torch.testing.assert_close(band, torch.tensor([0.0, -1.5], dtype=torch.float64))
    assert capped.capped.tolist() == dropped.trust_masked.tolist() == [True, False]
    assert not capped.trust_masked.any()
    assert not dropped.capped.any()


@pytest.mark.parametrize("lag", [0, 1])
def test_a3po_at_lag_one_is_ppo(lag):
    same = make_columns(make_data(), lag=torch.full((len(A),), lag))
    ppo_clip = resolve("a3po", {"anchor": "behavior"})
    assert torch.equal(gradient(same, PRESETS["a3po"])[0], gradient(same, ppo_clip)[0])
    older = make_columns(make_data(), lag=torch.full((len(A),), 3))
    assert not torch.equal(gradient(older, PRESETS["a3po"])[0], gradient(older, ppo_clip)[0])


@pytest.mark.parametrize(
    "name", sorted(set(PRESETS) - {"grpo", "dsv32", "opmd"})
)  # KL terms pull at any lag; half of it
def test_without_mismatch_every_loss_is_exactly_reinforce(name):
    data = make_data()
    same = {"behavior": data["current"], "proximal": data["current"]}
    columns = make_columns({**data, **same})
    assert torch.equal(gradient(columns, PRESETS[name])[0], gradient(columns, PRESETS["reinforce"])[0])


def as_float32(columns):
    wide = {
        field.name: value.detach().float()
        for field in dataclasses.fields(columns)
        if isinstance(value := getattr(columns, field.name), torch.Tensor) and value.is_floating_point()
    }
    wide["logprobs"] = wide["logprobs"].requires_grad_()
    return dataclasses.replace(columns, **wide)


@pytest.mark.parametrize("x", [100.0, math.inf])  # exp(100) is infinite in float32
@pytest.mark.parametrize(
    "loss",
    [
        Loss(policy_weight="token", trust="ratio"),
        Loss(policy_weight="token", trust="m2"),
        Loss(policy_weight="token", policy_cap=2.0, policy_outside="drop"),
        Loss(policy_weight="token", guard="geometric_band", guard_low=0.5, guard_high=2.0),
    ],
)
def test_a_removed_token_of_infinite_ratio_has_no_gradient_and_leaves_the_loss_finite(loss, x):
    columns = as_float32(guard_columns([[x, 0.1], [0.1, 0.1]], [1.0, 1.0]))
    total, outcome = policy_loss(columns, loss)
    (found,) = torch.autograd.grad(total, columns.logprobs)
    assert total.isfinite()
    assert found[0] == 0
    assert found.isfinite().all()
    assert (found[2:] != 0).all()
    assert outcome.nonfinite.tolist() == [x == math.inf, False, False, False]


def test_a_soft_gate_is_closed_and_finite_where_the_ratio_is_not():
    columns = as_float32(guard_columns([[100.0], [0.0], [-100.0]], [1.0, 1.0, -1.0]))
    found, outcome = gradient(columns, PRESETS["sapo"])
    torch.testing.assert_close(found, torch.tensor([0.0, -1.0, 0.0]))
    assert not outcome.nonfinite.any()


def test_a_removed_token_that_the_policy_now_excludes_leaves_the_loss_finite():
    columns = guard_columns([[0.1, 0.1], [0.1]], [-1.0, 0.0])
    excluded = torch.tensor([-math.inf, -1.0, -math.inf], dtype=torch.float64).requires_grad_()
    columns = dataclasses.replace(columns, logprobs=excluded)
    total, _ = policy_loss(columns, Loss(policy_weight="token", trust="ratio"))
    assert total.isfinite()
    assert torch.equal(torch.autograd.grad(total, excluded)[0] != 0, torch.tensor([False, True, False]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(bad):
    columns = guard_columns([[bad, 0.1], [0.1, 0.1]], [1.0, 1.0])
    for loss in (Loss(policy_weight="token"), PRESETS["async_default"], PRESETS["tis2"]):
        assert policy_loss(columns, loss)[1].nonfinite.tolist() == [True, False, False, False]
    assert not gradient(guard_columns([[math.nan]], [1.0]), PRESETS["async_default"])[0].isfinite().any()
    overflow = as_float32(guard_columns([[100.0, 0.1]], [1.0]))
    total, outcome = policy_loss(overflow, Loss(policy_weight="token"))
    assert not total.isfinite()
    assert outcome.nonfinite.tolist() == [True, False]


def test_a_token_without_advantage_has_no_gradient_whatever_its_ratio():
    columns = as_float32(guard_columns([[100.0, -100.0]], [0.0]))
    found, _ = gradient(columns, Loss(policy_weight="token"))
    assert found.tolist() == [0.0, 0.0]


def own_tis2(columns):
    """A loss as a user would write it: truncated importance sampling, with autograd."""
    ratio = (columns.logprobs - columns.behavior_logprobs).exp().detach().clamp(max=2)
    return -(columns.normalizers * ratio * columns.advantages * columns.logprobs).sum()


def own_kl(columns):
    """With a KL term, and no thought of trajectories that are masked."""
    return (columns.logprobs - columns.reference_logprobs).square().sum()


@pytest.mark.parametrize("loss", [Loss(penalty=0.1, reference_kl=0.1), Loss(function=f"{__name__}:own_kl")])
def test_a_normalizer_of_zero_leaves_a_trajectory_out_of_every_term(loss):
    columns = guard_columns([[math.inf, 0.1], [0.1, 0.1]], [0.0, 1.0])
    weights = torch.tensor([0.0, 0.0, 0.5, 0.5], dtype=torch.float64)
    reference = torch.full_like(weights, -2.0)
    columns = dataclasses.replace(columns, normalizers=weights, reference_logprobs=reference)
    found, outcome = gradient(columns, loss)
    assert found[:2].tolist() == outcome.coefficient[:2].tolist() == [0.0, 0.0]
    assert (found[2:] != 0).all()


def own_constant(columns):
    return columns.advantages.sum()


def own_vector(columns):
    return columns.normalizers * columns.logprobs


def own_nothing(columns):
    del columns


def own_nan(columns):
    return (columns.logprobs * math.nan).sum()


def own_root(columns):
    """Finite, and its slope is not where the policies are equal."""
    return (columns.normalizers * (columns.logprobs - columns.behavior_logprobs).square().sqrt()).sum()


def test_a_loss_of_the_user_is_a_loss_like_any_other():
    columns = make_columns(make_data())
    loss = resolve(f"{__name__}:own_tis2", {"center": "loo"})
    assert loss == Loss(function=f"{__name__}:own_tis2", center="loo")
    (total, outcome), (known_total, known) = policy_loss(columns, loss), policy_loss(columns, PRESETS["tis2"])
    torch.testing.assert_close(total, known_total)
    torch.testing.assert_close(gradient(columns, loss)[0], gradient(columns, PRESETS["tis2"])[0])
    torch.testing.assert_close(outcome.coefficient, known.coefficient)
    torch.testing.assert_close(outcome.log_weight, known.log_weight)


def own_longest(columns):
    """Fails where there is no trajectory."""
    return columns.logprobs.sum() / (columns.sequence.max() + 1)


def test_a_loss_of_the_user_is_not_asked_about_nothing():
    """A rank has an empty micro-batch where another one has a micro-batch more."""
    columns = make_columns(make_data())
    empty = {
        field.name: column[:0]
        for field in dataclasses.fields(columns)
        if isinstance(column := getattr(columns, field.name), torch.Tensor)
    }
    empty["logprobs"] = empty["logprobs"].detach().requires_grad_()
    loss = Loss(function=f"{__name__}:own_longest")
    value, outcome = policy_loss(dataclasses.replace(columns, **empty, num_sequences=0), loss)
    value.backward()
    assert value == 0
    assert outcome.coefficient.shape == (0,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_constant", "a scalar tensor that depends on columns.logprobs, got shape [] without a gradient"),
        ("own_vector", "must return a scalar tensor that depends on columns.logprobs, got shape ["),
        ("own_nothing", "must return a scalar tensor that depends on columns.logprobs, got None"),
        ("own_los", "has no function 'own_los'"),
    ],
)
def test_a_loss_of_the_user_that_cannot_be_used_is_named(name, message):
    loss = Loss(function=f"{__name__}:{name}")
    with pytest.raises(ValueError, match=re.escape(message)):
        policy_loss(make_columns(make_data()), loss)
    with pytest.raises(ValueError, match=re.escape(message)):
        try_own(loss, 2, 2)


def own_of_four(rewards, groups):
    """Of groups of four, in units of how much the groups differ."""
    assert groups.tolist() == [number for number in range(8) for _ in range(4)]
    means = rewards.view(-1, 4).mean(1, keepdim=True)
    return ((rewards.view(-1, 4) - means) / means.std()).flatten()


@pytest.mark.parametrize(
    ("loss", "size", "message"),
    [
        (Loss(function=f"{__name__}:own_tis2", advantage=f"{__name__}:own_of_four"), 4, None),
        (Loss(advantage=f"{__name__}:own_of_four"), 2, r":own_of_four', tried on made-up numbers: .*test_loss.py line"),
        (Loss(function=f"{__name__}:own_kl"), 2, r":own_kl', tried .*TypeError"),
        (Loss(function=f"{__name__}:own_kl", reward_kl=0.1), 2, None),
        (Loss(function=f"{__name__}:own_nan"), 2, r":own_nan', tried .* slopes .* \(32 of 32\) that are not finite"),
        (Loss(function=f"{__name__}:own_root"), 2, r":own_root', tried .* slopes .* \(32 of 32\) that are not finite"),
    ],
)
def test_functions_of_the_user_are_tried_before_a_run_begins(loss, size, message):
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        try_own(loss, 8, size)


TRUNCATING = {
    **PRESETS,
    "sequence ratio": Loss(policy_weight="sequence", trust="ratio"),
    "dropped": Loss(policy_weight="token", policy_floor=0.8, policy_outside="drop"),
    "dropped, of the engine": Loss(
        anchor="proximal", behavior_weight="token", behavior_floor=0.8, behavior_outside="drop", trust="ratio"
    ),
    "worst token": Loss(policy_weight="token", guard="max_kl", guard_high=0.05),
}


@pytest.mark.parametrize("name", TRUNCATING)
@pytest.mark.parametrize("share", [0.98, 0.95, 0.7, 0.4])
def test_a_loss_tells_which_bound_removes_what_was_drawn_from_a_part(name, share):
    """Fresh tokens of the lowest ratio that truncated sampling has, in short and long sequences of either sign."""
    loss, sequence = TRUNCATING[name], torch.arange(4).repeat_interleave(torch.tensor([1, 1, 200, 200]))
    current = torch.full((len(sequence),), -7.0, dtype=torch.float64)
    columns = Columns(
        logprobs=current.clone().requires_grad_(),
        behavior_logprobs=current - math.log(share),
        proximal_logprobs=current if loss.needs_proximal else None,
        reference_logprobs=current if loss.needs_reference else None,
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[sequence],
        normalizers=torch.full_like(current, 1 / len(sequence)),
        sequence=sequence,
        lag=torch.zeros_like(sequence),
        num_sequences=4,
    )
    _, outcome = policy_loss(columns, loss)
    assert bool(loss.removed_from(share)) == bool((outcome.trust_masked | outcome.guard_masked).any())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_cap_that_drops_is_the_dual_clip_of_verl_and_skyrl(advantage):
    """Their loss, min and max of ratio, clipped ratio and c times the advantage, has the same slope everywhere."""
    loss = resolve("dapo", {"policy_cap": 3.0, "policy_outside": "drop", "trust_high": 0.2})
    ratio = torch.tensor([0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 2.9, 3.1, 50.0])
    size, ours, theirs = len(ratio), ratio.log().requires_grad_(), ratio.log().requires_grad_()
    zeros, advantages = torch.zeros(size), torch.full((size,), advantage)
    index = torch.zeros(size, dtype=torch.int64)
    columns = Columns(ours, zeros, None, None, advantages, torch.ones(size), index, index, 1)
    policy_loss(columns, loss)[0].backward()
    clipped = torch.maximum(-advantages * theirs.exp(), -advantages * theirs.exp().clamp(0.8, 1.2))
    torch.where(advantages < 0, torch.minimum(-advantages * 3.0, clipped), clipped).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
