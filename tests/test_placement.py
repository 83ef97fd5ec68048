"""GPUs and nodes are shared out, or refused with the numbers, before any actor starts."""

import pytest

from asyncrl import config as configuration
from asyncrl.runtime.placement import Placement, check_resources, plan


def placed(num_gpus, *words):
    return plan(configuration.load(None, list(words)), num_gpus)


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
