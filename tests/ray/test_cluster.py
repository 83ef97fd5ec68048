"""The main job on Ray actors: what only processes can show. One Ray session a test, small models, few steps."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from helpers import is_loopback, listening, run, session_of

from asyncrl.config import loading as configuration
from asyncrl.config.schema import Config, LearnerConfig, RolloutConfig
from asyncrl.driver import build as assembly
from asyncrl.driver import run as job
from asyncrl.driver.rollout_pool import RolloutPool
from asyncrl.engines.base import EngineDied
from asyncrl.envs.base import load_env
from asyncrl.models.loading import load_tokenizer
from asyncrl.monitor import metrics
from asyncrl.recovery import checkpoint
from asyncrl.runtime import ray_cluster as cluster
from asyncrl.runtime import ray_handles as remotes
from asyncrl.runtime.handles import ActorDied, TokensLost
from asyncrl.runtime.placement import Placement
from asyncrl.runtime.ray_cluster import open_actors
from asyncrl.runtime.ray_handles import RemoteLearner, RemoteRollout
from asyncrl.training.warmup import prepare
from asyncrl.types import Prompt

ROOT = Path(__file__).parents[2]
SMALL = [
    "env.path=asyncrl.envs.digits:SortDigits",
    "rollout.max_new_tokens=8",
    "rollout.group_size=4",
    "learner.groups_per_step=4",
    "eval.num_prompts=8",
    "eval.every=2",
]
UNLEARNT = [
    "rollout.num_actors=3",
    "rollout.max_running=1",
    "algorithm.loss.entropy_bonus=0.1",  # random weights earn no reward here, and a step has to change them
]


class Remotely:
    """A Ray actor whose calls all fail."""

    def __init__(self, error):
        async def fail():
            raise error

        def exchange(prompts):
            answers: Future = Future()
            if isinstance(error, EngineDied):  # the process lives, and says so of each prompt
                answers.set_result([(number, error) for number, _ in prompts])
            else:
                answers.set_exception(error)
            return SimpleNamespace(future=lambda: answers), []

        method = SimpleNamespace(remote=lambda *_: asyncio.ensure_future(fail()))
        self.evaluate = self.join = self.release = self.update_weights = method
        self.exchange = SimpleNamespace(remote=exchange)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (EngineDied("process 7 ended"), "its engine ended: process 7 ended"),
        (ray.exceptions.ActorUnavailableError("process 7 ended", None), "its process cannot be reached"),
        (ray.exceptions.OutOfMemoryError("process 7 ended"), "out of memory"),
        (ray.exceptions.NodeDiedError("process 7 ended"), "its node was lost"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_actor_dies_with_its_engine_its_node_or_its_memory(error, cause):
    async def body():
        actor = RemoteRollout("rollout 3", Remotely(error), {"num_ranks": 1})
        calls = [actor.run(Prompt(0, (1,), "")), actor.evaluate([]), actor.release(), actor.update_weights([], 1)]
        for call in calls:
            with pytest.raises(ActorDied, match=cause):
                await call

    run(body())


@pytest.mark.parametrize(("others", "error"), [(["lost"], TokensLost), (["begun"], RuntimeError), ([], TokensLost)])
def test_a_step_without_tokens_is_given_up_only_if_no_rank_has_begun_it(monkeypatch, others, error):
    monkeypatch.setattr(remotes, "_ALIKE_S", 0.05)

    async def gradient(what):
        if what == "begun":
            await asyncio.Event().wait()  # for the other rank, in a collective
        raise ray.exceptions.ObjectLostError("0" * 56, None, "")

    def rank(what):
        return SimpleNamespace(gradient=SimpleNamespace(remote=lambda *_: gradient(what)))

    async def body():
        learner = RemoteLearner([rank(what) for what in ["lost", *others]], 0, [], [])
        with pytest.raises(error, match="the node that held tokens of finished groups is gone") as caught:
            await learner.gradient([])
        assert type(caught.value) is error

    run(body())


def test_ranks_that_the_cluster_has_no_room_for_are_not_waited_for_without_end(monkeypatch):
    never = SimpleNamespace(ready=lambda: asyncio.Event().wait())
    monkeypatch.setattr(ray.util, "placement_group", lambda *_, **__: never)
    config = Config(learner=LearnerConfig(num_gpus=2), rollout=RolloutConfig(start_timeout_s=0.01))
    with pytest.raises(RuntimeError, match=r"the learner did not start within 0\.01 s"):
        run(cluster._place_learner(config, "", None, Placement("cuda", 1, 1, "nccl")), seconds=5)


@pytest.mark.timeout(300)
def test_four_learner_ranks_four_rollout_actors_and_an_evaluator(tmp_path):
    """What eight GPUs run, on a process each."""
    words = ["learner.num_gpus=4", "rollout.num_actors=4", "eval.num_actors=1", "num_steps=4"]
    config = configuration.load(None, [*SMALL, f"run_dir={tmp_path}", *words])
    result = run(job.train(config, quiet=True), seconds=280)
    rows = [row for row in metrics.read(result.folder) if "lag/max" in row]
    assert [row["rollout/num_actors"] for row in rows] == [4] * 4
    assert max(row["lag/max"] for row in rows) <= assembly.make_buffer(config).max_lag
    evaluated = [row["eval/mixed_versions"] for row in metrics.read(result.folder) if "eval/accuracy" in row]
    assert evaluated
    assert max(evaluated) == 0, "the evaluator holds its version"
    assert result.accuracy is not None


def test_two_learner_ranks_train_publish_save_and_go_on_as_one(tmp_path):
    words = [*SMALL, f"run_dir={tmp_path}", "learner.num_gpus=2", "rollout.num_actors=2", "num_steps=3"]
    words += ["buffer.max_staleness=0", "algorithm.loss.entropy_bonus=0.1"]  # random weights earn no reward here
    result = run(job.train(configuration.load(None, words), quiet=True), seconds=90)
    assert checkpoint.load_cursor(checkpoint.latest(result.folder / "checkpoints")).version == 3

    config = configuration.load(result.folder / "config.json", ["learner.num_gpus=1", "num_steps=5"])
    assert run(job.train(config, result.folder, quiet=True), seconds=90).version == 5
    rows = [row for row in metrics.read(result.folder) if "lag/max" in row]
    assert [row["version"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["gradient/norm"] > 0 for row in rows)
    assert all(row["mismatch/k3"] < 1e-6 for row in rows), "the engines have other weights than the learner"


def test_actors_run_uvloop_agree_on_weights_and_a_killed_one_loses_no_prompt(tmp_path, monkeypatch):
    """Kills an actor that has prompts in flight: they are played elsewhere, the next update goes to the survivors.

    Kills another one once its groups are finished: they are trained all the same.
    """
    monkeypatch.setenv("RAY_max_direct_call_object_size", "0")  # tokens lie in the object store, however few
    config = configuration.load(None, [*SMALL, *UNLEARNT, f"run_dir={tmp_path}"])

    async def body():
        folder = str(prepare(config, quiet=True))
        env = load_env(config.env.path, load_tokenizer(folder), config.env.args)
        prompts = list(itertools.islice(env.prompts("train", 0), 18))
        async with open_actors(config, folder, None) as (learner, actors):
            facts = [actor.facts for actor in actors]
            assert {fact["loop"] for fact in facts} == {"uvloop"}
            pool = RolloutPool(actors, max_attempts=3)
            await pool.update_weights(learner)
            assert len(pool.actors) == 3
            plays = [asyncio.ensure_future(pool.run(prompt)) for prompt in prompts]
            await asyncio.wait(plays, return_when=asyncio.FIRST_COMPLETED)
            os.kill(facts[1]["pid"], signal.SIGKILL)
            groups = await asyncio.gather(*plays)
            assert [group.prompt for group in groups] == prompts
            assert pool.failures == {"actor died": 1}
            await learner.gradient(groups[:4])
            await learner.apply()
            report = await pool.update_weights(learner)
            assert report["rollout/num_actors"] == 2
            assert set(pool.published) == {0, 1}
            assert len(set(pool.published.values())) == 2
            own = await asyncio.gather(*(actors[0].run(prompt) for prompt in prompts[4:8]))
            os.kill(facts[0]["pid"], signal.SIGKILL)
            with pytest.raises(ActorDied):
                await actors[0].run(prompts[0])
            await learner.gradient(own)
            await learner.apply()
            assert (await pool.update_weights(learner))["rollout/num_actors"] == 1, "found out during the update"
            assert (await pool.run(prompts[0])).oldest == 2

    run(body(), seconds=110)


@pytest.mark.timeout(200)
def test_sigterm_saves_no_process_or_open_port_is_left_and_the_run_goes_on(tmp_path):
    words = [*SMALL, f"run_dir={tmp_path}", "num_steps=100000"]
    command = [sys.executable, str(ROOT / "launch" / "run.py"), *words]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True) as process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 3 "):
                addresses = listening(session_of(process.pid))
                os.kill(process.pid, signal.SIGTERM)
    assert process.returncode == 75, "".join(lines)
    (folder,) = [path for path in tmp_path.iterdir() if path.name != "cache"]
    assert f"--resume {folder}" in "".join(lines)
    saved = checkpoint.load_cursor(checkpoint.latest(folder / "checkpoints"))
    assert saved.version >= 3
    assert not session_of(process.pid), "processes were left behind"
    assert addresses
    assert {address for address in addresses if not is_loopback(address)} == set(), "ports that other machines reach"

    config = configuration.load(folder / "config.json", [f"num_steps={saved.version + 2}"])
    result = run(job.train(config, folder, quiet=True), seconds=90)
    assert result.version == saved.version + 2
    versions = [row["version"] for row in metrics.read(folder) if "reward/mean" in row]
    assert versions == list(range(1, result.version + 1))


def test_of_rays_token_only_that_there_is_none_is_a_line(caplog, monkeypatch):
    """By Ray's own words, so that a release that changes them shows."""
    from ray._private.authentication import authentication_token_setup as tokens

    monkeypatch.setattr(cluster.ray, "init", lambda **_: None)
    cluster._start_ray(Config())
    tokens._warn_token_auth_enabled()
    assert not caplog.messages
    tokens._warn_token_auth_disabled()
    assert "Token authentication is disabled" in caplog.text


SHOWN = """
from asyncrl.config.loading import load
from asyncrl.driver import build
build.load_runtime(load(None, ["cluster.address=head:6379"]))
from ray._raylet import AuthenticationMode, get_authentication_mode
print(get_authentication_mode() == AuthenticationMode.TOKEN)
"""


def test_ray_hears_in_time_that_it_is_to_show_a_cluster_the_token(tmp_path):
    """It reads the variable when it is imported."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("made-up")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, "-c", SHOWN], env=environment, capture_output=True, text=True, check=False)
    assert told.stdout == "True\n", told.stderr
