"""LoRA: what is trained, what leaves the learner, and what a checkpoint holds. Several ranks: test_sharding.py."""

import asyncio
import itertools
import json
import sys

import peft
import pytest
import torch
from helpers import run, trajectory
from test_loop import small

from asyncrl.config import loading as configuration
from asyncrl.driver import run as job
from asyncrl.engines.embedded.engine import EmbeddedEngine
from asyncrl.envs.base import load_env
from asyncrl.models.loading import load_model, load_tokenizer, stop_token_ids
from asyncrl.models.tiny import build_tiny
from asyncrl.monitor import metrics
from asyncrl.recovery import checkpoint
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.runtime.build import LearnerPart
from asyncrl.runtime.placement import plan
from asyncrl.runtime.rollout_worker import Rollout
from asyncrl.training.flops import FlopCounter
from asyncrl.training.learner import Learner
from asyncrl.training.packing import pack
from asyncrl.types import Sampling
from asyncrl.utils import durable
from asyncrl.weights.buckets import digest_of

LORA = ["lora.rank=4", "lora.alpha=8", "learner.learning_rate=1e-2", "learner.warmup_steps=0"]
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_tiny(path, seed=3)
    return str(path)


def base_of(folder):
    return load_model(folder, dtype=torch.float32, device="cpu")


def make_learner(folder, *words, reference=None):
    torch.manual_seed(0)
    return Learner(configuration.load(None, [*LORA, *words]), base_of(folder), 64, reference=reference)


def batch(seed):
    return [[trajectory(4, n, seed=31 * seed + n, reward=float(n % 2)) for n in (3, 6, 9, 12)]]


def trained(folder, *words):
    learner = make_learner(folder, *words)
    for seed in range(3):
        learner.step(batch(seed))
    return learner


def packed(learner, groups):
    (part,) = pack(groups, learner.loss, row_tokens=64, micro_batch_tokens=9999, max_new_tokens=12).micro_batches
    return part


@torch.no_grad()
def score(learner, groups):
    return learner.score(packed(learner, groups))[0]


def play(model, folder):
    """Groups that the embedded engine samples from `model`."""

    async def body():
        env = load_env("asyncrl.envs.digits:SortDigits", load_tokenizer(folder), {})
        engine = EmbeddedEngine(model, max_running=16, max_length=64)
        sampling = Sampling(12, 1.0, stop_token_ids=stop_token_ids(folder, load_tokenizer(folder)))
        rollout = Rollout(engine, env, sampling, group_size=4, seed=0)
        groups = await asyncio.gather(*(rollout.run(p) for p in itertools.islice(env.prompts("train", 0), 4)))
        await rollout.close()
        return [group.trajectories for group in groups]

    return run(body())


@pytest.mark.parametrize(
    ("targets", "expected"), [('"all-linear"', ATTENTION | MLP), ('["q_proj", "down_proj"]', {"q_proj", "down_proj"})]
)
def test_parity_the_learner_reproduces_the_logprobs_of_an_engine_with_its_merged_weights(folder, targets, expected):
    learner, model = trained(folder, f"lora.targets={targets}"), base_of(folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = learner.weights()
    assert weights.keys() == before.keys()
    assert {name.split(".")[-2] for name in weights if not torch.equal(weights[name], before[name])} == expected
    model.load_state_dict(weights, strict=False)
    part = packed(learner, play(model, folder))
    with torch.no_grad():
        logprobs, _ = learner.score(part)
        of_base, _ = learner.adapters.without(learner.score)(part)
    assert (logprobs - part.behavior_logprobs).abs().max() < 1e-5
    assert (of_base - part.behavior_logprobs).abs().max() > 0.01, "the policy has not left the base"


def test_only_adapters_are_trained_and_the_base_keeps_every_bit(folder):
    learner = trained(folder)
    learner.model.zero_grad()
    learner.score(packed(learner, batch(0)))[0].sum().backward()
    with_gradient = {name for name, parameter in learner.model.named_parameters() if parameter.grad is not None}
    assert len(with_gradient) == 2 * 2 * 7, "A and B of seven layers in each of two blocks"
    assert all("lora_" in name for name in with_gradient)
    assert {name.rsplit(".", 1)[0] for name in learner.state()} == with_gradient
    frozen = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in learner.model.named_parameters()
        if name not in with_gradient
    }
    expected = dict(base_of(folder).named_parameters())
    assert frozen.keys() == expected.keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in frozen.items())


def test_the_base_is_the_reference(folder):
    """The same steps, whether the reference is the base under the adapters or a model of its own."""
    words = ["algorithm.loss.reference_kl=0.5", "algorithm.loss.reward_kl=0.1", "learner.activation_checkpointing=true"]
    one, other = make_learner(folder, *words), make_learner(folder, *words)
    other._reference = Learner(configuration.load(None, []), base_of(folder), 64).score
    for seed in range(3):
        assert one.step(batch(seed))["reward/kl"] == pytest.approx(other.step(batch(seed))["reward/kl"], abs=1e-6)
    weights, expected = one.weights(), other.weights()
    assert all(torch.allclose(weights[name], expected[name], atol=1e-6) for name in expected)
    assert not torch.allclose(score(one, batch(0)), score(trained(folder), batch(0)), atol=1e-3), "the KL has no effect"


def test_steps_raise_the_probability_of_what_was_rewarded(folder):
    good, bad = trajectory(4, 6, seed=1, reward=1.0), trajectory(4, 6, seed=2, reward=0.0)
    learner = make_learner(folder, "algorithm.preset=reinforce", "algorithm.allow_uncorrected=true", "lora.rank=8")
    part = packed(learner, [[good, bad]])
    before = score(learner, [[good, bad]])
    for _ in range(5):
        learner.step([[good, bad]])
    gain = score(learner, [[good, bad]]) - before
    assert gain[part.advantages > 0].mean() > 0.1
    assert gain[part.advantages < 0].mean() < -0.1


def test_a_value_head_on_the_policy_goes_with_adapters(folder):
    words = ["algorithm.preset=ppo", "critic.backbone=policy"]
    learner = make_learner(folder, *words)
    before = learner.weights()
    losses = [learner.step(batch(0))["critic/loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert any(not torch.equal(before[name], tensor) for name, tensor in learner.weights().items())


def test_bfloat16_keeps_the_frozen_layers_in_it_and_changes_no_logprob(folder):
    """A base of bfloat16 values, as published models are: a product under autocast rounds the same weights."""
    learner = trained(folder, "learner.dtype=bfloat16")
    dtypes = {name: parameter.dtype for name, parameter in learner.model.named_parameters()}
    halves = {name for name in dtypes if dtypes[name] == torch.bfloat16}
    assert halves == {name for name in dtypes if ".base_layer." in name}
    assert all(dtypes[name] == torch.float32 for name in dtypes if "lora_" in name)
    found = score(learner, batch(0))
    for module in learner.model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.float()
    assert torch.equal(score(learner, batch(0)), found)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ('["lm_head"]', r"names 'lm_head': leave it out"),
        ('["q_proj", "embed_tokens"]', r"names 'model.embed_tokens': leave it out"),
        ('["query"]', r"does not fit Qwen2ForCausalLM: .*query.* not found .*all-linear"),
        ('["mlp"]', r"does not fit Qwen2ForCausalLM: .* is not supported"),
        ("[]", "names no layers"),
    ],
)
def test_targets_that_can_have_no_adapter_are_refused(folder, targets, message):
    with pytest.raises(ValueError, match=message):
        make_learner(folder, f"lora.targets={targets}")


def test_without_peft_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'asyncrl\[lora\]'"):
        make_learner(folder)


def test_a_frozen_weight_counts_four_flops(folder):
    learner = make_learner(folder)
    part = packed(learner, batch(0))
    adapters = sum(p.numel() for name, p in learner.model.named_parameters() if "lora_" in name)
    more = FlopCounter(base_of(folder))([part]) - FlopCounter(learner.model)([part])
    inputs = int((part.groups >= 0).sum())
    layers = sum(p.numel() for name, p in base_of(folder).named_parameters() if "embed" not in name)
    head = base_of(folder).get_output_embeddings().weight.numel()
    assert more == 2 * layers * inputs + 2 * head * len(part.targets) - 6 * adapters * inputs


def part_of(config, folder, resume=None):
    return LearnerPart(config, folder, resume, plan(config, 0))


def saved(folder, root, *words):
    """A part that made three steps and saved; its checkpoint."""
    part = part_of(configuration.load(None, [*LORA, *words]), folder)
    for seed in range(3):
        part.learner.step(batch(seed))
    part.save(root, Cursor(3, 9, []))
    return part, checkpoint.latest(root)


def test_a_checkpoint_holds_the_merged_model_and_the_adapter_for_peft(folder, tmp_path):
    part, path = saved(folder, tmp_path)
    assert [file.name for file in path.glob("*.safetensors")] == ["model.safetensors"]
    assert json.loads((path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == folder
    tokens = torch.arange(2, 22)[None]
    with torch.no_grad():
        expected = part.learner.model(tokens).logits
        merged = base_of(path)(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base_of(folder), path / "adapter")(tokens).logits
        base = base_of(folder)(tokens).logits
    assert torch.allclose(merged, expected, atol=1e-5)
    assert torch.allclose(adapted, expected, atol=1e-6)
    assert (base - expected).abs().max() > 0.01
    assert durable.damage(path) is None
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert "adapter/adapter_model.safetensors" in durable.damage(path)


def test_a_resumed_learner_goes_on_exactly(folder, tmp_path):
    first, path = saved(folder, tmp_path)
    second = part_of(configuration.load(None, LORA), folder, path)
    for part in (first, second):
        part.learner.step(batch(7))
    assert first.learner.version == second.learner.version == 4
    weights, again = first.learner.weights(), second.learner.weights()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("lora.rank=0", "lora.rank=4", "without adapters and lora.rank is 4: resume with lora.rank=0"),
        ("lora.rank=4", "lora.rank=0", "with adapters and lora.rank is 0"),
        ("lora.rank=4", "lora.rank=2", r"adapters of rank 4 and alpha 8 for .*q_proj.* not those of the \[lora\]"),
        ("lora.rank=4", "lora.alpha=16", "adapters of rank 4 and alpha 8"),
        ("lora.rank=4", 'lora.targets=["q_proj"]', "adapters of rank 4 and alpha 8"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused(folder, tmp_path, before, after, message):
    _, path = saved(folder, tmp_path, before)
    with pytest.raises(ValueError, match=message):
        part_of(configuration.load(None, [*LORA, after]), folder, path)


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_a_run_publishes_its_weights_and_goes_on_after_a_stop(tmp_path, sync):
    """The digests of what was sent and of what the engines hold are compared at every update, or the run fails."""
    words = [*LORA, f"lora.sync={sync}", "buffer.max_staleness=0", "checkpoint.every=2", "checkpoint.keep=9"]
    config = small(tmp_path, *words)
    result = run(job.train(config, quiet=True))
    assert result.version == 4
    rows = [row for row in metrics.read(result.folder) if "reward/mean" in row]
    assert max(row["mismatch/k3"] for row in rows) < 1e-9, "an engine has other weights than the learner"
    folders = checkpoint.folders(result.folder / "checkpoints")
    expected = base_of(folders[-1]).state_dict()
    for path in folders[1:]:
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    run(job.train(config, result.folder, quiet=True))
    again = base_of(checkpoint.latest(result.folder / "checkpoints")).state_dict()
    assert any(not torch.equal(expected[name], tensor) for name, tensor in base_of(folders[0]).state_dict().items())
    assert all(torch.allclose(expected[name], again[name], atol=1e-6) for name in expected)


def test_the_digest_of_what_is_sent_is_of_the_merged_weights(folder):
    learner = trained(folder, "rollout.dtype=bfloat16")
    assert [name for bucket in learner.buckets for name in bucket.names] == [
        name for name, _ in base_of(folder).named_parameters()
    ]
    assert digest_of(learner.buckets, learner.published()) == digest_of(learner.buckets, learner.weights())
    assert digest_of(learner.buckets, learner.weights()) != digest_of(
        learner.buckets, dict(base_of(folder).named_parameters())
    )


def test_adapters_alone_are_sent_in_the_dtype_of_the_rollout(folder, tmp_path):
    learner = trained(folder, "lora.sync=adapter", "rollout.dtype=bfloat16")
    names = {name for bucket in learner.buckets for name in bucket.names}
    assert names == {name for name, _ in learner.model.named_parameters() if "lora_" in name}
    sizes = [sum(p.numel() for p in some) for some in (learner.adapters.named().values(), base_of(folder).parameters())]
    assert sum(bucket.num_bytes for bucket in learner.buckets) == 2 * sizes[0] < sizes[1] / 4
    config = small(tmp_path, *LORA, "lora.sync=adapter", "rollout.dtype=bfloat16", "num_steps=2")
    result = run(job.train(config, quiet=True))
    assert result.version == 2


def test_what_adapters_alone_need_is_checked():
    with pytest.raises(ValueError, match=r"sends adapters and lora.rank is 0: set lora.rank"):
        configuration.load(None, ["lora.sync=adapter"])
    sglang = ["lora.sync=adapter", "lora.rank=8", "rollout.engine=sglang", "rollout.on_update=recompute"]
    assert configuration.load(None, sglang).lora.rank == 8
    with pytest.raises(ValueError, match=r"release_memory gives away: set lora.sync=merged"):
        configuration.load(None, [*sglang, "placement=colocated", "rollout.release_memory=true"])
