"""The main job on two Ray nodes of one host, the learner on one and the rollout actors on the other.

The nodes have addresses of their own within 127.0.0.0/8, all of which Linux answers, and neither is 127.0.0.1: a
rendezvous that took localhost for the learner's node would show.
"""

import asyncio
import sys
from contextlib import asynccontextmanager, closing

import msgspec
import pytest
from helpers import run
from ray.cluster_utils import Cluster

from asyncrl.config import loading as configuration
from asyncrl.driver import run as job
from asyncrl.driver.loop import LOST
from asyncrl.monitor import metrics
from asyncrl.recovery import journal
from asyncrl.runtime import ray_cluster as runtime

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(sys.platform != "linux", reason="other systems answer only 127.0.0.1"),
]
ROLLOUT_ADDRESS, LEARNER_ADDRESS = "127.0.0.2", "127.0.0.3"
COMMON = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
NUM_STEPS = 3
SMALL = [
    "env.path=asyncrl.envs.digits:SortDigits",
    "rollout.max_new_tokens=8",
    "rollout.group_size=4",
    "rollout.num_actors=2",
    "learner.groups_per_step=4",
    "eval.num_prompts=8",
    "eval.every=2",
    f"num_steps={NUM_STEPS}",
    "cluster.learner_resources={learner_node=1}",
    "cluster.rollout_resources={rollout_node=1}",
]


@pytest.fixture(scope="module")
def nodes():
    """A cluster that is there before the runs and after them. The driver's own node, the head, is not the learner's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_health_check_period_ms", "500")  # 3 s as it comes; a dead node is one that missed five
        patch.setenv("RAY_max_direct_call_object_size", "0")  # tokens lie on the node that made them, however few
        cluster = Cluster()
        try:
            cluster.add_node(node_ip_address=ROLLOUT_ADDRESS, resources={"rollout_node": 4}, **COMMON)
            cluster.add_node(node_ip_address=LEARNER_ADDRESS, resources={"learner_node": 1}, **COMMON)
            yield cluster
        finally:
            cluster.shutdown()


def load(folder, *words):
    return configuration.load(None, [*SMALL, f"run_dir={folder}", *words])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_learner_and_the_rollout_actors_train_on_nodes_of_their_own(nodes, tmp_path, monkeypatch, num_ranks):
    seen = {"hosts": set()}
    open_actors, rendezvous = runtime.open_actors, runtime.RemoteLearner.rendezvous

    @asynccontextmanager
    async def watched_actors(*arguments):
        async with open_actors(*arguments) as (learner, actors):
            seen["learner"], seen["actors"] = learner.facts, [actor.facts for actor in actors]
            yield learner, actors

    async def watched_rendezvous(learner, world_size):
        where = await rendezvous(learner, world_size)
        seen["hosts"].add(where.host)
        return where

    monkeypatch.setattr(runtime, "open_actors", watched_actors)
    monkeypatch.setattr(runtime.RemoteLearner, "rendezvous", watched_rendezvous)
    words = [f"learner.num_gpus={num_ranks}", f"cluster.learner_resources={{learner_node={1 / num_ranks}}}"]
    result = run(job.train(load(tmp_path, f"cluster.address={nodes.address}", *words), quiet=True), seconds=60)

    (rollout_node,) = {facts["node"] for facts in seen["actors"]}
    assert len(seen["actors"]) == 2
    (learner_node,) = {facts["node"] for facts in seen["learner"]}
    assert len(seen["learner"]) == num_ranks
    assert learner_node != rollout_node
    assert {facts["address"] for facts in seen["actors"]} == {ROLLOUT_ADDRESS}
    assert {facts["address"] for facts in seen["learner"]} == {LEARNER_ADDRESS}
    assert seen["hosts"] == {LEARNER_ADDRESS}
    rows = [row for row in metrics.read(result.folder) if "reward/mean" in row]
    assert [row["version"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert [row["rollout/num_actors"] for row in rows] == [2] * NUM_STEPS
    assert result.accuracy is not None
    assert nodes.remaining_processes_alive(), "the run ended a cluster that was not its own"


@pytest.mark.timeout(150)
def test_a_node_that_dies_takes_its_actors_and_their_finished_groups_along_and_no_more(nodes, tmp_path, monkeypatch):
    """The learner asks for tokens that were there: it drops the batch, and every prompt is told of."""
    dying = nodes.add_node(node_ip_address="127.0.0.4", resources={"mortal_node": 1}, **COMMON)
    gradient, start, play = runtime.RemoteLearner.gradient, runtime.start_rollout, runtime.RemoteRollout.run
    from_there, struck = set(), []

    async def noted(actor, prompt):
        group = await play(actor, prompt)
        if actor.name == "rollout 1":
            from_there.add(prompt.id)
        return group

    async def strike_before(learner, groups):
        if not struck and any(group.prompt.id in from_there for group in groups):
            struck.append(learner.version)
            await asyncio.to_thread(nodes.remove_node, dying, False)
        await gradient(learner, groups)

    def start_there(config, folder, store, number):
        node = "mortal_node" if number else "rollout_node"
        resources = msgspec.structs.replace(config.cluster, rollout_resources={node: 1})
        return start(msgspec.structs.replace(config, cluster=resources), folder, store, number)

    monkeypatch.setattr(runtime.RemoteLearner, "gradient", strike_before)
    monkeypatch.setattr(runtime.RemoteRollout, "run", noted)
    monkeypatch.setattr(runtime, "start_rollout", start_there)
    words = [f"cluster.address={nodes.address}", "num_steps=8", "buffer.max_staleness=3", "rollout.max_replacements=0"]
    result = run(job.train(load(tmp_path, *words, "eval.every=0"), quiet=True), seconds=80)
    assert result.version == 8
    assert [row["rollout/num_actors"] for row in metrics.read(result.folder) if "reward/mean" in row][-1] == 1
    with closing(journal.Journal(result.folder / "journal.bin")) as written:
        totals, num_drawn = written.accounts.totals(), written.accounts.next_id
    assert totals["trained"] == 8 * 4
    assert totals[LOST] >= 4
    assert totals.total() == num_drawn


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cluster.learner_resources={no_such_node=1}", "needs 1 of the Ray resource 'no_such_node' .* has 0:"),
        ("cluster.rollout_resources={rollout_node=3}", "needs 6 of the Ray resource 'rollout_node' .* has 4:"),
    ],
)
def test_a_placement_that_no_node_can_take_is_refused(nodes, tmp_path, word, message):
    with pytest.raises(ValueError, match=message):
        run(job.train(load(tmp_path, f"cluster.address={nodes.address}", word), quiet=True), seconds=30)
    assert nodes.remaining_processes_alive()


def test_a_run_without_an_address_starts_a_ray_of_its_own(nodes, tmp_path):
    """Beside a cluster that has what it asks for: it is told that its own has not."""
    with pytest.raises(ValueError, match=r"'learner_node' .* has 0:"):
        run(job.train(load(tmp_path), quiet=True), seconds=40)
    assert nodes.remaining_processes_alive()
