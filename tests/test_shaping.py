"""KL to the reference in the reward: against its formula, by token and by trajectory, however they are packed."""

import numpy as np
import pytest
import torch
from helpers import trajectory
from test_learner import folder, make_learner  # noqa: F401

from asyncrl.algo.advantage import advantages
from asyncrl.algo.gae import gae

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
    base = advantages(torch.tensor(rewards), torch.tensor([0, 0, 0, 1, 1, 1]), "mean", "none").numpy()
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


def test_the_loss_itself_has_no_kl_term_then(folder):  # noqa: F811
    """With advantages of 0 nothing is left of rewards that are equal and charged by the sequence."""
    same = [trajectory(4, 5, seed=3, reward=1.0)] * 3
    words = ["algorithm.loss.reward_kl=1", "algorithm.loss.reward_kl_level=sequence"]
    metrics = make_learner(folder, *words).step([same])
    assert metrics["reward/kl"] != 0
    assert metrics["gradient/norm"] == pytest.approx(0, abs=1e-6)
