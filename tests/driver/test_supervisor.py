"""Rollout actors that die are replaced, and their number changes, while a run on Ray goes on."""

import asyncio
import os
import signal

import pytest
from helpers import run

from asyncrl.config import loading as configuration
from asyncrl.driver import run as job
from asyncrl.driver.supervisor import request
from asyncrl.monitor import metrics
from asyncrl.recovery import journal
from asyncrl.recovery.prompt_states import Admitted, Batch
from asyncrl.runtime import ray_cluster as cluster

WORDS = [
    "env.path=asyncrl.envs.digits:SortDigits",
    "rollout.max_new_tokens=8",
    "rollout.group_size=4",
    "learner.groups_per_step=4",
    "eval.num_prompts=8",
    "eval.every=0",
    "num_steps=100000",
    "checkpoint.every=0",
]


@pytest.mark.timeout(300)
def test_a_killed_actor_is_replaced_and_the_number_changes_during_a_run(tmp_path, monkeypatch):
    started, real = [], cluster.start_rollout

    async def watched(*arguments):
        started.append(await real(*arguments))
        return started[-1]

    monkeypatch.setattr(cluster, "start_rollout", watched)
    config = configuration.load(None, [*WORDS, f"run_dir={tmp_path}"])

    async def body():
        training = asyncio.ensure_future(job.train(config, quiet=True))

        async def until(num_actors, after):
            while True:
                rows = [row for path in tmp_path.glob("*/metrics.jsonl") for row in metrics.read(path.parent)]
                steps = [row for row in rows if row["version"] > after]
                if steps and steps[-1]["rollout/num_actors"] == num_actors:
                    return steps[-1]["version"]
                assert not training.done(), training.result()
                await asyncio.sleep(0.1)

        at = await until(2, 0)
        (folder,) = [path for path in tmp_path.iterdir() if path.name != "cache"]
        assert "most recent call first" in await cluster._stacks_of(started[0].facts)
        os.kill(started[0].facts["pid"], signal.SIGKILL)
        at = await until(1, at)
        at = await until(2, at)
        request(folder, 1)
        at = await until(1, at)
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)
        return folder, at

    folder, last = run(body(), seconds=280)
    assert sorted(actor.name for actor in started) == [f"rollout {number}" for number in range(3)]
    records, _, _ = journal.read(folder / "journal.bin")
    trained = [number for record in records if isinstance(record, Batch) for number in record.ids]
    assert len(trained) == len(set(trained)) >= 4 * last
    accounts = journal.Journal(folder / "journal.bin").accounts
    admitted = {record.id for record in records if isinstance(record, Admitted)}
    assert set(trained) | set(accounts.open_ids) == admitted == set(range(accounts.next_id)), "a prompt was lost"
