"""The diagnostics against their definitions, and the alarms one by one."""

import math
import re
from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algo.diagnostics import METRICS, WITH_REFERENCE, alarms, diagnose
from asyncrl.algo.loss import Columns, policy_loss
from asyncrl.algo.presets import PRESETS, Loss, resolve

X = [[0.5, -0.4, 1.2], [0.0, 0.1], [-1.5, 0.3, 0.2, 2.0]]
LAGS = [[0, 0, 0], [3, 1], [2, 2, 2, 2]]
SIGNS = [1.0, -0.5, 2.0]


def make_columns(x=X, lags=LAGS, signs=SIGNS, current=-2.5):
    flat = torch.tensor([value for row in x for value in row])
    sequence = torch.tensor([i for i, row in enumerate(x) for _ in row])
    return Columns(
        logprobs=torch.full_like(flat, current),
        behavior_logprobs=current - flat,
        proximal_logprobs=None,
        reference_logprobs=None,
        advantages=torch.tensor(signs)[sequence],
        normalizers=torch.full_like(flat, 1 / len(flat)),
        sequence=sequence,
        lag=torch.tensor([value for row in lags for value in row]),
        num_sequences=len(x),
    )


def measure(columns, loss=PRESETS["async_default"], entropy=0.7):
    return diagnose([columns], [policy_loss(columns, loss)[1]], entropy)


def size(weights):
    return sum(weights) ** 2 / (len(weights) * sum(weight**2 for weight in weights))


@pytest.mark.parametrize("name", sorted(name for name, loss in PRESETS.items() if not loss.needs_proximal))
def test_the_table_names_exactly_what_is_measured(name):
    loss = PRESETS[name] if not PRESETS[name].needs_reference else resolve(name, {"reference_kl": 0})
    metrics = measure(make_columns(), loss)
    assert list(metrics) == list(METRICS)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_mismatch_by_definition_and_split_by_lag():
    metrics = measure(make_columns(lags=[[0, 0, 0], [3, 0], [2, 2, 2, 2]]))
    # The 0 behind a 3 may have been sampled on keys and values of old weights: it measures neither.
    chosen = {"": list(chain(*X)), "_fresh": X[0], "_stale": [X[1][0], *X[2]]}
    for split, values in chosen.items():
        mean = {
            "k1": [-x for x in values],
            "k3": [math.exp(x) - 1 - x for x in values],
            "probability_gap": [abs(math.exp(-2.5) - math.exp(-2.5 - x)) for x in values],
        }
        for name, terms in mean.items():
            assert metrics[f"mismatch/{name}{split}"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        assert metrics[f"mismatch/ratio_max{split}"] == pytest.approx(math.exp(max(values)), rel=1e-5)
        assert metrics[f"mismatch/ratio_min{split}"] == pytest.approx(math.exp(min(values)), rel=1e-5)


def test_a_split_without_tokens_is_nan_and_raises_no_alarm():
    metrics = measure(make_columns(lags=[[0] * len(row) for row in X], x=[[0.0] * len(row) for row in X]))
    assert math.isnan(metrics["mismatch/k3_stale"])
    assert metrics["mismatch/k3_fresh"] == 0
    assert alarms(metrics, []) == {}


def test_sample_sizes_are_of_unclipped_weights():
    metrics = measure(make_columns(), PRESETS["tis2"])
    weights = [math.exp(x) for row in X for x in row]
    assert metrics["ess/token"] == pytest.approx(size(weights), rel=1e-5)
    assert metrics["ess/token_capped"] == pytest.approx(size([min(weight, 2) for weight in weights]), rel=1e-5)
    assert metrics["ess/sequence"] == pytest.approx(size([math.exp(sum(row)) for row in X]), rel=1e-5)
    assert metrics["ess/chi2"] == pytest.approx(sum((w - 1) ** 2 for w in weights) / len(weights), rel=1e-5)
    assert metrics["ess/token"] < metrics["ess/token_capped"]


def test_a_weight_that_is_dropped_counts_as_0():
    metrics = measure(make_columns(), resolve("tis2", {"policy_outside": "drop", "policy_cap": 1.2}))
    weights = [math.exp(x) for row in X for x in row]
    assert any(weight > 1.2 for weight in weights)
    in_use = size([weight if weight <= 1.2 else 0 for weight in weights])
    assert metrics["ess/token_capped"] == pytest.approx(in_use, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20), st.integers(1, 40))
def test_the_token_sample_size_is_a_share_and_does_not_see_repetition(log_ratios, times):
    once = measure(make_columns([log_ratios], [[0] * len(log_ratios)], [1.0]))["ess/token"]
    many = measure(make_columns([log_ratios] * times, [[0] * len(log_ratios)] * times, [1.0] * times))["ess/token"]
    assert 1 / len(log_ratios) - 1e-9 <= once <= 1 + 1e-9
    assert many == pytest.approx(once, rel=1e-6)


def test_sequences_too_long_for_their_product_still_have_a_sample_size():
    metrics = measure(make_columns([[1.0] * 2000, [1.0] * 2000], [[0] * 2000] * 2, [1.0, -1.0]))
    assert metrics["ess/sequence"] == pytest.approx(1)


def test_clipping_is_counted_by_sign_and_weighed():
    loss = Loss(policy_weight="token", policy_cap=2.0, guard="veto", guard_low=0.3, trust="ratio", trust_high=2.0)
    metrics = measure(make_columns(), loss)
    weights = [[min(math.exp(x), 2) * abs(a) for x in row] for row, a in zip(X, SIGNS, strict=True)]
    left = [weights[0][0], weights[0][1], *weights[1]]  # 1.2 leaves the trust range; -1.5 vetoes its sequence
    assert metrics["clip/capped_positive"] == pytest.approx(2 / 9)
    assert metrics["clip/trust_positive"] == pytest.approx(2 / 9)
    assert metrics["clip/guard_positive"] == pytest.approx(4 / 9)
    assert metrics["clip/capped_negative"] == metrics["clip/trust_negative"] == metrics["clip/guard_negative"] == 0
    assert metrics["clip/removed_share"] == pytest.approx(1 - sum(left) / sum(chain(*weights)), rel=1e-5)
    assert metrics["clip/positive_share"] == pytest.approx(sum(left[:2]) / sum(left), rel=1e-5)
    assert metrics["clip/top_share"] == pytest.approx(max(left) / sum(left), rel=1e-5)
    negated = measure(make_columns(signs=[-0.1, 0.5, -0.1]), Loss(policy_weight="token", policy_cap=2.0))
    assert negated["clip/capped_negative"] == pytest.approx(2 / 9)


def test_lag_and_policy():
    metrics = measure(make_columns(), entropy=0.25)
    assert metrics["lag/mean"] == pytest.approx(12 / 9)
    assert metrics["lag/p95"] == metrics["lag/max"] == 3
    assert metrics["lag/span"] == 2
    shares = [metrics[f"lag/share_{name}"] for name in (0, 1, 2, 3, 4, "more")]
    assert sum(shares) == pytest.approx(1)
    assert sum(lag * share for lag, share in enumerate(shares)) == pytest.approx(12 / 9)
    assert metrics["policy/entropy"] == 0.25
    assert metrics["policy/advantage_mean"] == pytest.approx(2.5 / 3)
    assert metrics["policy/advantage_std"] == pytest.approx(math.sqrt(5.25 / 3 - (2.5 / 3) ** 2), rel=1e-5)
    assert metrics["policy/logprob_positive"] == metrics["policy/logprob_negative"] == -2.5


def test_the_distance_to_a_reference_is_measured_where_there_is_one():
    columns = make_columns()
    away = [1.0, -1.0] + [0.0] * 7
    metrics = measure(replace(columns, reference_logprobs=columns.logprobs - torch.tensor(away)))
    assert list(metrics) == [*METRICS, *WITH_REFERENCE]
    assert metrics["policy/kl_reference"] == pytest.approx((math.exp(-1) + math.exp(1) - 2) / 9)


def test_percentiles_and_the_top_share_are_taken_over_all_tokens():
    columns = make_columns([[i / 1000 for i in range(1, 2001)]], [list(range(2000))], [1.0])
    metrics = measure(columns, PRESETS["reinforce"])
    assert metrics["clip/top_share"] == pytest.approx(0.01)
    assert metrics["mismatch/ratio_p999"] == pytest.approx(math.exp(1.998), rel=1e-5)
    assert metrics["lag/p95"] == 1899
    assert metrics["lag/share_more"] == pytest.approx(1 - metrics["lag/share_0"] * 5)


def test_micro_batches_together_are_the_batch():
    whole = measure(make_columns())
    parts = [make_columns(X[i : i + 1], LAGS[i : i + 1], SIGNS[i : i + 1]) for i in range(3)]
    for part in parts:
        part.normalizers.fill_(1 / 9)
    outcomes = [policy_loss(part, PRESETS["async_default"])[1] for part in parts]
    assert diagnose(parts, outcomes, 0.7) == pytest.approx(whole, rel=1e-6)


def test_tokens_that_are_not_finite_are_counted_and_left_out():
    clean = measure(make_columns([[0.5, -0.4], [0.1]], [[0, 0], [1]], [1.0, -1.0]), PRESETS["tis2"])
    bad = measure(make_columns([[0.5, -0.4], [0.1], [math.inf]], [[0, 0], [1], [1]], [1.0, -1.0, 1.0]), PRESETS["tis2"])
    assert clean["policy/nonfinite"] == 0
    assert bad["policy/nonfinite"] == 1
    for name in ("mismatch/k3", "mismatch/ratio_max", "ess/token", "ess/sequence", "ess/chi2"):
        assert bad[name] == pytest.approx(clean[name])
    assert "1 tokens" in alarms(bad, [])["policy/nonfinite"]


CALM = {
    "policy/nonfinite": 0.0,
    "ess/token": 0.99,
    "ess/sequence": 0.5,
    "mismatch/k3": 1e-3,
    "mismatch/k3_fresh": 5e-4,
    "clip/removed_share": 0.1,
    "clip/positive_share": 0.5,
    **{f"clip/{mask}_{sign}": 0.05 for mask in ("trust", "guard") for sign in ("positive", "negative")},
    "policy/advantage_mean": 0.0,
    "policy/advantage_std": 0.4,
}
FLAT = {**CALM, "policy/advantage_std": 0.0}


@pytest.mark.parametrize(
    ("change", "history", "expected"),
    [
        ({}, [CALM] * 3, None),
        ({"ess/token": 0.85}, [], "ess/token is 0.850"),
        ({"ess/sequence": 0.05}, [CALM], "ess/sequence fell from 0.500 to 0.050"),
        ({"ess/sequence": 0.05}, [], None),
        ({"ess/sequence": 0.05}, [CALM] + [{**CALM, "ess/sequence": 0.1}] * 20, None),
        ({"ess/sequence": 0.2}, [{**CALM, "ess/sequence": 0.9}], None),
        ({"ess/sequence": 0.05}, [{**CALM, "ess/sequence": math.nan}, CALM], "ess/sequence fell from 0.500"),
        ({"mismatch/k3": 0.04}, [], None),  # as a healthy run has it with a staleness of 4
        ({"mismatch/k3": 0.06}, [], "mismatch/k3 is 0.0600, above 0.05"),
        ({"mismatch/k3": 0.06, "mismatch/k3_fresh": math.nan}, [], "mismatch/k3 is 0.0600"),
        ({"mismatch/k3": 0.06, "mismatch/k3_fresh": 0.038}, [], "mismatch/k3_fresh is 0.0380, above 0.01"),
        ({"policy/nonfinite": 3.0}, [], "3 tokens"),
        ({"clip/removed_share": 0.79}, [], None),
        ({"clip/removed_share": 1.0, "clip/positive_share": 0.0}, [], "clip/removed_share is 1.00, above 0.8"),
        ({"clip/removed_share": 0.5, "clip/positive_share": 1.0}, [], "clip/removed_share is 0.50, .* no negative adv"),
        ({"clip/removed_share": 0.5, "clip/positive_share": 0.0}, [], "clip/removed_share is 0.50, .* no positive adv"),
        ({"clip/removed_share": 0.15, "clip/positive_share": 0.0}, [], None),
        (  # rewards above 0 without a baseline
            {"clip/removed_share": 0.5, "clip/positive_share": 1.0, "clip/trust_negative": 0, "clip/guard_negative": 0},
            [],
            None,
        ),
        (FLAT, [CALM, *[FLAT] * 9], "every advantage was 0 in 10 steps in a row, so that rewards teach nothing"),
        (
            FLAT | {"reward/zero_variance": 0.5},
            [FLAT] * 9,
            "every advantage was 0 in 10 steps in a row, though rewards",
        ),
        (FLAT, [FLAT] * 8, None),
        (FLAT, [*[FLAT] * 20, CALM, *[FLAT] * 8], None),
        (CALM, [FLAT] * 9, None),
        ({**FLAT, "policy/advantage_mean": -1.0}, [FLAT] * 9, None),  # without a baseline
    ],
)
def test_alarms(change, history, expected):
    found = alarms({**CALM, **change}, history)
    assert len(found) == (expected is not None)
    if expected is not None:
        assert re.match(expected, next(iter(found.values())))


@pytest.mark.parametrize("preset", ["gspo", "seq_mask_tis"])
def test_ratios_that_a_narrow_band_does_not_bear_are_an_alarm(preset):
    columns = make_columns([[-0.05] * 20] * 2, [[0] * 20] * 2, [1.0, -1.0])
    metrics = measure(replace(columns, proximal_logprobs=columns.logprobs), PRESETS[preset])
    assert "clip/removed_share" in alarms(metrics, [])
    assert "clip/removed_share" not in alarms(measure(columns), [])
