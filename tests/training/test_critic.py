"""PPO's critic: GAE against its sum, the value loss against its slope, what it learns, and a resume that has it."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import run, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_learner import folder, make_learner  # noqa: F401
from test_loop import small

from asyncrl.algo.gae import gae, value_losses
from asyncrl.config import loading as configuration
from asyncrl.driver import run as job
from asyncrl.models.loading import load_model
from asyncrl.monitor import metrics
from asyncrl.recovery import checkpoint
from asyncrl.training import forward
from asyncrl.training.critic import METRICS as CRITIC
from asyncrl.training.learner import Learner
from asyncrl.types import Trajectory

PPO = ("algorithm.preset=ppo", "critic.learning_rate=1e-2")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.sampled_from([(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (1.0, 0.0)]),
    st.integers(0, 10**6),
)
def test_gae_is_the_discounted_sum_of_the_errors_of_the_values(lengths, discounts, seed):
    gamma, lam = discounts
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, sum(lengths)))
    expected, start = [], 0
    for length in lengths:
        own = [*values[start : start + length], 0.0]  # nothing comes after the last token
        errors = [rewards[start + t] + gamma * own[t + 1] - own[t] for t in range(length)]
        expected += [sum((gamma * lam) ** k * errors[t + k] for k in range(length - t)) for t in range(length)]
        start += length
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    found = gae(torch.from_numpy(rewards), torch.from_numpy(values), sequence, gamma, lam)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_with_lambda_1_the_value_cancels_and_the_return_is_left():
    rewards, values = torch.tensor([0.0, 0.0, 1.0, -2.0]), torch.tensor([0.3, 0.2, 0.7, 0.1])
    found = gae(rewards, values, torch.tensor([0, 0, 0, 1]), 1.0, 1.0)
    torch.testing.assert_close(found + values, torch.tensor([1.0, 1.0, 1.0, -2.0]))


def test_the_value_loss_by_finite_differences():
    torch.manual_seed(0)
    values, old, returns = torch.randn(3, 60, dtype=torch.float64) * torch.tensor([[0.6], [0.6], [1.0]])
    leaf = values.clone().requires_grad_()
    losses, clipped = value_losses(leaf, old, returns, 0.2)
    losses.sum().backward()
    for t in range(60):
        shift = torch.zeros(60, dtype=torch.float64)
        shift[t] = 1e-6
        up, down = (value_losses(values + sign * shift, old, returns, 0.2)[0].sum() for sign in (1, -1))
        assert float(leaf.grad[t]) == pytest.approx(float((up - down) / 2e-6), abs=1e-6)
    assert 0 < clipped.sum() < 60
    assert (leaf.grad[clipped] == 0).all()
    assert (leaf.grad[~clipped] != 0).all()
    assert torch.equal(value_losses(values, old, returns, 0.0)[0], (values - returns).square() / 2)


def with_tool_output(item: Trajectory) -> Trajectory:
    """Two tokens in the middle of the reply were not sampled."""
    mask = item.mask.copy()
    mask[-4:-2] = False
    return replace(item, mask=mask)


def test_the_advantages_of_a_step_are_those_of_its_sampled_tokens(folder, monkeypatch):  # noqa: F811
    """With values from a table by position, in several turns, packed in several micro-batches."""
    learner = make_learner(folder, *PPO, "algorithm.loss.scale=none", "learner.micro_batch_tokens=1")
    seen = []
    monkeypatch.setattr(learner._critic, "values", lambda part: part.targets / 25)
    monkeypatch.setattr(learner._critic, "update", lambda _parts, _old, returns: seen.extend(returns) or {})
    backward = learner._backward
    parts = []
    monkeypatch.setattr(learner, "_backward", lambda part, bound: parts.append(part) or backward(part, bound))
    groups = [[with_tool_output(trajectory(3, 8, seed=i, reward=float(i))) for i in range(9)]]
    learner.step(groups)
    assert len(parts) > 1
    for item in groups[0]:
        values = [*(item.token_ids[item.mask] / 25), 0.0]
        errors = [values[t + 1] - values[t] + (item.reward if t == 5 else 0) for t in range(6)]
        wanted = [sum(0.95**k * errors[t + k] for k in range(6 - t)) for t in range(6)]
        (part,) = [p for p in parts if item.token_ids[item.mask].tolist() in p.targets.reshape(-1, 6).tolist()]
        at = part.targets.reshape(-1, 6).tolist().index(item.token_ids[item.mask].tolist())
        assert part.advantages.reshape(-1, 6)[at].tolist() == pytest.approx(wanted, abs=1e-5)
    assert sum(len(returns) for returns in seen) == 54


@pytest.mark.parametrize("backbone", ["own", "policy"])
def test_a_critic_learns_which_prompts_are_rewarded(folder, backbone):  # noqa: F811
    """And the policy's weights move by the policy loss alone: with its learning rate at 0 they stay as they are."""
    words = [*PPO, f"critic.backbone={backbone}", "learner.learning_rate=0", "critic.clip=0", "critic.num_updates=4"]
    learner = make_learner(folder, *words)
    before = copy.deepcopy(learner.model.state_dict())
    groups = [[trajectory(5, 4, seed=g, reward=float(g % 2)) for _ in range(2)] for g in range(4)]
    rows = [learner.step(groups) for _ in range(12)]
    assert set(CRITIC) <= set(rows[0])
    assert rows[0]["critic/value_mean"] == 0
    assert rows[-1]["critic/loss"] < 0.4 * rows[0]["critic/loss"]
    assert rows[-1]["critic/explained_variance"] > 0.5 > rows[0]["critic/explained_variance"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())


def test_the_policy_waits_for_the_warm_up_of_its_critic(folder):  # noqa: F811
    learner = make_learner(
        folder, *PPO, "critic.warmup_steps=2", "learner.warmup_steps=2", "learner.learning_rate=1e-3"
    )
    groups = [[trajectory(4, 5, seed=i, reward=float(i % 2)) for i in range(4)]]
    rates = [learner.step(groups)["gradient/learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0, 0, 5e-4, 1e-3, 1e-3])


def test_equal_rewards_teach_a_critic(folder):  # noqa: F811
    learner = make_learner(folder, *PPO, "algorithm.loss.scale=none")
    metrics_ = learner.step([[trajectory(4, 5, seed=i, reward=1.0) for i in range(4)]])
    assert metrics_["policy/advantage_mean"] > 0
    assert math.isnan(learner.step([[trajectory(4, 1, seed=0, reward=1.0)]])["critic/explained_variance"])


def test_a_truncated_trajectory_can_be_masked(folder):  # noqa: F811
    cut = replace(trajectory(4, 5, seed=1, reward=1.0), finish="length")
    for finish, advantage in {"length": 0.0, "stop": 1.0}.items():
        learner = make_learner(
            folder, *PPO, "algorithm.mask_truncated=true", "algorithm.loss.scale=none", "critic.lam=1"
        )
        metrics_ = learner.step([[replace(cut, finish=finish)]])
        assert metrics_["policy/advantage_mean"] == advantage
        assert metrics_["critic/loss"] == 0.5


@pytest.mark.parametrize("backbone", ["own", "policy"])
def test_a_saved_critic_goes_on_exactly(folder, backbone):  # noqa: F811
    words = [*PPO, f"critic.backbone={backbone}"]
    groups = [[trajectory(4, 5, seed=i, reward=float(i % 2)) for i in range(4)]]
    first, second = make_learner(folder, *words), make_learner(folder, *words)
    first.step(groups)
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()}, version=1)
    one, other = (learner.step(groups) for learner in (first, second))
    assert {name: one[name] for name in CRITIC} == {name: other[name] for name in CRITIC}
    state = second.state()
    assert state.keys() == first.state().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state().items())


def test_a_critic_of_other_settings_is_refused_on_resume(folder):  # noqa: F811
    head_only = make_learner(folder, *PPO, "critic.backbone=policy")
    head_only.step([[trajectory(4, 5, seed=i, reward=float(i % 2)) for i in range(4)]])
    with pytest.raises(ValueError, match="another one than the configured: only one of them has backbone"):
        make_learner(folder, *PPO).load_state(head_only.state(), version=1)


def saved(result):
    """Everything that the learner of a run ended with."""
    folder = checkpoint.latest(result.folder / "checkpoints")  # noqa: F811
    return load_file(folder / "model.safetensors") | checkpoint.load_optimizer(folder)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    words = [*PPO, "buffer.max_staleness=0", "learner.learning_rate=1e-3"]
    unbroken = run(job.train(small(tmp_path, *words), quiet=True))
    first = run(job.train(small(tmp_path, *words, "num_steps=2"), quiet=True))
    second = run(job.train(small(tmp_path, *words), first.folder, quiet=True))
    one, other = saved(unbroken), saved(second)
    assert {name for name in one if name.startswith("critic.head")} > {"critic.head.weight.exp_avg"}
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [row for row in metrics.read(second.folder) if "reward/mean" in row]
    assert all(set(CRITIC) <= set(row) for row in rows)


def test_the_settings_that_a_critic_refuses():
    for words, message in {
        ("learner.num_gpus=2",): "a critic is not split between learner ranks: learner.num_gpus is 2",
        ("critic.backbone=policy", "critic.path=some/model"): "leave critic.path empty",
        ("algorithm.drop_zero_variance=true",): "with a critic equal rewards do teach",
        ("critic.lam=1.5",): "critic.lam must be from 0 to 1, got 1.5",
        ("algorithm.loss.scale=group_std",): "gives each token an advantage of its own",
    }.items():
        with pytest.raises(ValueError, match=message):
            configuration.load(None, ["algorithm.preset=ppo", *words])
    assert configuration.load(None, ["algorithm.preset=ppo", "rollout.group_size=1"]).loss.needs_critic


@pytest.mark.parametrize("able", [("varlen", "sdpa"), ("sdpa", "varlen")])
def test_a_critic_of_another_kind_sees_the_rows_that_the_policy_has(folder, monkeypatch, able):  # noqa: F811
    """By a mask of its own beside segments; and by a mask where prompts are shared, whatever else it can."""
    kinds = iter(able)

    def use(_model, wanted, _device, **_):
        kind = next(kinds)
        return "sdpa" if wanted == "sdpa" else kind

    monkeypatch.setattr(forward, "use_attention", use)
    learner = make_learner(folder, *PPO)
    assert (learner.attention, learner._critic._varlen) == (able[0], False)


def test_a_trajectory_longer_than_the_critics_window_is_refused(folder):  # noqa: F811
    policy, critic = (load_model(folder, dtype=torch.float32, device="cpu") for _ in range(2))
    critic.config.sliding_window, critic.config.layer_types = 8, ["sliding_attention"] * 2
    learner = Learner(configuration.load(None, list(PPO)), policy, 64, critic=critic)
    with pytest.raises(ValueError, match="a trajectory has 9 tokens and the model's sliding attention window is 8"):
        learner.step([[trajectory(4, 5, seed=0)]])


def test_a_backbone_of_its_own_must_be_given(folder):  # noqa: F811
    config = configuration.load(None, list(PPO))
    with pytest.raises(RuntimeError, match="none was given"):
        Learner(config, load_model(folder, dtype=torch.float32, device="cpu"), 64)
