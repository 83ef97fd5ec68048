"""A learner of several ranks does what a learner of one does. Ranks are processes that meet over gloo."""

import multiprocessing
import os
import shutil
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from helpers import trajectory
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from asyncrl.config import loading as configuration
from asyncrl.models.loading import empty_model, load_model
from asyncrl.models.tiny import build_tiny
from asyncrl.recovery import checkpoint
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.runtime.build import LearnerPart
from asyncrl.runtime.placement import plan
from asyncrl.training import sharding
from asyncrl.training.learner import Learner
from asyncrl.training.sharding import Ranks, join_ranks
from asyncrl.weights.broadcast import BroadcastGroup, open_rendezvous
from asyncrl.weights.buckets import digest_of

pytestmark = pytest.mark.timeout(120)
SMALL = ["learner.micro_batch_tokens=70", "learner.learning_rate=1e-3", "rollout.max_new_tokens=12"]
EVERYTHING = [  # each changes what a pass computes: a reference model, an entropy gradient, and what is computed twice
    *SMALL,
    "algorithm.loss.reference_kl=0.1",
    "algorithm.loss.reward_kl=0.1",
    "algorithm.loss.entropy_bonus=0.05",
    "learner.activation_checkpointing=true",
    "learner.head_chunk=7",
    "algorithm.preset=vcpo",  # whose learning rate comes from all ranks' ratios
]

WHOLE_STEP = [  # advantages and a threshold that no rank can compute from its own tokens
    *SMALL,
    "algorithm.loss.reward_kl=0.1",
    "algorithm.loss.reward_kl_level=sequence",
    "algorithm.preset=m2po",
]

CHARGED = [*SMALL, "algorithm.loss.reward_kl=0.1", "algorithm.loss.scale=group_std"]  # deviations of each group
WHITE = [*SMALL, "algorithm.loss.reward_kl=0.1", "algorithm.preset=reinforce_pp"]  # and of all tokens

LORA = [
    *SMALL,
    "lora.rank=3",  # which two and four ranks share out unevenly
    "learner.learning_rate=1e-2",
    "algorithm.loss.reference_kl=0.1",
    "algorithm.loss.reward_kl=0.1",
    "learner.activation_checkpointing=true",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_tiny(path, seed=3)
    return str(path)


@pytest.fixture(scope="module")
def processes():
    """One executor for each rank, so that a rank is always the same process, with a GPU of its own if there are any."""
    num_gpus = torch.cuda.device_count()
    context = multiprocessing.get_context("spawn" if num_gpus else "forkserver")
    if not num_gpus:
        context.set_forkserver_preload(["asyncrl.runtime.build"])
    pools = [ProcessPoolExecutor(1, mp_context=context) for _ in range(4)]
    started = []
    with pytest.MonkeyPatch.context() as patch:
        for rank, pool in enumerate(pools):
            if num_gpus:
                patch.setenv("CUDA_VISIBLE_DEVICES", str(rank % num_gpus))
            started.append(pool.submit(make_groups, []))
    for call in started:  # they have imported this module: ranks that meet do not wait for that
        call.result()
    yield pools
    for pool in pools:
        pool.shutdown()


@pytest.fixture
def on_ranks(processes):
    """`on_ranks(n, function, ...)` returns what `function(ranks, ...)` returns at each of n ranks."""

    def call(num_ranks, function, *arguments, device="cpu"):
        where, store = open_rendezvous("127.0.0.1", num_ranks, 40)  # which also ends a collective that waits in vain
        calls = [processes[rank].submit(at_rank, where, rank, device, function, arguments) for rank in range(num_ranks)]
        answers = [call.result() for call in calls]
        del store  # the ranks met at it
        return answers

    return call


def at_rank(where, rank, device, function, arguments):
    torch.set_num_threads(1)
    if device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)  # one process sees one GPU, as Ray has it
    ranks = join_ranks(where, rank, device)
    try:
        return function(ranks, *arguments)
    finally:
        distributed.destroy_process_group()


def make_groups(sizes, seed=0):
    """One group for each list of completion lengths."""
    return [
        [trajectory(4, n, seed=97 * (seed + g) + i, reward=float(i % 2)) for i, n in enumerate(group)]
        for g, group in enumerate(sizes)
    ]


def make_learner(ranks, folder, words):
    if ranks.is_first:
        model, reference = (load_model(folder, dtype=torch.float32, device="cpu") for _ in range(2))
    else:
        model, reference = empty_model(folder), empty_model(folder)
    torch.manual_seed(0)  # adapters start at random
    return Learner(configuration.load(None, words), model, 40, reference=reference, ranks=ranks)


def train(ranks, folder, words, batches):
    """Metrics of each step, then the weights and the optimizer's state."""
    learner = make_learner(ranks, folder, words)
    metrics = [learner.step(batch) for batch in batches]
    return metrics, learner.weights(), learner.state()


def assert_close(some, others, rtol=0.0, atol=1e-5):
    assert some.keys() == others.keys()
    for name, value in some.items():
        torch.testing.assert_close(
            value, others[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def gloo_interface(_ranks):
    return os.environ.get("GLOO_SOCKET_IFNAME")


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are left alone elsewhere")
def test_ranks_meet_over_the_interface_of_their_node(on_ranks):
    assert on_ranks(2, gloo_interface) == ["lo", "lo"]
    assert sharding.interface_of("203.0.113.7") is None, "an address for documentation, which nobody has"


@pytest.mark.parametrize(
    ("address", "given", "found"),
    [
        ("127.0.0.1", {}, {"GLOO_SOCKET_IFNAME": "eth7"}),
        ("198.51.100.3", {}, {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "=eth7"}),
        ("198.51.100.3", {"GLOO_SOCKET_IFNAME": "ib0"}, {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=eth7"}),
        ("198.51.100.3", {"NCCL_SOCKET_IFNAME": "ib"}, {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib"}),
    ],
)
def test_an_interface_that_the_user_names_is_left_and_nccl_gets_no_loopback(monkeypatch, address, given, found):
    monkeypatch.setattr(sharding, "interface_of", lambda _address: "eth7")
    monkeypatch.setattr(os, "environ", dict(given))
    sharding.prefer_interface(address)
    assert os.environ == found


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([[3, 9, 12, 5], [1, 2, 12, 12], [7, 7, 7, 1], [12, 1, 1, 1]], SMALL),
        ([[3, 9, 12, 5], [1, 2, 12, 12], [7, 7, 7, 1], [12, 1, 1, 1]], [*SMALL, "learner.reshard=layer"]),
        ([[12, 3, 1], [2, 9, 4, 12, 1, 1, 6]], EVERYTHING),  # groups of different sizes, a different share at each rank
        ([[12, 2, 1]], SMALL),  # with four ranks, one has nothing to train
        ([[12, 3, 1], [2, 9, 4, 12, 1, 1, 6]], WHOLE_STEP),
        ([[12, 3, 1], [2, 9, 4, 12, 1, 1, 6]], CHARGED),
        ([[12, 3, 1], [2, 9, 4, 12, 1, 1, 6]], WHITE),
        ([[12, 3, 1], [2, 9, 4, 12, 1, 1, 6]], LORA),
    ],
)
def test_ranks_train_as_one(on_ranks, folder, num_ranks, sizes, words):
    batches = [make_groups(sizes, seed) for seed in range(3)]
    metrics, weights, state = train(Ranks(), folder, words, batches)
    before = make_learner(Ranks(), folder, words).weights()
    assert max(float((weights[name] - before[name]).abs().max()) for name in weights) > 1e-4, "nothing was trained"

    first, *others = on_ranks(num_ranks, train, folder, words, batches)
    for mine, wanted in zip(first[0], metrics, strict=True):
        # Rows are filled, and prompts shared, in each rank apart.
        assert 0 < mine.pop("learner/row_fill") <= 1 >= wanted.pop("learner/row_fill")
        assert mine.pop("learner/num_inputs") >= wanted.pop("learner/num_inputs")
        assert mine.pop("learner/tokens_per_s") > 0 < wanted.pop("learner/tokens_per_s")
        assert mine == pytest.approx(wanted, rel=1e-4, abs=1e-6, nan_ok=True)
    assert_close(first[1], weights)
    assert_close(first[2], state)
    assert others == [([{}, {}, {}], {}, {})] * (num_ranks - 1)


def count_collectives(ranks, folder, words, batch):
    """Gathers and sums of parts of the model in the second step of the first rank, and its passes."""
    learner, counts = make_learner(ranks, folder, words), Counter()
    learner.step(batch)

    def counted(name):
        plain = getattr(_fsdp_param_group, name)

        def call(*arguments, **keywords):
            counts[name] += 1
            return plain(*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("foreach_all_gather", "foreach_reduce"):
            patch.setattr(_fsdp_param_group, name, counted(name))
        patch.setattr(learner, "score", lambda part, plain=learner.score: (counts.update(["passes"]), plain(part))[1])
        learner.step(batch)
    return dict(counts)


@pytest.mark.parametrize(("reshard", "per_pass"), [("layer", True), ("step", False)])
def test_weights_that_are_held_travel_once_a_step(on_ranks, folder, reshard, per_pass):
    batch = make_groups([[3, 9, 12, 5], [1, 2, 12, 12], [7, 7, 7, 1]])
    words = [*SMALL, f"learner.reshard={reshard}"]
    found, *_ = on_ranks(2, count_collectives, folder, words, batch)
    passes, units = found["passes"], 3  # two decoder layers, and what is around them
    assert passes > 1
    assert found["foreach_reduce"] == (units * passes if per_pass else units)
    assert found["foreach_all_gather"] == (2 * units * passes if per_pass else units)


ON_GPUS = [pytest.param("cuda", 1, marks=pytest.mark.gpu), pytest.param("cuda", 2, marks=pytest.mark.multi_gpu)]


@pytest.mark.parametrize(("device", "num_ranks"), [("cpu", 2), *ON_GPUS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16 lora", "bfloat16 layer"])
def test_ranks_of_any_device_and_precision_train_as_one_cpu(on_ranks, folder, device, num_ranks, dtype):
    close = 1e-3 if dtype == "float32" else 0.05
    batches = [make_groups([[3, 9, 12, 5], [1, 2, 12, 12]], seed) for seed in range(3)]
    words = [*(LORA if "lora" in dtype else SMALL), f"learner.dtype={dtype.split()[0]}"]
    words += ["learner.reshard=layer"] if "layer" in dtype else []
    metrics, weights, _ = train(Ranks(), folder, words, batches)
    (found, trained, _), *_ = on_ranks(num_ranks, train, folder, words, batches, device=device)
    for name in ("gradient/norm", "gradient/cosine", "policy/entropy", "mismatch/k3"):
        wanted = [row[name] for row in metrics]
        assert [row[name] for row in found] == pytest.approx(wanted, rel=close, abs=close, nan_ok=True), name
    if dtype == "float32":
        assert_close(trained, weights, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
@pytest.mark.parametrize("words", [SMALL, LORA], ids=["whole", "lora"])
def test_compiled_layers_and_head_train_as_they_are_written(on_ranks, folder, words):
    batches = [make_groups([[3, 9, 12, 5], [1, 2, 12, 12]], seed) for seed in range(2)]
    metrics, weights, _ = train(Ranks(), folder, words, batches)
    (found, trained, _), *_ = on_ranks(2, train, folder, [*words, "learner.compile=true"], batches)
    for name in ("gradient/norm", "policy/entropy"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in metrics], rel=1e-3), name
    assert_close(trained, weights, atol=1e-4)


def save_after_a_step(ranks, config, folder, root, batch):
    part = LearnerPart(config, folder, None, plan(config, 0), ranks=ranks)
    part.learner.step(batch)
    part.save(root, Cursor(1, 9, [7]))


def go_on(ranks, config, folder, root, batch):
    part = LearnerPart(config, folder, checkpoint.latest(root), plan(config, 0), ranks=ranks)
    part.learner.step(batch)
    return part.learner.version, part.learner.weights(), part.learner.state()


@pytest.mark.parametrize("words", [SMALL, LORA], ids=["whole", "lora"])
def test_a_checkpoint_loads_anywhere_and_goes_on_with_any_number_of_ranks(on_ranks, folder, tmp_path, words):
    config = configuration.load(None, words)
    batches = [make_groups([[3, 9, 12, 5], [1, 2, 12, 12]], seed) for seed in range(2)]
    on_ranks(2, save_after_a_step, config, folder, tmp_path / "two", batches[0])
    save_after_a_step(None, config, folder, tmp_path / "one", batches[0])
    two, one = (checkpoint.latest(tmp_path / name) for name in ("two", "one"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    loaded = [load_model(path, dtype=torch.float32, device="cpu").state_dict() for path in (two, one)]
    assert_close(*loaded)
    if words is LORA:
        assert_close(*(load_file(path / "adapter" / "adapter_model.safetensors") for path in (two, one)))

    version, weights, state = go_on(None, config, folder, tmp_path / "one", batches[1])
    assert version == 2
    again = {
        num_ranks: on_ranks(num_ranks, go_on, config, folder, tmp_path / "two", batches[1])[0] for num_ranks in (2, 4)
    }
    again[1] = go_on(None, config, folder, tmp_path / "two", batches[1])
    for of_version, of_weights, of_state in again.values():
        assert of_version == 2
        assert_close(of_weights, weights)
        assert_close(of_state, state)


def publish_twice(ranks, folder, more, batch, meetings):
    """Once to an engine that leaves in the middle, then to one that stays."""
    words = [*more, "weights.bucket_mb=0.2", "weights.timeout_s=20", "rollout.dtype=bfloat16"]
    learner = make_learner(ranks, folder, words)
    learner.step(batch)
    sent = []
    for meeting in meetings:
        if ranks.is_first:
            meeting.put((learner.rendezvous(2), learner.buckets))
            learner.join()
        learner.prepare()
        try:
            sent.append(learner.broadcast())
        except RuntimeError as error:
            sent.append(str(error))
    return sent, learner.weights()


def receive(meeting, num_buckets=None):
    """The engine's side; all buckets by default."""
    where, buckets = meeting.get(timeout=40)
    group, received = BroadcastGroup(where, 1), {}
    for bucket in buckets[:num_buckets]:
        flat = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        group.start(flat)()
        received |= dict(bucket.unpack(flat))
    return buckets, received


@pytest.mark.parametrize("words", [SMALL, LORA], ids=["whole", "lora"])
def test_full_weights_leave_the_first_rank_also_after_an_engine_left_in_the_middle(on_ranks, folder, words):
    found = []
    with multiprocessing.get_context("forkserver").Manager() as manager:
        meetings = [manager.Queue() for _ in range(2)]

        def engines():
            receive(meetings[0], 1)
            found.append(receive(meetings[1]))

        thread = threading.Thread(target=engines)
        thread.start()
        (sent, weights), *others = on_ranks(2, publish_twice, folder, words, make_groups([[3, 9, 12, 5]]), meetings)
        thread.join(40)
    ((buckets, received),) = found
    assert len(buckets) > 3
    assert "broadcast of" in sent[0]
    assert sent[1] == digest_of(buckets, received) == digest_of(buckets, weights)
    assert others == [(["", ""], {})]
