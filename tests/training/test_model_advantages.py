"""KL to the reference in the reward: against its formula, by token and by trajectory, however they are packed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import trajectory
from test_learner import folder, make_learner  # noqa: F401

from asyncrl.algo.advantage import advantages
from asyncrl.algo.gae import gae
from asyncrl.algo.presets import PRESETS, resolve
from asyncrl.config.schema import CriticConfig
from asyncrl.training.model_advantages import shape
from asyncrl.training.packing import pack
from asyncrl.training.sharding import Ranks

TAU = 0.3
ESTIMATES = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: np.exp(-x) - 1 + x,
}


def make_groups():
    return [[trajectory(4, 3 + 2 * i, seed=10 * g + i, reward=float(i % 2)) for i in range(3)] for g in range(2)]


def shaped(learner, groups, monkeypatch):
    """What reaches the loss: by the tokens of a trajectory, its log-probs under the reference and its advantages."""
    seen, backward = {}, learner._backward

    def spy(part, bound):
        for number in range(part.num_sequences):
            mine = part.sequence == number
            key = tuple(part.targets[mine].tolist())
            seen[key] = (part.reference_logprobs[mine].double().numpy(), part.advantages[mine].double().numpy())
        return backward(part, bound)

    monkeypatch.setattr(learner, "_backward", spy)
    metrics = learner.step(groups)
    flat = [item for group in groups for item in group]
    return [seen[tuple(item.token_ids[item.mask].tolist())] for item in flat], flat, metrics


@pytest.mark.parametrize("estimator", ESTIMATES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 100_000])
def test_advantages_of_charged_rewards_follow_the_formula(folder, monkeypatch, estimator, level, micro_batch_tokens):  # noqa: F811
    words = [f"algorithm.loss.reward_kl={TAU}", f"algorithm.loss.reward_kl_estimator={estimator}"]
    words += [f"algorithm.loss.reward_kl_level={level}", f"learner.micro_batch_tokens={micro_batch_tokens}"]
    learner = make_learner(folder, *words)
    found, flat, metrics = shaped(learner, make_groups(), monkeypatch)
    kl = [
        ESTIMATES[estimator](item.logprobs[item.mask].astype(float) - reference)
        for item, (reference, _) in zip(flat, found, strict=True)
    ]
    assert metrics["reward/kl"] == pytest.approx(np.concatenate(kl).mean(), rel=1e-4)
    assert metrics["reward/kl"] != 0
    rewards = np.array([item.reward for item in flat])
    if level == "sequence":
        rewards = rewards - TAU * np.array([values.sum() for values in kl])
    base = advantages(torch.tensor(rewards), torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(6), "mean", "none").numpy()
    ahead = [-TAU * values[::-1].cumsum()[::-1] for values in kl]
    center = np.concatenate(ahead).mean()
    for number, (_, advantage) in enumerate(found):
        expected = base[number] + (ahead[number] - center if level == "token" else 0 * ahead[number])
        np.testing.assert_allclose(advantage, expected, rtol=2e-4, atol=2e-4)


def test_with_a_critic_each_token_is_charged_in_its_own_reward(folder, monkeypatch):  # noqa: F811
    words = ["algorithm.preset=ppo", "algorithm.loss.scale=none", f"algorithm.loss.reward_kl={TAU}"]
    found, flat, _ = shaped(make_learner(folder, *words), make_groups(), monkeypatch)
    for item, (reference, advantage) in zip(flat, found, strict=True):
        rewards = torch.from_numpy(-TAU * (item.logprobs[item.mask].astype(float) - reference))
        rewards[-1] += item.reward
        values = torch.zeros_like(rewards)  # those of a critic that has learnt nothing
        expected = gae(rewards, values, torch.zeros(len(rewards), dtype=torch.long), 1.0, 0.95)
        np.testing.assert_allclose(advantage, expected, rtol=2e-4, atol=2e-4)


def charged(groups, preset, micro_batch_tokens=10_000, **fields):
    """Advantages of every token, in order of the trajectories, against a reference that gives each token -0.5."""
    loss = resolve(preset, fields)
    batch = pack(groups, loss, row_tokens=40, micro_batch_tokens=micro_batch_tokens, max_new_tokens=9)
    parts, _ = shape(
        batch,
        list(batch.micro_batches),
        loss,
        CriticConfig(),
        reference=lambda part: (torch.full_like(part.advantages, -0.5), part.advantages),
        critic=None,
        ranks=Ranks(),
    )
    found = {
        int(part.members[i]): part.advantages[part.sequence == i] for part in parts for i in range(len(part.members))
    }
    return [found[number] for number in range(len(batch.rewards))]


def times(groups, factor):
    return [[replace(item, reward=item.reward * factor) for item in group] for group in groups]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("preset", ["grpo", "scalerl", "reinforce_pp", "reinforce_pp_baseline"])
def test_rewards_and_charges_that_grow_alike_change_no_scaled_advantage(preset, level):
    once = charged(make_groups(), preset, reward_kl=0.1, reward_kl_level=level)
    more = charged(times(make_groups(), 10), preset, reward_kl=1.0, reward_kl_level=level)
    torch.testing.assert_close(torch.cat(more), torch.cat(once), rtol=1e-4, atol=1e-4)
    assert torch.cat(once).std() > 0.1
    apart = charged(make_groups(), preset, micro_batch_tokens=1, reward_kl=0.1, reward_kl_level=level)
    torch.testing.assert_close(torch.cat(apart), torch.cat(once), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["group_std", "batch_std"])
def test_a_scale_divides_rewards_and_charges_by_their_common_spread(scale):
    groups = make_groups()
    flat = [item for group in groups for item in group]
    rewards = torch.tensor([item.reward for item in flat], dtype=torch.float64)
    ahead = [-0.1 * (item.logprobs[item.mask].astype(float) + 0.5)[::-1].cumsum()[::-1] for item in flat]
    found = charged(groups, "async_default", reward_kl=0.1, scale=scale)
    members = [[0, 1, 2], [3, 4, 5]] if scale == "group_std" else [[*range(6)]]
    for chosen in members:
        tokens = np.concatenate([ahead[i] for i in chosen])
        spread = np.sqrt(rewards[chosen].var().item() + tokens.var(ddof=1))
        for i in chosen:
            expected = (rewards[i].item() - 1 / 3 + ahead[i] - tokens.mean()) / spread
            np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["grpo", "scalerl", "reinforce_pp"])
def test_charges_of_equal_rewards_stay_of_the_order_of_one(preset):
    """A group that is solved throughout, and one whose replies are the same to the last token."""
    groups = times(make_groups(), 0.0)
    groups.append([groups[0][0]] * 3)
    found = torch.cat(charged(groups, preset, reward_kl=0.01))
    assert 0.1 < found.abs().max() < 10


def test_reinforce_pp_with_its_kl_is_the_published_advantage():
    """2501.03262, equations 4 and 5: r - beta times the KL ahead, whitened over all tokens of the batch."""
    groups = make_groups()
    flat = [item for group in groups for item in group]
    kl = [item.logprobs[item.mask].astype(float) + 0.5 for item in flat]
    plain = [item.reward - 0.1 * values[::-1].cumsum()[::-1] for item, values in zip(flat, kl, strict=True)]
    tokens = np.concatenate(plain)
    found = torch.cat(charged(groups, "reinforce_pp", reward_kl=0.1))
    np.testing.assert_allclose(found, (tokens - tokens.mean()) / tokens.std(ddof=1), rtol=1e-4, atol=1e-4)


def test_a_critics_advantages_are_white_over_all_micro_batches(folder, monkeypatch):  # noqa: F811
    words = ["algorithm.preset=ppo", f"algorithm.loss.reward_kl={TAU}", "learner.micro_batch_tokens=1"]
    found, *_ = shaped(make_learner(folder, *words), make_groups(), monkeypatch)
    tokens = np.concatenate([advantage for _, advantage in found])
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.std(ddof=1) == pytest.approx(1, abs=1e-4)


class Unknowing:
    """A critic that expects nothing and does not learn."""

    def values(self, part):
        return torch.zeros_like(part.advantages)

    def update(self, _parts, _values, _returns):
        return {}


@pytest.mark.parametrize("reward", [0.7, 0.1, 1 / 3])
def test_equal_advantages_of_a_critic_are_whitened_to_zero(reward):
    """The float32 mean of equal numbers is not that number."""
    groups = [[trajectory(4, 5, seed=seed, reward=reward) for seed in range(200)]]
    batch = pack(groups, PRESETS["ppo"], row_tokens=40, micro_batch_tokens=400, max_new_tokens=9)
    settings = CriticConfig(lam=1.0)
    parts = list(batch.micro_batches)
    found, _ = shape(batch, parts, PRESETS["ppo"], settings, reference=None, critic=Unknowing(), ranks=Ranks())
    assert len(found) > 1
    assert {part.advantages.dtype for part in found} == {torch.float32}
    assert max(float(part.advantages.abs().max()) for part in found) == 0


def test_the_loss_itself_has_no_kl_term_then(folder):  # noqa: F811
    """With advantages of 0 nothing is left of rewards that are equal and charged by the sequence."""
    same = [trajectory(4, 5, seed=3, reward=1.0)] * 3
    words = ["algorithm.loss.reward_kl=1", "algorithm.loss.reward_kl_level=sequence"]
    metrics = make_learner(folder, *words).step([same])
    assert metrics["reward/kl"] != 0
    assert metrics["gradient/norm"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "words", [["algorithm.loss.reward_kl_level=token"], ["algorithm.loss.reward_kl_level=sequence"]]
)
@pytest.mark.parametrize("preset", ["grpo", "ppo"])
def test_an_attempt_without_a_reward_teaches_nothing_and_breaks_nothing(folder, monkeypatch, words, preset):  # noqa: F811
    groups = make_groups()
    groups[0][1] = replace(groups[0][1], reward=float("nan"))
    learner = make_learner(folder, f"algorithm.preset={preset}", f"algorithm.loss.reward_kl={TAU}", *words)
    found, _, metrics = shaped(learner, groups, monkeypatch)
    advantages_found = [advantage for _, advantage in found]
    assert not advantages_found[1].any()
    assert all(np.isfinite(advantage).all() for advantage in advantages_found)
    assert any(advantage.any() for advantage in advantages_found)
    broken = [
        name for name, value in metrics.items() if name.startswith(("loss", "critic", "reward")) and math.isnan(value)
    ]
    assert not broken
