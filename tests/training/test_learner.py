"""The learner on the tiny model: parity with the engine, invariance to packing, and a state that can be resumed."""

import asyncio
import copy
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import run, trajectory
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from asyncrl.algo.presets import PRESETS
from asyncrl.config import loading as configuration
from asyncrl.engines.embedded.engine import EmbeddedEngine
from asyncrl.envs.base import load_env
from asyncrl.models import loading as model_file
from asyncrl.models.loading import load_model, load_tokenizer, stop_token_ids
from asyncrl.models.tiny import build_tiny
from asyncrl.runtime.rollout_worker import Rollout
from asyncrl.training.flops import FlopCounter
from asyncrl.training.learner import Learner
from asyncrl.training.packing import pack
from asyncrl.types import Sampling

VOCABULARY, HIDDEN = 25, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_tiny(path, seed=3)
    return str(path)


def make_learner(folder, *words):
    model, reference, critic = (load_model(folder, dtype=torch.float32, device="cpu") for _ in range(3))
    return Learner(configuration.load(None, list(words)), model, 64, reference=reference, critic=critic)


def play(folder, temperature, num_groups=6):
    """Groups of variable length from the engine, on the weights in the folder."""

    async def body():
        model, tokenizer = load_model(folder, dtype=torch.float32, device="cpu"), load_tokenizer(folder)
        env = load_env("asyncrl.envs.digits:SortDigits", tokenizer, {})
        engine = EmbeddedEngine(model, max_running=16, max_length=64)
        sampling = Sampling(12, temperature, stop_token_ids=stop_token_ids(folder, tokenizer))
        rollout = Rollout(engine, env, sampling, group_size=4, seed=0)
        prompts = itertools.islice(env.prompts("train", 0), num_groups)
        groups = await asyncio.gather(*(rollout.run(prompt) for prompt in prompts))
        await rollout.close()
        return [group.trajectories for group in groups]

    return run(body())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_parity_the_learner_reproduces_the_engines_logprobs(folder, temperature):
    """At lag 0 in float32: catches a shifted log-prob, a forgotten temperature and positions that are not reset."""
    groups = play(folder, temperature)
    assert len({len(t.token_ids) for group in groups for t in group}) > 2, "lengths must vary for rows to be packed"
    learner = make_learner(folder, f"rollout.temperature={temperature}")
    batch = pack(groups, learner.loss, row_tokens=64, micro_batch_tokens=128, max_new_tokens=12)
    assert batch.fill > 0.7
    for part in batch.micro_batches:
        with torch.no_grad():
            logprobs, entropy = learner.score(part)
        assert (logprobs - part.behavior_logprobs).abs().max() < 1e-5
        assert (entropy > 0).all()


def test_parity_shows_in_the_metrics(folder):
    metrics = make_learner(folder, "rollout.max_new_tokens=12").step(play(folder, 1.0))
    assert metrics["mismatch/k3"] < 1e-9
    assert metrics["ess/token"] == pytest.approx(1, abs=1e-6)
    assert metrics["lag/max"] == 0


def scored_by(learner, groups):
    """The same trajectories with the log-probs that the learner itself gives them."""
    words = {"row_tokens": 64, "micro_batch_tokens": 16384, "max_new_tokens": 12}
    (part,) = pack(groups, learner.loss, **words).micro_batches
    with torch.no_grad():
        logprobs = learner.score(part)[0].numpy()
    flat = [trajectory for group in groups for trajectory in group]
    for place, member in enumerate(part.members.tolist()):
        own = flat[member].logprobs.copy()
        own[flat[member].mask] = logprobs[part.sequence.numpy() == place]
        flat[member] = replace(flat[member], logprobs=own)
    rest = iter(flat)
    return [list(itertools.islice(rest, len(group))) for group in groups]


def test_with_the_same_numerics_every_ratio_is_exactly_one(folder):
    """At lag 0 on a CPU in float32: the log-probs of the step are, to the bit, those that its batch came with."""
    learner = make_learner(folder, "rollout.max_new_tokens=12")
    metrics = learner.step(scored_by(learner, play(folder, 1.0)))
    assert metrics["mismatch/ratio_min"] == metrics["mismatch/ratio_max"] == 1
    assert metrics["mismatch/k1"] == metrics["mismatch/k3"] == 0
    assert metrics["ess/token"] == pytest.approx(1, abs=1e-12)  # a sum of logarithms rounds


def gradients(folder, groups, *words):
    learner = make_learner(folder, "learner.max_grad_norm=1e9", *words)
    learner.step(groups)
    return torch.cat([parameter.grad.flatten() for parameter in learner.model.parameters()])


def perturbed(item, number):
    """With a reward, and with log-probs that are a little off in some trajectories and far off in others."""
    noise = np.random.default_rng(number).normal(0, 0.002 if number % 3 else 0.5, len(item.logprobs))
    return replace(item, reward=float(number % 2), logprobs=(item.logprobs + noise).astype(np.float32))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_gradients_do_not_depend_on_packing_or_on_the_order_of_groups(folder, preset):
    groups = [[perturbed(item, 4 * g + i) for i, item in enumerate(group)] for g, group in enumerate(play(folder, 1.0))]
    words = [f"algorithm.preset={preset}", "buffer.max_staleness=0"]
    whole = gradients(folder, groups, *words, "learner.micro_batch_tokens=100000")
    small = gradients(folder, groups[::-1], *words, "learner.micro_batch_tokens=1")
    assert whole.norm() > 0
    assert torch.allclose(whole, small, atol=1e-6 * float(whole.abs().max()) + 1e-9, rtol=1e-3)


def of_one_prompt(num_new, seed, reward=0.0):
    item = trajectory(7, num_new, seed=seed, reward=reward)
    prompt = np.random.default_rng(0).integers(2, VOCABULARY, len(item.token_ids)).astype(np.int32)
    return replace(item, token_ids=np.where(item.mask, item.token_ids, prompt))


def packed(learner, group, **options):
    options = {"row_tokens": 64, "micro_batch_tokens": 9999, "max_new_tokens": 9} | options
    return pack([group], learner.loss, **options)


def test_a_shared_prompt_changes_no_logprob_and_no_gradient(folder):
    group = [of_one_prompt(n, seed=n, reward=float(n % 2)) for n in (1, 2, 5, 9)]
    learner, found = make_learner(folder), []
    for share in (True, False):
        batch = packed(learner, group, share_prompts=share)
        assert batch.num_inputs == sum(len(item.token_ids) - 1 for item in group) - 7 * 3 * share
        (part,) = batch.micro_batches
        learner.model.zero_grad()
        logprobs, _ = learner.score(part)
        (part.advantages * part.normalizers * logprobs).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in learner.model.parameters()])
        found.append((sorted(logprobs.tolist()), gradient))
    (one, gradient), (other, expected) = found
    assert one == pytest.approx(other, abs=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("share", [True, False])
def test_a_trajectory_has_no_influence_on_others_of_its_row(folder, share):
    group = [of_one_prompt(n, seed=n) for n in (3, 5, 8)]
    changed = [group[0], replace(group[1], token_ids=np.where(group[1].mask, 9, group[1].token_ids)), group[2]]
    learner, found = make_learner(folder), []
    for one in (group, changed):
        (part,) = packed(learner, one, share_prompts=share).micro_batches
        assert len(part.input_ids) == 1
        with torch.no_grad():
            logprobs = learner.score(part)[0]
        found.append([logprobs[part.sequence == number] for number in range(3)])
    same = [torch.equal(*pair) for pair in zip(*found, strict=True)]
    assert same == [True, False, True], "the middle of the row was changed, and only it may differ"


def test_an_entropy_bonus_alone_raises_entropy(folder):
    groups = [[trajectory(4, 6, seed=i, reward=0.0) for i in range(4)]]
    learner = make_learner(folder, "algorithm.loss.entropy_bonus=1.0", "learner.learning_rate=1e-3")
    entropies = [learner.step(groups)["policy/entropy"] for _ in range(8)]
    assert entropies[-1] > entropies[0]


def test_steps_raise_the_probability_of_what_was_rewarded(folder):
    good, bad = trajectory(4, 6, seed=1, reward=1.0), trajectory(4, 6, seed=2, reward=0.0)
    learner = make_learner(folder, "algorithm.preset=reinforce", "algorithm.allow_uncorrected=true")
    part = pack([[good, bad]], learner.loss, row_tokens=64, micro_batch_tokens=64, max_new_tokens=6).micro_batches[0]
    with torch.no_grad():
        before = learner.score(part)[0]
    for _ in range(5):
        learner.step([[good, bad]])
    with torch.no_grad():
        gain = learner.score(part)[0] - before
    assert gain[part.advantages > 0].mean() > 0 > gain[part.advantages < 0].mean()


def test_a_poor_sample_size_lowers_the_learning_rate(folder):
    learner = make_learner(folder, "algorithm.preset=vcpo", "learner.warmup_steps=0", "learner.learning_rate=1e-3")
    metrics = learner.step([[trajectory(4, 6, seed=i, reward=float(i % 2)) for i in range(4)]])
    assert 0 < metrics["ess/sequence"] < 0.9
    assert metrics["gradient/learning_rate"] == pytest.approx(1e-3 * metrics["ess/sequence"] ** 0.5)


def test_a_saved_state_goes_on_exactly(folder):
    groups = [[trajectory(4, 5, seed=i, reward=float(i % 2)) for i in range(4)]]
    first = make_learner(folder)
    first.step(groups)
    second = make_learner(folder)
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()}, version=1)
    for learner in (first, second):
        learner.step(groups)
    assert first.version == second.version == 2
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("words", [[], ["algorithm.preset=ppo", "critic.backbone=own"]])
def test_what_was_saved_before_the_first_step_goes_on(folder, words):
    learner, again = make_learner(folder, *words), make_learner(folder, *words)
    again.load_state(learner.state(), 0)
    batch = play(folder, 1.0)
    learner.step(batch), again.step(batch)
    for one, other in zip(learner.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_layers_are_compiled_once_for_all_shapes(folder, monkeypatch):
    """Lengths and numbers of rows and segments differ from step to step."""
    compile_module = nn.Module.compile
    eager = {"backend": "eager"}
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, **options, **eager))
    monkeypatch.setattr("asyncrl.training.head._compiled", lambda function: function)
    learner = make_learner(folder, "learner.compile=true", "learner.micro_batch_tokens=64")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_groups, num_new in ((2, 3), (5, 9), (3, 20), (9, 2)):
            learner.step(
                [
                    [trajectory(4, num_new, seed=10 * number + sample, reward=float(sample)) for sample in range(2)]
                    for number in range(num_groups)
                ]
            )
    assert learner.version == 4


def test_models_that_would_be_scored_wrongly_are_refused(folder, tmp_path):
    def made(change):
        model = load_model(folder, dtype=torch.float32, device="cpu")
        change(model)
        return Learner(configuration.load(None, []), model, 64)

    def biased(model):
        model.lm_head.bias = nn.Parameter(torch.arange(float(model.config.vocab_size)))

    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM are not .*: a bias, a scale or a cap"):
        made(biased)
    with pytest.raises(ValueError, match="has full_attention, linear_attention: choose another"):
        made(lambda model: setattr(model.config, "layer_types", ["linear_attention", "full_attention"]))

    windowed = shutil.copytree(folder, tmp_path / "windowed")
    settings = json.loads((windowed / "config.json").read_text())
    settings |= {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}
    (windowed / "config.json").write_text(json.dumps(settings))
    learner = make_learner(windowed)
    learner.step([[trajectory(4, 4, seed=number, reward=float(number)) for number in range(2)]])
    with pytest.raises(ValueError, match="a trajectory has 9 tokens and the model's sliding attention window is 8"):
        learner.step([[trajectory(4, 5, seed=number) for number in range(2)]])


ROPES = {
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_frequencies_that_depend_on_the_row_are_refused(folder, tmp_path, kind):
    made = shutil.copytree(folder, tmp_path / kind)
    settings = json.loads((made / "config.json").read_text())
    rope = {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | ROPES[kind]}
    short = {"max_position_embeddings": 16} if kind == "dynamic" else {}
    (made / "config.json").write_text(json.dumps(settings | rope | short))
    model, config = (
        load_model(made, dtype=torch.float32, device="cpu"),
        configuration.load(None, ["algorithm.preset=ppo"]),
    )
    with pytest.raises(ValueError, match="a trajectory of 17 tokens, and beyond 16 the rotary frequencies of Qwen2"):
        Learner(config, model, 17)
    plain = load_model(folder, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="beyond 16 the rotary"):
        Learner(config, plain, 17, critic=model)
    assert Learner(config, plain, 16, critic=model)


def test_a_masked_trajectory_has_no_part_in_any_term(folder):
    """Its own log-probs far off, nothing of it may be seen in the gradient: no penalty, KL or bonus either."""
    kept, cut = trajectory(4, 6, seed=1, reward=1.0), replace(trajectory(4, 6, seed=2), finish="length")
    words = ["algorithm.mask_truncated=true", "algorithm.loss.penalty=0.1", "algorithm.loss.entropy_bonus=0.1"]
    words += ["algorithm.loss.reference_kl=0.1", "algorithm.loss.center=none"]
    other = replace(trajectory(4, 6, seed=3), finish="length")
    assert torch.equal(gradients(folder, [[kept, cut]], *words), gradients(folder, [[kept, other]], *words))


def test_broadcast_before_a_group_exists_is_refused(folder):
    with pytest.raises(RuntimeError, match="before join"):
        make_learner(folder).prepare()


@pytest.mark.parametrize("word", ["learner.head_chunk=5", "learner.activation_checkpointing=true"])
def test_what_is_computed_twice_has_the_same_gradients(folder, word):
    words = ["rollout.temperature=0.7", "algorithm.loss.entropy_bonus=0.1", "learner.max_grad_norm=1e9"]
    groups = [[trajectory(4, n, seed=n, reward=float(n % 2)) for n in (3, 6, 9)]]
    once, twice = make_learner(folder, *words), make_learner(folder, *words, word)
    metrics, again = once.step(groups), twice.step(groups)
    for one in (metrics, again):
        assert one.pop("learner/tokens_per_s") > 0
    assert again == pytest.approx(metrics, rel=1e-5, abs=1e-9, nan_ok=True)
    for one, other in zip(once.model.parameters(), twice.model.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-7)


class Logits(TorchDispatchMode):
    """The most positions that any tensor over the vocabulary has, in all that runs under it."""

    most = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        shape = getattr(result, "shape", ())
        if len(shape) == 2 and shape[-1] == VOCABULARY and shape[0] != HIDDEN:  # which is the head's own
            self.most = max(self.most, shape[0])
        return result


def test_the_logits_of_a_micro_batch_never_exist_as_a_whole(folder):
    groups = [[trajectory(4, 9, seed=i, reward=float(i % 2)) for i in range(4)]]
    for chunk, most in ((1000, 36), (36, 36), (10, 10)):
        with Logits() as logits:
            make_learner(folder, f"learner.head_chunk={chunk}").step(groups)
        assert logits.most == most


def num_kept(folder, groups, *words):
    """Elements of the tensors that the forward pass keeps for the backward pass, each storage once."""
    learner, kept = make_learner(folder, *words), {}
    (part,) = pack(groups, learner.loss, row_tokens=64, micro_batch_tokens=9999, max_new_tokens=50).micro_batches
    own = {parameter.data_ptr() for parameter in learner.model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.score(part)
    return sum(tensor.numel() for address, tensor in kept.items() if address not in own)


def test_checkpointed_layers_keep_less(folder):
    groups = [[trajectory(4, 50, seed=i) for i in range(4)]]
    assert num_kept(folder, groups, "learner.activation_checkpointing=true") < num_kept(folder, groups) / 4


def attention_by_segment(queries, keys, values, starts, _, longest, __, *, scale, window_size, enable_gqa=True):
    """What the GPU kernel computes, one segment at a time."""
    assert window_size == (-1, 0)
    edges = starts.tolist()
    assert longest == max(end - start for start, end in itertools.pairwise(edges))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1).float() for x in (queries, keys, values)),
            is_causal=True,
            scale=scale,
            enable_gqa=enable_gqa,
        ).transpose(0, 1)
        for start, end in itertools.pairwise(edges)
    ]
    return torch.cat(parts)


def test_attention_by_segment_gives_the_logprobs_of_a_mask(folder, monkeypatch):
    """All but the kernel itself, which tests/gpu has: where segments start, and the layout of heads and places."""
    monkeypatch.setattr(model_file.varlen, "varlen_attn", attention_by_segment)
    monkeypatch.setattr(model_file, "_no_varlen", lambda *_: "")
    group = [of_one_prompt(n, seed=n, reward=float(n % 2)) for n in (1, 2, 5, 9)]
    scores = []
    for attention in ("sdpa", "varlen"):
        learner = make_learner(folder, f"learner.attention={attention}")
        batch = packed(learner, group, row_tokens=32, share_prompts=False)
        with torch.no_grad():
            scores.append(torch.cat([learner.score(part)[0] for part in batch.micro_batches]))
    assert not torch.equal(*scores), "keys and values are rounded to bfloat16 in one of them"
    assert torch.allclose(*scores, atol=0.02)


def test_attention_that_cannot_be_is_refused_with_the_reason(folder):
    with pytest.raises(ValueError, match=r"needs a GPU, and the learner is on 'cpu': set learner.attention=auto"):
        make_learner(folder, "learner.attention=varlen")


def test_flops_are_six_a_weight_and_token_and_twelve_a_pair(folder):
    learner = make_learner(folder)
    batch = packed(learner, [of_one_prompt(3, seed=1), of_one_prompt(2, seed=2)])
    weights = sum(p.numel() for p in learner.model.parameters()) - VOCABULARY * HIDDEN
    inputs, pairs = 7 + 2 + 1, sum(range(1, 8)) + 8 + 9 + 8
    expected = 6 * weights * inputs + 6 * VOCABULARY * HIDDEN * 5 + 12 * 2 * HIDDEN * pairs
    assert FlopCounter(learner.model)(batch.micro_batches) == expected
