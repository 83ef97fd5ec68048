"""Advantages and normalisers against their definitions, group by group."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from asyncrl.algo.advantage import advantages, estimate, normalizers, overlong_punishment
from asyncrl.algo.loss_spec import Loss
from asyncrl.algo.presets import PRESETS

LENGTHS = torch.tensor([3, 1, 4, 1, 5])
CENTERS, SCALES = ("mean", "loo", "batch", "none"), ("none", "group_std", "batch_std", "token_std")


@st.composite
def batches(draw):
    """Rewards, group names and lengths of 1 to 5 groups of 2 to 6 trajectories, in shuffled order."""
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=5))
    names = draw(st.lists(st.integers(0, 10**6), min_size=len(sizes), max_size=len(sizes), unique=True))
    groups = draw(st.permutations([name for name, size in zip(names, sizes, strict=True) for _ in range(size)]))
    eighths = st.integers(-16, 16).map(lambda number: number / 8)
    rewards = draw(st.lists(eighths, min_size=len(groups), max_size=len(groups)))
    lengths = draw(st.lists(st.integers(1, 9), min_size=len(groups), max_size=len(groups)))
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), torch.tensor(lengths)


def centered(reward, others, center):
    if center == "none":
        return reward
    peers = others if center == "loo" else [*others, reward]
    return reward - sum(peers) / len(peers)


@settings(deadline=None, max_examples=40)
@given(batches(), st.sampled_from(CENTERS), st.sampled_from(SCALES))
@example((torch.full((2,), 0.125, dtype=torch.float64), torch.zeros(2, dtype=int), torch.ones(2)), "none", "batch_std")
def test_advantages_follow_their_definition(batch, center, scale):
    rewards, groups, lengths = batch
    assume(scale != "group_std" or center not in ("batch", "none"))  # which `Loss` refuses
    expected = []
    for i, reward in enumerate(rewards.tolist()):
        others = [rewards[j].item() for j in range(len(rewards)) if groups[j] == groups[i] and j != i]
        if center == "batch":
            others = [rewards[j].item() for j in range(len(rewards)) if j != i]
        expected.append(centered(reward, others, center))
    for i in range(len(rewards)) if scale == "group_std" else ():
        group = rewards[groups == groups[i]]
        expected[i] /= math.sqrt((group - group.mean()).square().sum().item() / (len(group) - 1)) + 1e-6
    expected = torch.tensor(expected, dtype=torch.float64)
    if scale == "token_std":
        of_tokens = expected.repeat_interleave(lengths.long())
        expected = (expected - of_tokens.mean()) / (of_tokens.std() + 1e-6) if len(of_tokens) > 1 else 0 * expected
    spread = expected.std()
    if scale == "batch_std" and spread > 0:  # equal ones have no spread to be measured in
        expected = expected / (spread + 1e-6)
    torch.testing.assert_close(advantages(rewards, groups, lengths, center, scale), expected, rtol=1e-9, atol=1e-7)


@settings(deadline=None, max_examples=25)
@given(batches(), st.sampled_from(CENTERS[:3]), st.sampled_from(SCALES), st.integers(-80, 80))
def test_a_constant_shift_of_the_rewards_changes_nothing(batch, center, scale, shift):
    rewards, groups, lengths = batch
    shifted = advantages(rewards + shift / 8, groups, lengths, center, scale)
    assert torch.equal(shifted, advantages(rewards, groups, lengths, center, scale))


@pytest.mark.parametrize("center", CENTERS[:2])
@pytest.mark.parametrize("scale", SCALES[:3])
def test_equal_rewards_have_an_advantage_of_exactly_zero(center, scale):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0])
    values = advantages(rewards, torch.tensor([4, 4, 4, 2, 2]), LENGTHS[:5], center, scale)
    assert values.dtype == torch.float32
    assert values[:3].tolist() == [0.0, 0.0, 0.0]
    assert values[3] < 0 < values[4]


def test_leave_one_out_refuses_a_group_of_one():
    rewards, groups = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="at least 2 trajectories in each group, got a group of 1"):
        advantages(rewards, groups, LENGTHS[:3], "loo", "none")
    assert advantages(rewards, groups, LENGTHS[:3], "mean", "group_std")[2] == 0


def test_normalizers_follow_their_definition():
    lengths, groups = torch.tensor([1, 3, 4, 2]), torch.tensor([7, 7, 5, 7])
    expected = {
        "token": [1 / 10] * 4,
        "seq_mean": [1 / 4, 1 / 12, 1 / 16, 1 / 8],
        "seq_sum": [1 / 4] * 4,
        "prompt": [1 / 12, 1 / 12, 1 / 8, 1 / 12],
        "constant": [1 / 80] * 4,
    }
    for aggregate, values in expected.items():
        torch.testing.assert_close(normalizers(aggregate, lengths, groups, 20), torch.tensor(values))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.sampled_from(("token", "seq_mean", "prompt")))
def test_the_factors_of_all_tokens_sum_to_one(lengths, aggregate):
    counts = torch.tensor(lengths)
    factors = normalizers(aggregate, counts, torch.arange(len(lengths)) // 3, 50)
    assert (factors * counts).sum().item() == pytest.approx(1, abs=1e-5)


def test_a_trajectory_without_trained_tokens_is_refused():
    with pytest.raises(RuntimeError, match="without trained tokens"):
        normalizers("token", torch.tensor([3, 0]), torch.tensor([0, 0]), 8)


def best_of_group(rewards, groups):
    """An advantage as a user would write it: 1 for the best of each group."""
    best = {name: rewards[groups == name].max() for name in groups.tolist()}
    return torch.stack([reward - best[name] for reward, name in zip(rewards, groups.tolist(), strict=True)]) + 1


def one_too_few(rewards, _groups):
    return rewards[1:]


def test_advantages_of_the_user():
    rewards, groups = torch.tensor([1.0, 0.0, 0.5, 0.25]), torch.tensor([3, 3, 1, 1])
    assert estimate(rewards, groups, LENGTHS[:4], Loss(advantage=f"{__name__}:best_of_group")).tolist() == [
        1.0,
        0.0,
        1.0,
        0.75,
    ]
    assert torch.equal(
        estimate(rewards, groups, LENGTHS[:4], Loss(center="loo")),
        advantages(rewards, groups, LENGTHS[:4], "loo", "none"),
    )
    for function, message in {"one_too_few": r"shape \[4\]", "nothing": "no function 'nothing'"}.items():
        with pytest.raises(ValueError, match=message):
            estimate(rewards, groups, LENGTHS[:4], Loss(advantage=f"{__name__}:{function}"))
    with pytest.raises(ValueError, match="no module 'no_such_module'"):
        estimate(rewards, groups, LENGTHS[:4], Loss(advantage="no_such_module:f"))


def test_the_overlong_punishment_falls_over_the_tail():
    """DAPO with L = 20 and a tail of 4: 0 up to 16 tokens, (16 - T) / 4 up to 20, -1 from there on."""
    lengths = torch.tensor([1, 16, 17, 18, 20, 25])
    assert overlong_punishment(lengths, 20, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


@pytest.mark.parametrize("scale", SCALES)
def test_one_value_has_no_deviation(scale):
    one = torch.tensor([0.5]), torch.tensor([0]), torch.tensor([1])
    assert advantages(*one, "mean", scale).tolist() == [0.0]
    assert advantages(*one, "none", scale if scale != "group_std" else "none").isfinite().all()


@pytest.mark.parametrize(("scale", "of_four"), [("group_std", 0.5), ("batch_std", 0.5), ("token_std", 0.5)])
def test_a_standard_deviation_divides_by_n_less_1_as_in_trl_verl_skyrl_and_areal(scale, of_four):
    """torch.std, which TRL, SkyRL and AReaL call, and verl's masked_whiten; `std_correction` 0 is of runs of 0.1."""
    rewards, groups, lengths = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=int), torch.ones(4, dtype=int)
    assert estimate(rewards, groups, lengths, Loss(scale=scale))[0].item() == pytest.approx(0.75 / of_four, rel=1e-4)
    before = estimate(rewards, groups, lengths, Loss(scale=scale, std_correction=0))[0].item()
    assert before == pytest.approx(0.75 / math.sqrt(3 / 16), rel=1e-4)


SUM, ONE = 0.7 + 0.2 + 0.1, 1.0  # 0.9999999999999999


@pytest.mark.parametrize("center", CENTERS[:3])
@pytest.mark.parametrize("scale", SCALES)
def test_rewards_that_differ_by_rounding_are_equal(center, scale):
    rewards = torch.tensor([SUM, ONE, ONE, SUM, 1e-17, 0.1 + 0.2 - 0.3, 0, 0], dtype=torch.float64)
    groups = torch.arange(8) // 4
    if scale == "group_std" and center == "batch":
        return
    found = advantages(rewards[:4], groups[:4], LENGTHS[:4], center, scale)
    assert found.tolist() == [0.0] * 4
    assert advantages(rewards[4:], groups[4:], LENGTHS[:4], center, scale).tolist() == [0.0] * 4
    apart = torch.tensor([1.0, 1.0001], dtype=torch.float64)
    assert advantages(apart, groups[:2], LENGTHS[:2], center, scale)[1] > 0


def test_equal_rewards_without_a_baseline_stay_what_they_are():
    rewards = torch.ones(4)
    assert advantages(rewards, torch.tensor([1, 1, 2, 2]), LENGTHS[:4], "none", "batch_std").tolist() == [1.0] * 4


@pytest.mark.parametrize("preset", ["reinforce_pp", "reinforce_pp_baseline"])
def test_reinforce_pp_whitens_over_tokens(preset):
    """As equation 5 of 2501.03262 has it: long wrong answers count as often as they have tokens."""
    rewards, lengths = torch.tensor([1.0, 0.0] * 4), torch.tensor([100, 1000] * 4)
    found = estimate(rewards, torch.arange(8) // 2, lengths, PRESETS[preset])
    of_tokens = rewards.repeat_interleave(lengths)
    expected = (rewards - of_tokens.mean()) / of_tokens.std()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("center", CENTERS[:3])
def test_equal_rewards_of_a_batch_are_whitened_to_exactly_zero(center):
    found = advantages(torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1]), LENGTHS[:4], center, "token_std")
    assert found.tolist() == [0.0] * 4


@settings(deadline=None, max_examples=40)
@given(batches(), st.sampled_from(CENTERS), st.sampled_from(SCALES), st.data())
def test_attempts_without_a_reward_have_advantage_0_and_no_part_in_others(batch, center, scale, data):
    assume(scale != "group_std" or center in ("mean", "loo"))
    rewards, groups, lengths = batch
    known = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards))))
    if center == "loo":  # the only one of a group with a reward has nothing to be compared with
        known &= torch.tensor([int((known & (groups == group)).sum()) > 1 for group in groups])
    loss = Loss(center=center, scale=scale)
    found = estimate(torch.where(known, rewards, torch.nan), groups, lengths, loss)
    assert found[~known].eq(0).all()
    if known.any():
        alone = estimate(rewards[known], groups[known], lengths[known], loss)
        torch.testing.assert_close(found[known], alone)
