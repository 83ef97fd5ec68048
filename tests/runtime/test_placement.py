"""GPUs and nodes are shared out, or refused with the numbers, before any actor starts."""

import asyncio
import os
from pathlib import Path

import pytest
from helpers import run

from asyncrl.config import loading as configuration
from asyncrl.config.cores import Threads, count, share, with_limit
from asyncrl.runtime import ray_cluster as cluster
from asyncrl.runtime.placement import Placement, check_resources, check_room, plan

ROOT = Path(__file__).parents[2]


def placed(num_gpus, *words):
    return plan(configuration.load(None, list(words)), num_gpus)


def test_when_the_learner_cannot_start_the_rollout_actors_are_ended_before_ray_is(monkeypatch):
    ended = []

    async def place_learner(*_):
        return []

    async def fail(_ranks):
        raise ValueError("no GPU")

    async def wait(*_):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    for name, stand_in in (("_place_learner", place_learner), ("_start_learner", fail), ("start_rollout", wait)):
        monkeypatch.setattr(cluster, name, stand_in)
    config = configuration.load(None, ["rollout.num_actors=3"])

    async def body():
        with pytest.raises(ValueError, match="no GPU"):
            await cluster._start_actors(config, "", None, placed(0), None)
        return len(ended)

    assert run(body()) == 3


def test_without_gpus_everything_is_on_the_cpu():
    assert placed(0, "rollout.num_actors=4") == Placement("cpu", 0, 0, "gloo")
    assert placed(8, "device=cpu") == Placement("cpu", 0, 0, "gloo")


def test_disaggregated_actors_have_gpus_of_their_own():
    assert placed(5, "rollout.num_actors=4") == Placement("cuda", 1, 1, "nccl")
    words = ["rollout.engine=sglang", "rollout.dtype=bfloat16"]
    words += ["rollout.tensor_parallel_size=2", "rollout.num_actors=3"]
    assert placed(8, *words) == Placement("cuda", 1, 2, "nccl")
    assert placed(5, "rollout.num_actors=4", "weights.backend=gloo").backend == "gloo"


def test_each_learner_rank_has_a_gpu():
    words = ["rollout.num_actors=4", "learner.num_gpus=4"]
    assert placed(8, *words) == Placement("cuda", 1, 1, "nccl")
    with pytest.raises(ValueError, match=r"needs 8 GPUs \(4 for the learner, 4 x 1 for engines\), 7 exist"):
        placed(7, *words)
    assert placed(0, *words) == Placement("cpu", 0, 0, "gloo")
    assert plan(configuration.load(ROOT / "configs" / "qwen2.5_7b_gsm8k_8gpu.toml"), 8).rollout_gpus == 1
    with pytest.raises(ValueError, match=r"learner\.num_gpus is 4 and .* set both to 1"):
        placed(8, *words, "placement=colocated")


@pytest.mark.parametrize("num_actors", [1, 2, 6])
def test_colocated_actors_share_one_gpu(num_actors):
    placement = placed(1, "placement=colocated", f"rollout.num_actors={num_actors}")
    assert placement.learner_gpus + num_actors * placement.rollout_gpus <= 1
    assert placement.rollout_gpus > 0
    assert placement.backend == "ipc"
    assert (
        placed(1, "placement=colocated", f"rollout.num_actors={num_actors}", "weights.backend=gloo").backend == "gloo"
    )


@pytest.mark.parametrize(
    ("num_gpus", "words", "message"),
    [
        (4, ["rollout.num_actors=4"], r"needs 5 GPUs \(1 for the learner, 4 x 1 for engines\), 4 exist"),
        (0, ["device=cuda", "placement=colocated"], r"needs 1 GPUs \(to share\), 0 exist"),
        (
            1,
            [
                "placement=colocated",
                "rollout.engine=sglang",
                "rollout.dtype=bfloat16",
                "rollout.tensor_parallel_size=2",
            ],
            "tensor_parallel_size is 2; set both to 1",
        ),
        (2, ["rollout.engine=sglang", "rollout.num_actors=1"], "take no float32: set rollout.dtype=bfloat16"),
        (0, ["weights.backend=nccl"], "needs a GPU for each engine"),
        (1, ["placement=colocated", "weights.backend=nccl"], "needs a GPU for each engine"),
        (3, ["weights.backend=ipc"], "needs one GPU that the learner and the engines share: set placement=colocated"),
    ],
)
def test_a_wrong_split_says_what_is_needed(num_gpus, words, message):
    with pytest.raises(ValueError, match=message):
        placed(num_gpus, *words)


NODES = ["rollout.num_actors=3", "cluster.learner_resources={big=1}", "cluster.rollout_resources={small=0.1}"]


@pytest.mark.parametrize(
    ("existing", "words"),
    [
        ({"CPU": 2.0}, []),
        ({"big": 1.0, "small": 0.3}, NODES),
        ({"big": 1.3}, [*NODES, "cluster.rollout_resources={big=0.1}"]),
    ],
)
def test_custom_resources_that_suffice_are_accepted(existing, words):
    check_resources(configuration.load(None, words), existing)


@pytest.mark.parametrize(
    ("existing", "words", "message"),
    [
        (
            {"small": 0.3},
            NODES,
            r"needs 1 of the Ray resource 'big' \(1 x 1 for the learner, 3 x 0 .*, the cluster has 0:",
        ),
        ({"big": 1.0, "small": 0.2}, NODES, r"needs 0.3 .* 'small' \(1 x 0 .*, 3 x 0.1 .*, the cluster has 0.2: start"),
        ({"big": 1.0}, [*NODES, "cluster.rollout_resources={big=0.1}"], "needs 1.3 .*'big'"),
        ({"big": 3.0, "small": 1.0}, [*NODES, "learner.num_gpus=4"], r"needs 4 .*'big' \(4 x 1 for the learner"),
    ],
)
def test_a_custom_resource_that_is_short_is_named(existing, words, message):
    with pytest.raises(ValueError, match=message):
        check_resources(configuration.load(None, words), existing)


@pytest.mark.parametrize(
    ("words", "cores", "learner", "engine"),
    [
        ([], 2, 1, 1),
        ([], 16, 5, 5),
        (["eval.num_actors=1", "learner.num_gpus=2"], 16, 3, 3),
        (["runtime=local"], 16, 8, 8),
        (["rollout.num_threads=2"], 16, 5, 2),
        (["rollout.num_threads=2", "learner.num_threads=10"], 4, 10, 2),
    ],
)
def test_cores_are_divided_over_what_computes(words, cores, learner, engine):
    assert share(configuration.load(None, words), cores) == Threads(learner, engine)


@pytest.mark.parametrize(
    ("limit", "given"), [("3", (3, 2)), ("4,1", (4, 2)), ("", ("auto", 2)), ("x", ("auto", 2)), (None, ("auto", 2))]
)
def test_the_users_own_limit_of_threads_stands_in_for_auto(monkeypatch, limit, given):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if limit is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    config = with_limit(configuration.load(None, ["rollout.num_threads=2"]))
    assert (config.learner.num_threads, config.rollout.num_threads) == given


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("400000 100000", 4), ("50000 100000", 1), (None, 8)])
def test_cores_are_those_of_the_container(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert count(tmp_path / "cpu.max") == cores


COLOCATED = ["placement=colocated", "rollout.num_actors=2"]


@pytest.mark.parametrize(
    ("existing", "words", "num_actors"),
    [
        ({"CPU": 2.0}, [], 2),
        ({}, ["eval.num_actors=1"], 9),
        ({"CPU": 2.0, "GPU": 5.0}, ["rollout.num_actors=2"], 4),
        ({"CPU": 2.0, "GPU": 1.0}, COLOCATED, 2),
    ],
)
def test_as_many_actors_as_there_is_room_for_may_be_asked_for(existing, words, num_actors):
    check_room(configuration.load(None, words), num_actors, existing)


@pytest.mark.parametrize(
    ("existing", "words", "num_actors", "message"),
    [
        ({"CPU": 2.0}, [], 3, r"3 engines x 1 threads \(rollout.num_threads\) share 2 CPU cores .* fewer"),
        ({"CPU": 8.0}, ["eval.num_actors=1", "rollout.num_threads=2"], 4, "5 engines x 2 threads"),
        ({"CPU": 2.0, "GPU": 5.0}, ["rollout.num_actors=2"], 5, "5 engines need 6 GPUs, 5 exist: .* after 900 s"),
        ({"CPU": 2.0, "GPU": 1.0}, COLOCATED, 3, "3 engines need 1.32 GPUs, 1 exist"),
    ],
)
def test_more_actors_than_there_is_room_for_are_told_with_the_numbers(existing, words, num_actors, message):
    with pytest.raises(ValueError, match=message):
        check_room(configuration.load(None, words), num_actors, existing)
