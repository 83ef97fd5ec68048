"""What every engine keeps (the contract, over the fixture `setup`), then what only the embedded one promises."""

import asyncio
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from asyncrl.config.schema import TINY_BYTES
from asyncrl.engines.embedded import kv_cache
from asyncrl.engines.embedded.engine import EmbeddedEngine
from asyncrl.engines.sampler import sample, uniforms
from asyncrl.engines.stop_texts import is_stopped
from asyncrl.models.loading import load_model, load_tokenizer
from asyncrl.models.tiny import build_tiny
from asyncrl.types import Completion, Sampling
from asyncrl.weights.broadcast import BroadcastGroup, open_rendezvous
from asyncrl.weights.buckets import Bucket, digest_of, make_buckets
from asyncrl.weights.sender import Outgoing

PROMPTS = [[19, 6, 2, 9, 3, 12], [5], [20, 4, 8], [7] * 17, [3, 14, 15, 9, 2, 6, 5, 3, 5]]


@dataclass
class Setup:
    """An engine under test, the model it started from, how close its log-probs must come to that model's, and the
    folder of its tokenizer."""

    engine: Any
    model: Any
    tolerance: float
    folder: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, init_std=0.1, seed=3)
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    return load_model(folder, torch.float32, "cpu")


@pytest.fixture(scope="module")
def trained(tiny):
    """The same model after a made-up update."""
    model = copy.deepcopy(tiny)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def embedded_engine(model, **options) -> EmbeddedEngine:
    return EmbeddedEngine(copy.deepcopy(model), **({"max_running": 8, "max_length": 96} | options))


@pytest.fixture(params=["embedded"])
def setup(request, folder, tiny) -> Setup:
    make = {"embedded": embedded_engine}[request.param]
    return Setup(make(tiny, decode=load_tokenizer(folder).decode), tiny, 1e-5, folder)


def full_logits(model, prompt, completion: Completion) -> torch.Tensor:
    """Next-token logits at every position of the completion from one forward without a cache, [n, V]."""
    ids = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()


def full_logprobs(model, prompt, completion: Completion, temperature: float = 1.0) -> np.ndarray:
    """What `Completion.logprobs` should be without truncation."""
    logprobs = torch.log_softmax(full_logits(model, prompt, completion) / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(completion.token_ids).long()[:, None])[:, 0].numpy()


async def all_of(engine, prompts, sampling, first_seed=0) -> list[Completion]:
    return await asyncio.gather(*(engine.generate(p, sampling, first_seed + i) for i, p in enumerate(prompts)))


async def meet(*engines) -> BroadcastGroup:
    where, store = open_rendezvous("127.0.0.1", 1 + len(engines), 30)
    group, *_ = await asyncio.gather(
        asyncio.to_thread(BroadcastGroup, where, 0, "127.0.0.1", store),
        *(engine.join(where, rank) for rank, engine in enumerate(engines, 1)),
    )
    return group


async def send(group, model, *engines) -> str:
    """Broadcasts the weights of `model` to paused engines; the digest of what was sent."""
    named = dict(model.named_parameters())
    buckets = make_buckets(named.items(), "float32", 200_000)
    sending = asyncio.create_task(asyncio.to_thread(Outgoing(buckets, named, group).send))
    await asyncio.gather(*(engine.receive(buckets) for engine in engines))
    return await sending


async def update_in_flight(engine, group, model, prompts) -> tuple[list[Completion], str]:
    """Long completions that see version 1 arrive once a short one beside them has ended."""
    calls = [asyncio.create_task(engine.generate(p, Sampling(60), i)) for i, p in enumerate(prompts)]
    await engine.generate([5, 6], Sampling(7), 99)
    await engine.pause()
    sent = await send(group, model, engine)
    assert await engine.resume(1) == sent
    return await asyncio.gather(*calls), sent


# The contract.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models_own(setup, temperature):
    completions = run(all_of(setup.engine, PROMPTS, Sampling(40, temperature)))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = full_logprobs(setup.model, prompt, completion, temperature)
        assert np.abs(completion.logprobs - expected).max() < setup.tolerance
        assert completion.logprobs.dtype == np.float32
        assert completion.token_ids.dtype == completion.versions.dtype == np.int32


def test_truncated_logprobs_are_of_the_renormalised_distribution(setup):
    sampling = Sampling(30, temperature=1.5, top_p=0.8, top_k=6)
    completions = run(all_of(setup.engine, PROMPTS, sampling))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        rows = full_logits(setup.model, prompt, completion).double().numpy() / sampling.temperature
        for row, token, logprob in zip(rows, completion.token_ids, completion.logprobs, strict=True):
            kept = np.argsort(-row)[: sampling.top_k]
            probabilities = np.exp(row[kept] - row.max())
            probabilities /= probabilities.sum()
            size = 1 + int(np.searchsorted(probabilities.cumsum(), sampling.top_p))
            assert token in kept[:size]
            chosen = probabilities[list(kept).index(token)] / probabilities[:size].sum()
            assert abs(logprob - np.log(chosen)) < setup.tolerance


def test_greedy_is_greedy(setup):
    completions = run(all_of(setup.engine, PROMPTS, Sampling(30, temperature=0.0)))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = setup.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, eos_token_id=None
        )
        assert completion.token_ids.tolist() == expected[0, len(prompt) :].tolist()
        assert np.abs(completion.logprobs - full_logprobs(setup.model, prompt, completion)).max() < setup.tolerance


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(setup):
    async def body():
        alone = [await setup.engine.generate(prompt, Sampling(25), 7 + i) for i, prompt in enumerate(PROMPTS)]
        settings = [Sampling(25), Sampling(9, 0.5), Sampling(31, 1.0, 0.9), Sampling(14, 0.0)]
        noise = [setup.engine.generate([2 + i], settings[i % 4], 1000 + i) for i in range(20)]
        crowd, *_ = await asyncio.gather(all_of(setup.engine, PROMPTS, Sampling(25), 7), *noise)
        other = await all_of(setup.engine, PROMPTS, Sampling(25), 107)
        return alone, crowd, other

    alone, crowd, other = run(body())
    for one, many, different in zip(alone, crowd, other, strict=True):
        assert one.token_ids.tolist() == many.token_ids.tolist() != different.token_ids.tolist()


def test_a_stop_token_ends_a_completion_and_is_part_of_it(setup):
    async def body():
        free = await setup.engine.generate(PROMPTS[0], Sampling(30), 1)
        stop = int(free.token_ids[11])
        return free, stop, await setup.engine.generate(PROMPTS[0], Sampling(30, stop_token_ids=(stop,)), 1)

    free, stop, stopped = run(body())
    assert (free.finish, len(free.token_ids)) == ("length", 30)
    assert stopped.finish == "stop"
    first = free.token_ids.tolist().index(stop)
    assert stopped.token_ids.tolist() == free.token_ids[: first + 1].tolist()
    assert len(stopped.logprobs) == len(stopped.versions) == first + 1


def test_a_stop_text_ends_a_completion_with_the_token_that_completes_it(setup):
    decode = load_tokenizer(setup.folder).decode

    async def body():
        free = await setup.engine.generate(PROMPTS[0], Sampling(30), 1)
        text = decode(free.token_ids[11:14].tolist())
        calls = [
            setup.engine.generate(PROMPTS[0], Sampling(30, stop=stop), 1) for stop in (("never said", text), ("never",))
        ]
        return free.token_ids.tolist(), text, await asyncio.gather(*calls)

    free, text, (stopped, unstopped) = run(body())
    length = next(n for n in range(30) if text in decode(free[:n]))
    assert (stopped.finish, stopped.token_ids.tolist()) == ("stop", free[:length])
    assert len(stopped.logprobs) == len(stopped.versions) == length
    assert (unstopped.finish, unstopped.token_ids.tolist()) == ("length", free)


def test_a_stop_at_the_last_token_that_is_allowed_is_a_stop(setup):
    decode = load_tokenizer(setup.folder).decode

    async def body():
        free = await setup.engine.generate(PROMPTS[0], Sampling(12), 1)
        first = free.token_ids.tolist().index(free.token_ids[-1]) + 1
        stops = {"stop_token_ids": (int(free.token_ids[-1]),)}, {"stop": (decode(free.token_ids[-1:].tolist()),)}
        return first, [await setup.engine.generate(PROMPTS[0], Sampling(first, **stop), 1) for stop in stops]

    first, stopped = run(body())
    assert [(one.finish, len(one.token_ids)) for one in stopped] == [("stop", first)] * 2


@pytest.mark.parametrize("text", ["</answer>", "né\N{EURO SIGN}", "\N{WHITE HEAVY CHECK MARK}", "\n\n"])
def test_a_stop_text_is_found_with_its_last_byte_and_not_before(tmp_path, text):
    build_tiny(tmp_path, name=TINY_BYTES, seed=0)
    tokenizer = load_tokenizer(tmp_path)
    sampling = Sampling(99, stop=("never", text))
    tokens = tokenizer.encode(f"\N{PARTY POPPER}some {text}", add_special_tokens=False)
    found = [length for length in range(1, len(tokens) + 1) if is_stopped(tokens[:length], sampling, tokenizer.decode)]
    assert found == [len(tokens)]


def test_versions_and_digests_follow_an_update(setup, trained):
    async def body():
        group = await meet(setup.engine)
        before = await setup.engine.generate(PROMPTS[0], Sampling(5), 0)
        during, sent = await update_in_flight(setup.engine, group, trained, PROMPTS)
        after = await setup.engine.generate(PROMPTS[0], Sampling(5), 0)
        return before, during, after, sent

    before, during, after, sent = run(body())
    named = dict(trained.named_parameters())
    assert sent == digest_of(make_buckets(named.items(), "float32", 200_000), named)
    old = before.digests[0]
    assert (set(before.versions.tolist()), before.digests) == ({0}, {0: old})
    assert old != sent
    assert (set(after.versions.tolist()), after.digests) == ({1}, {1: sent})
    assert np.abs(after.logprobs - full_logprobs(trained, PROMPTS[0], after)).max() < setup.tolerance
    for completion in during:
        assert np.all(np.diff(completion.versions) >= 0)
        assert completion.digests == {0: old, 1: sent}
        assert completion.finish == "length"


def test_weights_are_received_only_while_paused(setup):
    async def body():
        await meet(setup.engine)
        with pytest.raises(RuntimeError, match="only while paused"):
            await setup.engine.receive([Bucket(("x",), ("float32",), ((1,),))])

    run(body())


def test_a_partial_update_is_an_error(setup, trained):
    async def body():
        group = await meet(setup.engine)
        named = dict(list(trained.named_parameters())[:-1])
        [bucket] = make_buckets(named.items(), "float32", 1 << 30)
        await setup.engine.pause()
        await asyncio.gather(
            asyncio.to_thread(Outgoing([bucket], named, group).send),
            setup.engine.receive([bucket]),
        )
        with pytest.raises(RuntimeError, match=r"partial: 1 of \d+ parameters did not arrive \(model.norm.weight"):
            await setup.engine.resume(1)

    run(body())


def test_a_request_that_cannot_fit_says_what_to_change(setup):
    async def body():
        with pytest.raises(ValueError, match=r"of 6 tokens and max_new_tokens 91 .* max_prompt_tokens plus rollout"):
            await setup.engine.generate(PROMPTS[0], Sampling(91), 0)
        completion = await setup.engine.generate(PROMPTS[0], Sampling(90), 0)
        assert len(completion.token_ids) == 90

    run(body())


def test_closing_ends_what_is_in_flight(setup):
    async def body():
        calls = [asyncio.create_task(setup.engine.generate(prompt, Sampling(60), 0)) for prompt in PROMPTS]
        await setup.engine.generate([5], Sampling(2), 0)
        await setup.engine.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, RuntimeError) for result in results)
        with pytest.raises(RuntimeError, match="closed"):
            await setup.engine.generate([5], Sampling(2), 0)

    run(body())


# The embedded engine: updates in flight.


def check_boundary(engine_mode, tiny, trained, expected_after):
    """Runs an update in flight; before the boundary log-probs are the old model's, after it `expected_after`'s."""

    async def body():
        engine = embedded_engine(tiny, on_update=engine_mode)
        return (await update_in_flight(engine, await meet(engine), trained, PROMPTS))[0]

    for prompt, completion in zip(PROMPTS, run(body()), strict=True):
        boundary = int(np.searchsorted(completion.versions, 1))
        assert boundary == 7  # All were admitted in one tick, and the short completion had seven tokens.
        old = full_logprobs(tiny, prompt, completion)
        new = expected_after(prompt, completion, boundary)
        assert np.abs(completion.logprobs[:boundary] - old[:boundary]).max() < 1e-5
        assert np.abs(completion.logprobs[boundary:] - new[boundary:]).max() < 1e-5
        assert np.abs(completion.logprobs[boundary:] - old[boundary:]).max() > 0.1


def test_recompute_goes_on_as_if_the_new_weights_had_always_been_there(tiny, trained):
    check_boundary("recompute", tiny, trained, lambda prompt, completion, _: full_logprobs(trained, prompt, completion))


def test_keep_goes_on_from_the_old_keys_and_values(tiny, trained):
    def expected(prompt, completion, boundary):
        ids = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
        seen = len(prompt) + boundary - 1  # The last token before the boundary is fed after it.
        with torch.no_grad():
            cache = tiny(ids[:, :seen], use_cache=True).past_key_values
            logits = trained(ids[:, seen:-1], past_key_values=cache).logits[0]
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, ids[0, seen + 1 :, None])[:, 0]
        return np.concatenate([np.zeros(boundary), logprobs.numpy()])

    check_boundary("keep", tiny, trained, expected)


def test_an_abort_returns_what_there_is_and_keeps_the_waiting(tiny, trained):
    async def body():
        engine = embedded_engine(tiny, on_update="abort", max_running=5)
        group = await meet(engine)
        calls = [asyncio.create_task(engine.generate(p, Sampling(60), i)) for i, p in enumerate(PROMPTS[:4])]
        await engine.generate([5, 6], Sampling(7), 99)
        await engine.pause()
        waiting = [asyncio.create_task(engine.generate([5], Sampling(6), i)) for i in range(3)]
        await send(group, trained, engine)
        await engine.resume(1)
        return await asyncio.gather(*calls), await asyncio.gather(*waiting)

    partial, waited = run(body())
    for prompt, completion in zip(PROMPTS[:4], partial, strict=True):
        assert completion.finish == "abort"
        assert completion.versions.tolist() == [0] * 7
        assert np.abs(completion.logprobs - full_logprobs(tiny, prompt, completion)).max() < 1e-5
    for completion in waited:
        assert completion.finish == "length"
        assert set(completion.versions.tolist()) == {1}


def test_a_pause_without_an_update_changes_nothing(tiny):
    async def body(engine, pauses):
        calls = [asyncio.create_task(engine.generate(p, Sampling(30), i)) for i, p in enumerate(PROMPTS)]
        for _ in range(pauses):
            await asyncio.sleep(0)
            await engine.pause()
            tokens = engine.num_tokens
            for _ in range(3):
                await asyncio.sleep(0)
            assert engine.num_tokens == tokens
            await engine.resume(0)
        return await asyncio.gather(*calls)

    for mode in ("keep", "recompute", "abort"):
        straight = run(body(embedded_engine(tiny), 0))
        paused = run(body(embedded_engine(tiny, on_update=mode), 5))
        for one, other in zip(straight, paused, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert one.finish == other.finish == "length"


def test_two_engines_load_the_same_bits(tiny, trained):
    async def body():
        engines = [embedded_engine(tiny), embedded_engine(tiny)]
        group = await meet(*engines)
        for version, model in enumerate((trained, tiny), 1):
            for engine in engines:
                await engine.pause()
            sent = await send(group, model, *engines)
            assert [await engine.resume(version) for engine in engines] == [sent, sent]
            for engine in engines:
                for name, parameter in model.named_parameters():
                    assert torch.equal(engine._parameters[name], parameter)

    run(body())


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        (Bucket(("nobody",), ("float32",), ((4,),)), "no parameter 'nobody'"),
        (Bucket(("model.norm.weight",), ("float32",), ((64,),)), r"float32\[64\], the model has torch.float32\[128\]"),
        (Bucket(("model.norm.weight",), ("bfloat16",), ((128,),)), "arrived as bfloat16"),
    ],
    ids=["name", "shape", "dtype"],
)
def test_a_bucket_that_does_not_fit_is_an_error_now_and_at_resume(tiny, bucket, message):
    async def body():
        engine = embedded_engine(tiny)
        group = await meet(engine)
        await engine.pause()
        sending = asyncio.to_thread(group.start(torch.zeros(bucket.num_bytes, dtype=torch.uint8)))
        sent, received = await asyncio.gather(sending, engine.receive([bucket]), return_exceptions=True)
        assert sent is None
        with pytest.raises(RuntimeError, match=message):
            raise received
        with pytest.raises(RuntimeError, match="partial"):
            await engine.resume(1)

    run(body())


def test_an_update_that_was_cut_short_starts_over_in_a_new_group(tiny, trained):
    async def body():
        engine = embedded_engine(tiny)
        group = await meet(engine)
        named = dict(trained.named_parameters())
        bucket = make_buckets(named.items(), "float32", 200_000)[0]
        await engine.pause()
        for error in (None, "arrived twice"):
            sending = asyncio.to_thread(Outgoing([bucket], named, group).send)
            _, received = await asyncio.gather(sending, engine.receive([bucket]), return_exceptions=True)
            assert error is None or error in str(received)
        group = await meet(engine)
        with pytest.raises(RuntimeError, match="partial"):
            await engine.resume(1)
        assert await send(group, trained, engine) == await engine.resume(1)

    run(body())


def test_one_version_is_never_two_sets_of_weights(tiny, trained):
    async def body():
        engine = embedded_engine(tiny)
        group = await meet(engine)
        call = asyncio.create_task(engine.generate([5], Sampling(60), 0))
        await engine.generate([6], Sampling(2), 0)
        await engine.pause()
        await send(group, trained, engine)
        with pytest.raises(RuntimeError, match="now called version 0 too"):
            await engine.resume(0)
        await engine.resume(1)
        await call
        with pytest.raises(RuntimeError, match="only after a pause"):
            await engine.resume(2)

    run(body())


# The embedded engine: rows, prefills, failures.


def test_equal_prompts_share_one_prefill(tiny):
    async def body():
        engine = embedded_engine(tiny)
        group = await all_of(engine, [PROMPTS[0]] * 5 + [PROMPTS[2]] * 3, Sampling(20))
        assert engine.num_prefill_tokens == len(PROMPTS[0]) + len(PROMPTS[2])
        assert engine.num_tokens == 8 * 20
        assert engine.busy_s > 0
        return group

    group = run(body())
    assert len({tuple(completion.token_ids) for completion in group}) == 8
    for completion in group[:5]:
        assert np.abs(completion.logprobs - full_logprobs(tiny, PROMPTS[0], completion)).max() < 1e-5


@pytest.mark.parametrize("prefill_tokens", [1, 20, 1 << 14])
def test_rows_come_and_go_without_mixing(tiny, monkeypatch, prefill_tokens):
    monkeypatch.setattr(kv_cache, "_PREFILL_TOKENS", prefill_tokens)
    rng = np.random.default_rng(0)
    requests = [(rng.integers(2, 25, rng.integers(1, 30)).tolist(), int(rng.integers(1, 40))) for _ in range(40)]

    async def body():
        engine = embedded_engine(tiny)
        calls = (engine.generate(prompt, Sampling(wanted), i) for i, (prompt, wanted) in enumerate(requests))
        return await asyncio.gather(*calls)

    for (prompt, wanted), completion in zip(requests, run(body()), strict=True):
        assert len(completion.token_ids) == wanted
        assert np.abs(completion.logprobs - full_logprobs(tiny, prompt, completion)).max() < 1e-5


def test_a_request_joins_and_leaves_while_another_runs(tiny):
    async def body():
        engine = embedded_engine(tiny)
        long = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(80), 0))
        await engine.generate(PROMPTS[1], Sampling(5), 1)
        late = await engine.generate(PROMPTS[2], Sampling(10), 2)
        assert not long.done()
        return await long, late

    long, late = run(body())
    for prompt, completion in ((PROMPTS[0], long), (PROMPTS[2], late)):
        assert np.abs(completion.logprobs - full_logprobs(tiny, prompt, completion)).max() < 1e-5


def test_a_cancelled_call_frees_its_row(tiny):
    async def body():
        engine = embedded_engine(tiny, max_running=2)
        first = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(80), 0))
        await engine.generate(PROMPTS[1], Sampling(3), 1)
        queued = asyncio.create_task(engine.generate(PROMPTS[1], Sampling(80), 2))
        late = asyncio.create_task(engine.generate(PROMPTS[2], Sampling(80), 3))
        first.cancel()
        queued.cancel()
        await asyncio.gather(first, queued, return_exceptions=True)
        completion = await late
        assert engine._live == []
        assert engine.num_tokens < 80 + 3 + 10
        return completion

    completion = run(body())
    assert np.abs(completion.logprobs - full_logprobs(tiny, PROMPTS[2], completion)).max() < 1e-5


def test_an_error_in_the_model_reaches_every_request(tiny, monkeypatch):
    async def body():
        engine = embedded_engine(tiny, max_running=3)
        calls = [asyncio.create_task(engine.generate([5], Sampling(60), 0)) for _ in range(2)]
        await engine.generate([5], Sampling(4), 0)
        calls += [asyncio.create_task(engine.generate(prompt, Sampling(60), 0)) for prompt in PROMPTS]

        def broken(**_):
            raise ArithmeticError("no such luck")

        with monkeypatch.context() as patch:
            patch.setattr(engine._model, "forward", broken)
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, ArithmeticError) for result in results)
        completion = await engine.generate(PROMPTS[0], Sampling(5), 0)
        assert np.abs(completion.logprobs - full_logprobs(tiny, PROMPTS[0], completion)).max() < 1e-5

    run(body())


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], Sampling(5), "a prompt needs tokens, .* got none"),
        ([5, 25, 7], Sampling(5), r"all in 0..24, got 25 among them: .*the model's own tokenizer"),
        ([5], Sampling(0), "max_new_tokens must be at least 1"),
        ([5], Sampling(5, temperature=-1.0), "temperature must be 0"),
        ([5], Sampling(5, top_p=0.0), "top_p must be above 0"),
        ([5], Sampling(5, top_k=-1), "top_k must be 0"),
        ([5], Sampling(5, stop=("5",)), "stop texts need an engine with a tokenizer"),
    ],
)
def test_what_cannot_be_run_is_refused(tiny, prompt, sampling, message):
    with pytest.raises(ValueError, match=message):
        run(embedded_engine(tiny).generate(prompt, sampling, 0))


def test_a_model_that_does_not_attend_to_everything_is_refused(tiny):
    model = copy.deepcopy(tiny)
    model.config = Qwen2Config(
        **(tiny.config.to_dict() | {"use_sliding_window": True, "sliding_window": 32, "layer_types": None}),
    )
    model.config.layer_types = ["sliding_attention"] * 2
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"max_length 96 exceeds .* attention window of 32.* max_prompt_tokens plus"):
        EmbeddedEngine(model, max_running=2, max_length=96)


def test_a_model_whose_rotary_frequencies_depend_on_the_length_is_refused():
    config = LlamaConfig(
        vocab_size=31, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"max_length 96 exceeds 32, beyond which the model's rotary frequencies"):
        EmbeddedEngine(model, max_running=2, max_length=96)
    assert EmbeddedEngine(model, max_running=2, max_length=32)


def test_attention_that_takes_no_mask_is_refused(tiny):
    model = copy.deepcopy(tiny)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"needs attention 'sdpa' or 'eager', the model uses 'flash_attention_2'"):
        EmbeddedEngine(model, max_running=2, max_length=96)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_runs_too(attention):
    config = LlamaConfig(
        vocab_size=31, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.2, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    completions = run(all_of(embedded_engine(model), PROMPTS, Sampling(30, 0.8)))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert np.abs(completion.logprobs - full_logprobs(model, prompt, completion, 0.8)).max() < 1e-5


def test_half_precision_runs(tiny):
    model = copy.deepcopy(tiny).to(torch.bfloat16)
    completions = run(all_of(embedded_engine(model), PROMPTS, Sampling(30)))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert np.abs(completion.logprobs - full_logprobs(model, prompt, completion)).mean() < 0.05


# The sampler.


def test_frequencies_match_the_probabilities(tiny):
    num_draws = 4096

    async def body():
        engine = embedded_engine(tiny, max_running=512)
        return await all_of(engine, [PROMPTS[0]] * num_draws, Sampling(2, 1.3))

    completions = run(body())
    probabilities = torch.softmax(full_logits(tiny, PROMPTS[0], completions[0])[0].double() / 1.3, dim=-1).numpy()
    expected = probabilities * num_draws
    counts = np.bincount([completion.token_ids[0] for completion in completions], minlength=len(expected))
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = often.sum() - 1
    assert degrees >= 8
    assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


def test_uniforms_are_uniform_and_depend_on_seed_and_index():
    seeds, indices = np.meshgrid(np.arange(100, dtype=np.uint64), np.arange(100, dtype=np.uint64))
    values = uniforms(seeds.ravel(), indices.ravel())
    assert len(np.unique(values)) == 10_000
    assert 0 <= values.min() < values.max() < 1
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 45
    table = values.reshape(100, 100)
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.04


@pytest.mark.parametrize("random", [0.0, 1 - 2.0**-52], ids=["lowest", "highest"])
def test_a_token_of_probability_zero_is_never_drawn(random):
    logits = torch.full((3, 50), -torch.inf)
    logits[0, 20], logits[1, 49], logits[2, 10:12] = 0.0, 5.0, torch.tensor([80.0, -80.0])
    tokens, logprobs = sample(logits, [Sampling(1)] * 3, np.full(3, random))
    assert tokens[:2] == [20, 49]
    assert tokens[2] == 10
    assert logprobs[:2] == [0.0, 0.0]
