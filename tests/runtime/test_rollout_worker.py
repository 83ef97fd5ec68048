"""What a rollout actor does with one prompt."""

import asyncio

import numpy as np
import pytest
from helpers import run

from asyncrl.config import loading as configuration
from asyncrl.engines.base import Engine
from asyncrl.envs.attempt import EnvFault
from asyncrl.models.loading import load_tokenizer
from asyncrl.models.tiny import build_tiny
from asyncrl.runtime.build import build_rollout
from asyncrl.runtime.placement import plan
from asyncrl.runtime.rollout_worker import Rollout, sample_seed
from asyncrl.types import Completion, Prompt, Sampling

DIGITS = '["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]'
PROMPTS = [Prompt(number, (1, 2), "") for number in range(8)]


class Interrupting(Engine):
    """Ends every second request after two tokens, as an engine does that aborts on update."""

    num_ranks, busy_s = 1, 0.0

    def __init__(self):
        self.calls = []

    async def generate(self, token_ids, sampling, seed):
        self.calls.append((tuple(token_ids), sampling.max_new_tokens, seed))
        aborted = len(self.calls) % 2 == 1
        new = np.arange(2 if aborted else sampling.max_new_tokens, dtype=np.int32) + 10 * len(self.calls)
        version = len(self.calls)
        versions, finish = np.full(len(new), version, np.int32), "abort" if aborted else "length"
        return Completion(new, -np.ones(len(new), np.float32), versions, finish, {version: f"digest {version}"})


class Echo:
    max_prompt_tokens = 2

    async def play(self, prompt, generate):
        from asyncrl.envs.base import single_turn

        return single_turn(prompt, await generate(prompt.token_ids), 1.0)


def test_an_aborted_request_goes_on_where_it_stopped():
    engine = Interrupting()
    rollout = Rollout(engine, Echo(), Sampling(5), group_size=1, seed=0)
    group = run(rollout.run(PROMPTS[0]))
    (attempt,) = group.trajectories
    assert attempt.token_ids.tolist() == [1, 2, 10, 11, 20, 21, 22]
    assert attempt.versions.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert (group.oldest, group.newest, group.lengths) == (1, 2, (5,))
    assert group.digests == {1: "digest 1", 2: "digest 2"}
    assert [(call[0], call[1]) for call in engine.calls] == [((1, 2), 5), ((1, 2, 10, 11), 3)]
    assert engine.calls[0][2] != engine.calls[1][2], "the same seed would repeat the same draws"


def test_seeds_differ_by_everything_that_is_sampled():
    seeds = {sample_seed(r, p, s, t) for r in range(3) for p in range(3) for s in range(3) for t in range(3)}
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3, 4) == sample_seed(1, 2, 3, 4)


def test_an_attempt_that_fails_ends_the_others_of_its_group():
    class OneFails:
        played = cancelled = 0

        async def play(self, _prompt, _generate):
            self.played += 1
            if self.played == 4:
                raise KeyError("x")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    async def body():
        env = OneFails()
        with pytest.raises(EnvFault, match="KeyError"):
            await Rollout(Interrupting(), env, Sampling(5), group_size=4, seed=0).run(PROMPTS[0])
        await asyncio.sleep(0)
        assert env.cancelled == 3

    run(body())


def test_replies_end_at_the_texts_that_the_configuration_names(tmp_path):
    build_tiny(tmp_path, init_std=0.1, seed=3)
    config = configuration.load(None, ["rollout.max_new_tokens=40", f"rollout.stop={DIGITS}", "eval.num_samples=1"])

    async def play():
        rollout = await build_rollout(config, str(tmp_path), plan(config, 0))
        group = await rollout.run(PROMPTS[0])
        (held,) = await rollout.evaluate([PROMPTS[1]])
        await rollout.close()
        return group.trajectories, held

    played, held = run(play())
    decode = load_tokenizer(tmp_path).decode
    replies = [decode(one.token_ids[one.mask].tolist()) for one in played]
    assert all(not any(map(str.isdigit, reply[:-1])) for reply in replies)
    assert any(reply[-1].isdigit() and one.finish == "stop" for reply, one in zip(replies, played, strict=True))
    assert held.metrics["truncated"] == 0
    assert held.lengths[0] < 40
