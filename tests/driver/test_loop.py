"""The loop on the local runtime: staleness 0 is synchronous training, bounds hold, failures end the run and say why."""

import asyncio
import itertools
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from helpers import Sevens, run

from asyncrl.config import loading as configuration
from asyncrl.config.schema import AlgorithmConfig, EnvConfig
from asyncrl.driver import build as assembly
from asyncrl.driver import loop
from asyncrl.driver import run as job
from asyncrl.driver.loop import check_digests
from asyncrl.driver.rollout_pool import AllActorsDied, RolloutFailed
from asyncrl.driver.watchdog import Stalled, Watchdog
from asyncrl.envs.base import load_env
from asyncrl.models.loading import load_model, load_tokenizer
from asyncrl.monitor import metrics
from asyncrl.monitor.samples import Samples
from asyncrl.recovery import checkpoint, journal, run_folder
from asyncrl.recovery.prompt_queue import PromptQueue
from asyncrl.recovery.prompt_states import Dropped
from asyncrl.runtime.handles import ActorDied, TokensLost
from asyncrl.runtime.local import LocalLearner, open_actors
from asyncrl.runtime.rollout_worker import Rollout
from asyncrl.training.learner import Learner
from asyncrl.training.warmup import prepare
from asyncrl.types import Group, Prompt

SMALL = [
    "runtime=local",
    "num_steps=4",
    "env.path=helpers:Sevens",
    "rollout.max_new_tokens=8",
    "rollout.group_size=4",
    "learner.groups_per_step=4",
    "eval.num_prompts=8",
    "eval.every=0",  # beside a run, evaluation changes what is in an engine's batch, and with it the last bits
]


def small(tmp_path, *words):
    return configuration.load(None, [*SMALL, f"run_dir={tmp_path}", *words])


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, dtype=torch.float32, device="cpu").named_parameters())


async def synchronous(config):
    """Plain synchronous training, without the loop and the buffer: sample a batch, step, update, again."""
    folder = str(prepare(config, quiet=True))
    env = load_env(config.env.path, load_tokenizer(folder), config.env.args)
    prompts = env.prompts("train", config.seed)
    async with open_actors(config, folder, None) as (learner, actors):
        where = await learner.rendezvous(1 + len(actors))
        await asyncio.gather(learner.join(), *(actor.join(where, rank + 1) for rank, actor in enumerate(actors)))
        for _ in range(config.num_steps):
            batch = list(itertools.islice(prompts, config.learner.groups_per_step))
            groups = await asyncio.gather(*(actors[i % len(actors)].run(prompt) for i, prompt in enumerate(batch)))
            await learner.gradient(groups)
            await learner.apply()
            await learner.prepare()
            await asyncio.gather(
                learner.broadcast(), *(actor.update_weights(learner.buckets, learner.version) for actor in actors)
            )
        return {name: p.detach().clone() for name, p in learner._learner.model.named_parameters()}


@pytest.mark.parametrize("preset", ["async_default", "dapo", "decoupled_ppo"])
def test_staleness_0_reproduces_synchronous_training_exactly(tmp_path, preset):
    config = small(tmp_path, "buffer.max_staleness=0", f"algorithm.preset={preset}", "learner.learning_rate=1e-3")
    expected = run(synchronous(config))
    result = run(job.train(config, quiet=True))
    trained = parameters(checkpoint.latest(result.folder / "checkpoints"))
    initial = parameters(prepare(config, quiet=True))
    assert any(not torch.equal(initial[name], trained[name]) for name in trained), "nothing was learnt"
    assert all(torch.equal(expected[name], trained[name]) for name in expected)


def test_more_actors_than_the_default_executor_has_threads_take_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # 5 threads
    config = small(tmp_path, "rollout.num_actors=6", "num_steps=1")
    rows = metrics.read(run(job.train(config, quiet=True)).folder)
    assert [row["rollout/num_actors"] for row in rows if "rollout/num_actors" in row] == [6]


@pytest.mark.parametrize("replaced", [True, False])
def test_the_last_actor_may_die_in_the_last_evaluation(tmp_path, monkeypatch, replaced):
    config = small(tmp_path, "rollout.num_actors=1", f"rollout.max_replacements={int(replaced)}", "num_steps=1")
    evaluate, dead = Rollout.evaluate, []

    async def dying(rollout, prompts):
        if not dead:
            dead.append(rollout.name)
            raise ActorDied("gone")
        return await evaluate(rollout, prompts)

    monkeypatch.setattr(Rollout, "evaluate", dying)
    if replaced:
        assert run(job.train(config, quiet=True)).accuracy is not None
    else:
        with pytest.raises(AllActorsDied, match="the last rollout actor, rollout 0, died"):
            run(job.train(config, quiet=True))
        (folder,) = tmp_path.glob("*-sevens")
        assert checkpoint.newest(folder / "checkpoints") is not None, "what was trained is saved before"
    assert dead == ["rollout 0"]


def test_weights_change_under_requests_and_the_bound_holds(tmp_path):
    """Engines with few rows have requests in flight at every update; their versions show in the trained batches."""
    config = small(tmp_path, "buffer.max_staleness=2", "num_steps=12", "rollout.max_running=6", "rollout.num_actors=1")
    result = run(job.train(config, quiet=True))
    rows = [row for row in metrics.read(result.folder) if "lag/max" in row]
    assert [row["version"] for row in rows] == list(range(1, 13))
    bound = assembly.make_buffer(config).max_lag
    assert 0 < max(row["lag/max"] for row in rows) <= bound == 3
    assert max(row["completion/mixed_versions"] for row in rows) > 0
    assert max(row["lag/span"] for row in rows) > 0


def test_trajectories_that_cannot_be_kept_are_told_of_and_end_nothing(tmp_path, monkeypatch):
    said = []

    async def draw(_self, version, _groups):
        raise TokensLost(f"of {version}")

    monkeypatch.setattr(Samples, "draw", draw)
    monkeypatch.setattr(metrics.Metrics, "_show", lambda _self, event: said.append(event.line))
    assert run(job.train(small(tmp_path, "num_steps=2"), quiet=True)).version == 2
    assert "alarm: no trajectories of version 2 are kept: TokensLost('of 2')" in said


def test_a_batch_whose_tokens_are_lost_is_dropped_and_told_of(tmp_path, monkeypatch):
    real, said = LocalLearner.gradient, []

    async def gradient(self, groups):
        if self.version == 1 and not any("lost" in line for line in said):
            raise TokensLost("the node is gone")
        await real(self, groups)

    monkeypatch.setattr(LocalLearner, "gradient", gradient)
    monkeypatch.setattr(metrics.Metrics, "_show", lambda _self, event: said.append(event.line))
    result = run(job.train(small(tmp_path), quiet=True))
    assert "alarm: step skipped: the node is gone; its 4 groups are dropped (tokens lost)" in said
    with closing(journal.Journal(result.folder / "journal.bin")) as written:
        totals, num_drawn = written.accounts.totals(), written.accounts.next_id
    assert (totals["trained"], totals[loop.LOST]) == (16, 4)
    assert totals.total() == num_drawn


@pytest.mark.parametrize("broken", [False, True])
def test_a_stall_within_a_step_ends_the_run_after_it_with_a_checkpoint_or_says_that_there_is_none(
    tmp_path, monkeypatch, broken
):
    """Cancelled in the middle of `apply`, the driver would not know which version it saves."""
    applying, said = asyncio.Event(), []
    real_apply, real_save = LocalLearner.apply, LocalLearner.save

    async def apply(self):
        if self.version == 1:
            applying.set()
            await asyncio.sleep(0.2)
        return await real_apply(self)

    async def save(self, *arguments):
        if broken:
            raise RuntimeError("the learner is gone")
        await real_save(self, *arguments)

    async def stall(_self):
        await applying.wait()
        raise Stalled("evaluate has waited", learner_hangs=False)

    monkeypatch.setattr(LocalLearner, "apply", apply)
    monkeypatch.setattr(LocalLearner, "save", save)
    monkeypatch.setattr(Watchdog, "run", stall)
    monkeypatch.setattr(metrics.Metrics, "_show", lambda _self, event: said.append(event.line))
    with pytest.raises(Stalled, match="evaluate has waited"):
        run(job.train(small(tmp_path), quiet=True))
    (folder,) = [path for path in tmp_path.iterdir() if path.name != "cache"]
    if broken:
        assert said[-1] == "alarm: no checkpoint of version 2: RuntimeError('the learner is gone')"
    else:
        assert checkpoint.load_cursor(checkpoint.latest(folder / "checkpoints")).version == 2


@pytest.mark.parametrize("overlap", [True, False])
def test_a_gradient_is_computed_while_weights_travel_and_applied_afterwards(tmp_path, monkeypatch, overlap):
    """Each version is held on its way until the next gradient is there, or the test says that none came."""
    events, computed = [], threading.Semaphore(0)
    gradient, apply, broadcast = Learner.gradient, Learner.apply, Learner.broadcast

    def watched_gradient(learner, groups):
        gradient(learner, groups)
        if learner.version:
            events.append(("gradient", learner.version + 1))
            computed.release()

    def watched_apply(learner):
        events.append(("apply", learner.version + 1))
        return apply(learner)

    def held_broadcast(learner, audience):
        if overlap and 0 < learner.version < 3:
            assert computed.acquire(timeout=30), "no gradient was computed while the weights waited"
        events.append(("sent", learner.version))
        return broadcast(learner, audience)

    monkeypatch.setattr(Learner, "gradient", watched_gradient)
    monkeypatch.setattr(Learner, "apply", watched_apply)
    monkeypatch.setattr(Learner, "broadcast", held_broadcast)
    words = ["num_steps=3", "buffer.max_staleness=2", f"weights.overlap={str(overlap).lower()}"]
    assert run(job.train(small(tmp_path, *words), quiet=True)).version == 3
    if overlap:
        between = [("gradient", 2), ("sent", 1), ("apply", 2), ("gradient", 3), ("sent", 2), ("apply", 3)]
    else:
        between = [("sent", 1), ("gradient", 2), ("apply", 2), ("sent", 2), ("gradient", 3), ("apply", 3)]
    assert events == [("sent", 0), ("apply", 1), *between, ("sent", 3)]


def test_a_resumed_run_keeps_the_score_without_skill_and_none_is_asked_for_where_it_is_off(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("asyncrl.envs.base.no_skill", lambda *_: calls.append(1) or {"guess": 0.25})
    config = small(tmp_path)
    folder = run_folder.create(config, job.load_task(config, quiet=True).baselines)
    other = small(tmp_path, "eval.num_prompts=3", "num_steps=9")
    for now, known, asked in ((config, {"guess": 0.25}, 0), (other, {}, 1)):
        calls.clear()
        assert run_folder.known_baselines(folder, run_folder.differences(folder, now)) == known
        assert job.load_task(now, known, quiet=True).baselines == {"guess": 0.25}
        assert len(calls) == asked
    run_folder.keep_baselines(folder, {"guess": 0.5})
    assert run_folder.known_baselines(folder, []) == {"guess": 0.5}
    calls.clear()
    assert job.load_task(small(tmp_path, "eval.baseline=false"), quiet=True).baselines == {}
    assert not calls
    assert "no skill" not in job.report(job.Result(folder, 4, 0.5, {}), 4)


def test_a_run_folder_holds_everything_it_promises(tmp_path):
    config = small(tmp_path, "checkpoint.every=2", "checkpoint.keep=1", "eval.every=2")
    result = run(job.train(config, quiet=True))
    kept = configuration.load(result.folder / "config.json")
    dated = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, date=kept.model.date))
    assert configuration.to_store(kept) == configuration.to_store(dated)
    assert kept.model.date, "the day of the run, which its chat template may ask for"
    origin = json.loads((result.folder / "run.json").read_text())
    assert origin["no_skill"] == result.baselines
    names = {name for row in metrics.read(result.folder) for name in row} - {"version", "time", "timestamp"}
    assert names == set(metrics.METRICS), "the table of metrics and what is logged differ"
    assert list((result.folder / "tensorboard").glob("events*"))
    assert [folder.name for folder in (result.folder / "checkpoints").iterdir()] == ["step-000004"]
    folder = checkpoint.latest(result.folder / "checkpoints")
    assert checkpoint.load_cursor(folder).version == 4
    assert load_tokenizer(folder).encode("s12=") == load_tokenizer(str(prepare(config))).encode("s12=")
    evaluated = {row["version"] for row in metrics.read(result.folder) if "eval/accuracy" in row}
    assert {0, 4} <= evaluated <= {0, 2, 4}, "2 is left out where the evaluation of 0 still runs"


def test_ctrl_c_does_not_wait_for_an_evaluation(tmp_path, monkeypatch):
    async def endless(_system):
        await asyncio.Event().wait()

    plain = metrics.Metrics.step

    def step(sink, version, row, max_lag):
        plain(sink, version, row, max_lag)
        if version == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "evaluate", endless)
    monkeypatch.setattr(metrics.Metrics, "step", step)
    result = run(job.train(small(tmp_path, "num_steps=50", "eval.every=1"), quiet=True))
    assert 2 <= result.version < 50
    assert checkpoint.load_cursor(checkpoint.newest(result.folder / "checkpoints")).version == result.version


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    """At staleness 0 the schedule is fixed, so stopping after two steps and going on must not change a bit."""
    words = ["buffer.max_staleness=0", "learner.learning_rate=1e-3"]
    unbroken = run(job.train(small(tmp_path, *words), quiet=True))
    first = run(job.train(small(tmp_path, *words, "num_steps=2"), quiet=True))
    second = run(job.train(small(tmp_path, *words), first.folder, quiet=True))
    assert second.version == 4
    before, now = (json.loads((second.folder / f"config{at}.json").read_text()) for at in (".step-000002", ""))
    assert (before.pop("num_steps"), now.pop("num_steps")) == (2, 4)
    assert before == now
    one, other = (parameters(checkpoint.latest(r.folder / "checkpoints")) for r in (unbroken, second))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [row["version"] for row in metrics.read(second.folder) if "reward/mean" in row]
    assert rows == [1, 2, 3, 4]


def test_a_resumed_run_that_has_ended_does_nothing_but_an_evaluation_that_it_lacks(tmp_path, capsys):
    config = small(tmp_path, "num_steps=1")
    folder = run(job.train(config, quiet=True)).folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "journal.bin"}
    assert run(job.train(config, folder, quiet=True)).version == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "journal.bin"} == before
    assert "is at step 1 of 1: nothing is left to do" in capsys.readouterr().out
    rows = [row for row in metrics.read(folder) if "eval/accuracy" not in row]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(job.train(config, folder, quiet=True)).accuracy is not None


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir '.*file' cannot be written to: .*Not a directory|File exists"):
        run_folder.create(configuration.load(None, [f"run_dir={tmp_path / 'file'}"]), {})
    with pytest.raises(ValueError, match=r"run_dir '.*file' cannot be written to"):
        prepare(configuration.load(None, [f"run_dir={tmp_path / 'file'}"]))


def test_a_change_of_the_configuration_is_told_and_both_are_kept(tmp_path, monkeypatch):
    first = small(tmp_path, "env.args={max_digits=4}", "model.date='2026-12-01'")
    folder = run_folder.create(first, {})
    assert run_folder.differences(folder, first) == []
    second = small(tmp_path, "num_steps=6", "env.args={max_digits=5}")
    assert run_folder.differences(folder, second) == ["num_steps 4 -> 6", "env.args.max_digits 4 -> 5"]
    run_folder.keep(folder, second, 3)
    run_folder.keep(folder, small(tmp_path, "num_steps=7"), 3)
    kept = [configuration.load(folder / f"config.step-000003{end}.json") for end in ("", ".2")]
    assert [configuration.to_store(config) for config in kept] == [configuration.to_store(c) for c in (first, second)]
    assert configuration.load(folder / "config.json").num_steps == 7
    with pytest.raises(ValueError, match=r"model.num_layers 2 -> 3: the checkpoints of .* are of the old value"):
        run_folder.differences(folder, small(tmp_path, "model.num_layers=3"))
    monkeypatch.setattr(run_folder, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_folder.keep(folder, first, 4)
    assert configuration.load(folder / "config.json").num_steps == 7, "a run without one cannot be resumed"


@pytest.mark.parametrize(
    ("words", "change", "refused"),
    [
        (["lora.rank=4", "warmup.num_steps=2"], "warmup.batch_size=3", "128 -> 3: .* made the weights beneath the ad"),
        (["lora.rank=4", "warmup.num_steps=2"], "env.args={max_digits=5}", "weights beneath the adapters"),
        (["algorithm.loss.reference_kl=0.1"], "warmup.num_steps=1", "0 -> 1: the old value made the reference weights"),
        (["algorithm.loss.reference_kl=0.1"], "seed=1", "seed 0 -> 1: the old value made the reference weights"),
        (["lora.rank=4", "warmup.num_steps=2"], "model.path=moved", None),
        (["lora.rank=4"], "env.args={max_digits=5}", None),
        (["warmup.num_steps=2"], "warmup.batch_size=3", None),
        (["algorithm.preset=ppo"], "critic.backbone=policy", "hold the critic of the old value"),
        (
            ["critic.backbone=policy"],
            "algorithm.preset=ppo",
            "'ppo' needs a critic and the checkpoints of .* have none",
        ),
        (["critic.backbone=policy"], "critic.backbone=own", None),
        (["algorithm.preset=ppo"], "algorithm.preset=tis2", None),
    ],
)
def test_what_made_the_first_weights_cannot_change_where_they_are_still_used(tmp_path, words, change, refused):
    folder = run_folder.create(small(tmp_path, *words), {})
    config = small(tmp_path, *words, change)
    if refused is None:
        assert len(run_folder.differences(folder, config)) == 1
    else:
        with pytest.raises(ValueError, match=refused):
            run_folder.differences(folder, config)


def test_a_resume_that_is_refused_leaves_the_configuration_alone(tmp_path):
    folder = run(job.train(small(tmp_path, "num_steps=1"), quiet=True)).folder
    before, recorded = (folder / "config.json").read_bytes(), (folder / "journal.bin").read_bytes()
    with pytest.raises(ValueError, match=r"model\.num_layers 2 -> 3"):
        run(job.train(small(tmp_path, "model.num_layers=3"), folder, quiet=True))
    assert (folder / "journal.bin").read_bytes() == recorded
    assert len(list((tmp_path / "cache").iterdir())) == 1, "no model was made for it"
    with pytest.raises(ValueError, match="is not the one that the run admitted"):
        run(job.train(small(tmp_path, "env.path=asyncrl.envs.digits:LargestDigit"), folder, quiet=True))
    assert (folder / "config.json").read_bytes() == before
    assert list(folder.glob("config.step-*")) == []


class Failing:
    """Sort digits, but some prompts raise: always, or only on the first tries."""

    tries: dict[int, int]

    def __new__(cls, tokenizer, bad, times):
        from asyncrl.envs.digits import SortDigits

        env = SortDigits(tokenizer)
        play, failures = env.play, dict.fromkeys(bad, times)

        async def failing(prompt, generate):
            if failures.get(prompt.id, 0) > 0:
                failures[prompt.id] -= 1
                raise ArithmeticError("this scorer cannot count")
            return await play(prompt, generate)

        env.play = failing
        return env


def test_a_failing_rollout_is_tried_again_and_counted(tmp_path):
    config = small(tmp_path, "env.path=test_loop:Failing", "env.args={bad=[1, 5], times=1}")
    result = run(job.train(config, quiet=True))
    rows = [row for row in metrics.read(result.folder) if "rollout/failures" in row]
    assert rows[-1]["rollout/failures"] == 2, "made again where they failed, one attempt of either prompt"
    assert result.version == 4


def test_a_prompt_that_always_fails_ends_the_run_and_is_named(tmp_path):
    config = small(
        tmp_path, "env.path=test_loop:Failing", "env.args={bad=[3], times=1000}", "rollout.max_failed_prompts=0"
    )
    with pytest.raises(
        RolloutFailed,
        match=r"1 prompts in a row.*env exception.*24 attempts of prompt 3 failed.*cannot count.*rollout\.max_attempts",
    ):
        run(job.train(config, quiet=True))


def test_a_prompt_that_always_fails_is_given_up_and_counted(tmp_path):
    config = small(tmp_path, "env.path=test_loop:Failing", "env.args={bad=[9], times=1000}")
    result = run(job.train(config, quiet=True))
    records, _, _ = journal.read(result.folder / "journal.bin")
    assert [(r.ids, r.reason) for r in records if isinstance(r, Dropped)] == [((9,), "rollout failed")]
    assert result.version == 4


@pytest.mark.parametrize("num_bad", [2, 3])
def test_a_step_without_a_finite_gradient_is_skipped_and_too_many_end_the_run(tmp_path, monkeypatch, num_bad):
    real, calls = torch.nn.utils.clip_grad_norm_, itertools.count()

    def clip(*arguments):
        norm = real(*arguments)
        return norm * float("nan") if 1 <= next(calls) <= num_bad else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    config = small(tmp_path, "learner.max_skipped_steps=2")
    if num_bad > 2:
        with pytest.raises(RuntimeError, match=r"3 optimizer steps in a row .*max_skipped_steps is 2.*groups \["):
            run(job.train(config, quiet=True))
        (folder,) = [path for path in tmp_path.iterdir() if path.name != "cache"]
    else:
        result = run(job.train(config, quiet=True))
        assert result.version == 4
        folder = result.folder
        rows = [row for row in metrics.read(folder) if "learner/skipped" in row]
        assert [(row["version"], row["learner/skipped"]) for row in rows] == [(1, 0), (2, 2), (3, 2), (4, 2)]
        assert rows[-1]["buffer/dropped"] == 8
    noted = [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
    assert [len(entry["groups"]) for entry in noted] == [4] * num_bad
    ids = {group["id"] for entry in noted for group in entry["groups"]}
    records, _, _ = journal.read(folder / "journal.bin")
    dropped = {number for r in records if isinstance(r, Dropped) for number in r.ids}
    assert dropped <= ids
    assert len(dropped) == 8


def test_saving_does_not_pause_generation(tmp_path, monkeypatch):
    """The save is held until prompts that were issued after it began are finished."""
    real, begun, finished = checkpoint.write, threading.Event(), threading.Event()

    def held(*arguments, **words):
        begun.set()
        assert finished.wait(30), "no group was finished while the checkpoint was being written"
        return real(*arguments, **words)

    generated = PromptQueue.generated

    def watched(queue, group):
        if begun.is_set():
            finished.set()
        generated(queue, group)

    monkeypatch.setattr(checkpoint, "write", held)
    monkeypatch.setattr(PromptQueue, "generated", watched)
    config = small(tmp_path, "checkpoint.every=2", "num_steps=3")
    assert run(job.train(config, quiet=True)).version == 3


def test_zero_variance_groups_are_replaced_not_lost(tmp_path):
    words = ["algorithm.drop_zero_variance=true", "rollout.max_new_tokens=1", "learner.groups_per_step=2"]
    config = small(tmp_path, *words, "num_steps=3")
    result = run(job.train(config, quiet=True))
    rows = [row for row in metrics.read(result.folder) if "buffer/dropped" in row]
    assert rows[-1]["buffer/dropped"] > 0
    assert all(row["reward/zero_variance"] == 0 for row in rows)
    assert any(row["reward/generated_zero_variance"] > 0 for row in rows)
    assert any(row["reward/generated"] != row["reward/mean"] for row in rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"algorithm": AlgorithmConfig(preset="reinforce")},
            "off-policy training needs a corrected loss",
        ),
        ({"num_steps": "5"}, "num_steps must be a whole number, got '5'"),
        (
            {"env": EnvConfig(args={"reward": run})},
            "name a function by its import path, 'package.module:f",
        ),
    ],
)
def test_a_configuration_from_python_is_checked_like_one_from_a_file(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        run(job.train(msgspec.structs.replace(small(tmp_path), **changed), quiet=True))
    assert not list(tmp_path.glob("*/config.json"))


def test_a_run_may_be_in_a_thread(tmp_path):
    config = small(tmp_path, "num_steps=1")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, job.train(config, quiet=True)).result().version == 1


class Same(Sevens):
    """Scores every reply alike."""

    async def play(self, prompt, generate):
        return replace(await super().play(prompt, generate), reward=0.5)


def test_groups_that_are_all_dropped_are_an_alarm_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "_MANY_EQUAL", 5)
    words = ["env.path=test_loop:Same", "algorithm.drop_zero_variance=true", "rollout.max_new_tokens=1"]

    async def until_many_were_dropped():
        task = asyncio.create_task(job.train(small(tmp_path, *words)))
        while not buffers or buffers[0].dropped["zero variance"] < 20:
            await asyncio.sleep(0.01)
        buffers[0].close()
        return await task

    buffers, make = [], job.make_buffer
    monkeypatch.setattr(job, "make_buffer", lambda config: buffers.append(make(config)) or buffers[0])
    assert run(until_many_were_dropped()).version == 0
    assert capsys.readouterr().out.count("had equal rewards and were dropped") == 1


def test_rewards_that_teach_nothing_are_an_alarm_once(tmp_path, capsys):
    words = ["env.path=test_loop:Same", "learner.groups_per_step=1", "rollout.max_new_tokens=1", "num_steps=12"]
    run(job.train(small(tmp_path, *words)))
    lines = capsys.readouterr().out.splitlines()
    [alarm] = [number for number, line in enumerate(lines) if "every advantage was 0" in line]
    assert lines[alarm - 1].startswith("step 10 ")


def test_tokens_of_unknown_weights_end_the_run():
    group = Group(Prompt(7, (1,), ""), (0.0,), (1,), 2, 2, {2: "aaaa"}, {}, ())
    check_digests([group], {2: "aaaa"})
    with pytest.raises(RuntimeError, match=r"group 7 was generated by weights aaaa under version 2.*published as bbbb"):
        check_digests([group], {2: "bbbb"})
