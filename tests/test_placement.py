"""GPUs are split, or refused with the numbers, before anything starts."""

import pytest

from asyncrl import config as configuration
from asyncrl.runtime.placement import Placement, plan


def placed(num_gpus, *words):
    return plan(configuration.load(None, list(words)), num_gpus)


def test_without_gpus_everything_is_on_the_cpu():
    assert placed(0, "rollout.num_actors=4") == Placement("cpu", 0, 0, "gloo")
    assert placed(8, "device=cpu") == Placement("cpu", 0, 0, "gloo")


def test_disaggregated_actors_have_gpus_of_their_own():
    assert placed(5, "rollout.num_actors=4") == Placement("cuda", 1, 1, "nccl")
    words = ["rollout.engine=sglang", "rollout.tensor_parallel_size=2", "rollout.num_actors=3"]
    assert placed(8, *words) == Placement("cuda", 1, 2, "nccl")
    assert placed(5, "rollout.num_actors=4", "weights.backend=gloo").backend == "gloo"


@pytest.mark.parametrize("num_actors", [1, 2, 6])
def test_colocated_actors_share_one_gpu(num_actors):
    placement = placed(1, "placement=colocated", f"rollout.num_actors={num_actors}")
    assert placement.learner_gpus + num_actors * placement.rollout_gpus <= 1
    assert placement.rollout_gpus > 0
    assert placement.backend == "gloo"


@pytest.mark.parametrize(
    ("num_gpus", "words", "message"),
    [
        (4, ["rollout.num_actors=4"], r"needs 5 GPUs \(1 for the learner, 4 x 1 for engines\), 4 exist"),
        (0, ["device=cuda", "placement=colocated"], r"needs 1 GPUs \(to share\), 0 exist"),
        (
            1,
            ["placement=colocated", "rollout.engine=sglang", "rollout.tensor_parallel_size=2"],
            "tensor_parallel_size is 2; set both to 1",
        ),
        (0, ["weights.backend=nccl"], "needs a GPU for each engine"),
    ],
)
def test_a_wrong_split_says_what_is_needed(num_gpus, words, message):
    with pytest.raises(ValueError, match=message):
        placed(num_gpus, *words)
