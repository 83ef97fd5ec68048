"""Buckets, the digest and the broadcast group."""

import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.weights import broadcast as transport
from asyncrl.weights import buckets as weights
from asyncrl.weights import ipc
from asyncrl.weights.broadcast import BroadcastGroup, Rendezvous, open_rendezvous
from asyncrl.weights.buckets import DTYPES, digest_of, flat_digest, make_buckets
from asyncrl.weights.sender import Outgoing, receive

CPU = torch.device("cpu")


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (25, 16), "odd": (3,), "scalar": (), "wide": (7, 33)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4000), st.sampled_from(sorted(DTYPES)))
def test_buckets_keep_every_tensor_whole_and_in_order(max_bytes, dtype):
    named = tensors(0)
    buckets = make_buckets(named.items(), dtype, max_bytes)
    assert [name for bucket in buckets for name in bucket.names] == list(named)
    for bucket in buckets:
        assert bucket.num_bytes <= max_bytes or len(bucket.names) == 1
        flat = bucket.pack(named, bucket.empty(CPU))
        assert flat.dtype == torch.uint8
        assert len(flat) == bucket.num_bytes
        for name, tensor in bucket.unpack(flat):
            assert torch.equal(tensor, named[name].to(DTYPES[dtype]))


def by_hand(words, row):
    golden = 0x9E3779B97F4A7C15
    factors = [golden * (2 * (i % row) + 1 + 2 * golden * (2 * (i // row) + 1)) for i in range(len(words))]
    return sum(int(word) * factor for word, factor in zip(words, factors, strict=True)) % 2**64


def test_digest_is_the_written_formula():
    tensor = torch.tensor([1.5, -2.25, 3.0])
    words = np.array([1.5, -2.25, 3.0, 0.0], np.float32).view(np.uint64)
    assert int(flat_digest(tensor.view(torch.uint8))) % 2**64 == by_hand(words, 1 << 12)


@pytest.mark.parametrize("num_words", [8, 11])
def test_digest_of_many_rows_is_the_written_formula(monkeypatch, num_words):
    monkeypatch.setattr(weights, "_DIGEST_ROW", 4)
    tensor = torch.arange(2 * num_words, dtype=torch.float32)
    assert int(flat_digest(tensor.view(torch.uint8))) % 2**64 == by_hand(tensor.numpy().view(np.uint64), 4)


@given(st.integers(0, 29), st.integers(0, 29))
def test_digest_sees_any_two_words_change_places(first, second):
    words = torch.arange(30 * 1024, dtype=torch.int64) * 7919
    moved = words.clone()
    moved[first * 1024], moved[second * 1024 + 1] = words[second * 1024 + 1], words[first * 1024]
    assert flat_digest(words.view(torch.uint8)) != flat_digest(moved.view(torch.uint8))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_digest_sees_one_bit_a_swap_a_rename_and_another_order(dtype):
    def measured(named):
        return digest_of(make_buckets(named.items(), dtype, 1000), named)

    named = tensors(1, DTYPES[dtype])
    reference = measured(named)
    assert measured(dict(named)) == reference

    flipped = dict(named, wide=named["wide"].clone())
    flipped["wide"].view(torch.int16).view(-1)[-1] ^= 1
    swapped = dict(named, odd=named["odd"][[1, 0, 2]])
    renamed = {name.replace("odd", "even"): tensor for name, tensor in named.items()}
    reordered = dict(reversed(named.items()))
    others = [measured(other) for other in (flipped, swapped, renamed, reordered)]
    assert len({reference, *others}) == 5


def in_threads(functions):
    """Runs each function in a thread; returns their results, raises the first error."""
    results: list = [None] * len(functions)

    def call(index, function):
        try:
            results[index] = function()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def test_a_broadcast_is_bit_equal_everywhere_and_groups_can_be_rebuilt():
    named = tensors(2)
    buckets = make_buckets(named.items(), "float32", 1000)
    assert len(buckets) > 1

    def engine(where, rank):
        received = {}
        receive(BroadcastGroup(where, rank), buckets, lambda bucket, flat: received.update(bucket.unpack(flat)))
        return received

    for num_engines in (2, 1):
        where, store = open_rendezvous("127.0.0.1", 1 + num_engines, 20)

        def learner(where=where, store=store):
            return Outgoing(buckets, named, BroadcastGroup(where, 0, store=store)).send()

        sent, *received = in_threads(
            [learner, *(lambda where=where, rank=rank: engine(where, rank + 1) for rank in range(num_engines))]
        )
        for copy in received:
            assert all(torch.equal(copy[name], tensor) for name, tensor in named.items())
            assert digest_of(buckets, copy) == sent


class RecordingGroup:
    """Keeps every buffer that it was given as a weak reference, and writes down what is asked of it."""

    device = torch.device("cpu")

    def __init__(self):
        self.log, self.buffers, self.most = [], [], 0

    def buffer(self, num_bytes, _largest):
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, flat):
        number = len(self.buffers)
        self.buffers.append(weakref.ref(flat))
        self.log.append(f"start {number}")
        self.most = max(self.most, sum(buffer() is not None for buffer in self.buffers))
        del flat
        return lambda: self.log.append(f"wait {number}")


def test_the_next_bucket_is_on_its_way_before_the_last_one_is_waited_for_and_two_exist():
    named = tensors(3)
    buckets = make_buckets(named.items(), "float32", 930)
    assert len(buckets) == 3
    expected = ["start 0", "start 1", "wait 0", "start 2", "wait 1", "wait 2"]

    sending = RecordingGroup()
    Outgoing(buckets, named, sending).send()
    assert (sending.log, sending.most) == (expected, 2)

    receiving, loaded = RecordingGroup(), []
    receive(receiving, buckets, lambda bucket, flat: loaded.append((bucket, len(flat))))
    assert (receiving.log, receiving.most) == (expected, 2)
    assert loaded == [(bucket, bucket.num_bytes) for bucket in buckets]


def test_a_bucket_that_cannot_be_loaded_leaves_no_buffer_behind():
    buckets = make_buckets(tensors(3).items(), "float32", 930)
    group = RecordingGroup()
    with pytest.raises(KeyError) as caught:
        receive(group, buckets, lambda bucket, _: {}[bucket])
    assert group.log == ["start 0", "start 1", "wait 0"]
    alive = [number for number, buffer in enumerate(group.buffers) if buffer() is not None]
    assert alive == [0], "what failed is in the traceback, and nothing else"
    del caught


def test_a_member_that_is_gone_is_noticed_by_all_the_others_at_once():
    where, store = open_rendezvous("127.0.0.1", 3, 600)
    members = in_threads(
        [
            lambda: BroadcastGroup(where, 0, store=store),
            *(lambda rank=rank: BroadcastGroup(where, rank) for rank in (1, 2)),
        ]
    )
    members[1] = None  # its connections close, as when its process dies
    errors = []

    def broadcast(group):
        with pytest.raises(RuntimeError, match="broadcast of 1000000 bytes failed") as error:
            group.start(torch.zeros(1_000_000, dtype=torch.uint8))()
        errors.append(error.value)

    in_threads([lambda: broadcast(members[0]), lambda: broadcast(members[2])])
    assert len(errors) == 2, "a member still waits for its timeout"


def test_a_member_that_never_comes_is_an_error_that_names_the_group():
    where, store = open_rendezvous("127.0.0.1", 2, 0.3)
    with pytest.raises(RuntimeError, match=rf"rank 0 of 2 could not join.*'{where.name}'.*within 0.3 s"):
        BroadcastGroup(where, 0, store=store)


@pytest.fixture
def shared(monkeypatch):
    """Stands in for CUDA's handles between processes: the protocol around them is the same.

    Like torch's, an export is for one user; what was exported and is open is in the dictionary under its handle.
    """
    exports: dict[bytes, torch.Tensor] = {}
    opened: set[bytes] = set()

    def export(flat):
        exports[handle := str(len(exports)).encode()] = flat
        return handle

    def open_once(handle):
        assert handle not in opened, "torch would count the export twice, and never free it"
        opened.add(handle)
        return exports[handle].view(-1)

    monkeypatch.setattr(ipc, "_export", export)
    monkeypatch.setattr(ipc, "_open", open_once)
    monkeypatch.setattr(ipc, "_ipc_device", lambda: CPU)
    monkeypatch.setattr(BroadcastGroup, "device", CPU)
    return exports


def ipc_group(num_members, timeout_s=20.0, slots=None):
    where, store = open_rendezvous("127.0.0.1", num_members, timeout_s, "ipc")
    others = (lambda rank=rank: BroadcastGroup(where, rank) for rank in range(1, num_members))
    return in_threads([lambda: BroadcastGroup(where, 0, store=store, slots=slots), *others])


def filled(group, value, num_bytes=10):
    return group.buffer(num_bytes, num_bytes).fill_(value)


def take(engine, named, buckets):
    """Checks what an engine receives."""
    received = {}
    receive(engine, buckets, lambda bucket, flat: received.update(dict(bucket.unpack(flat.clone()))))
    assert all(torch.equal(received[name], tensor) for name, tensor in named.items())


@pytest.mark.parametrize(("num_buckets", "num_slots"), [(1, 1), (9, 2)])
def test_updates_over_one_gpu_export_and_open_each_buffer_once(shared, num_buckets, num_slots):
    """In several updates, with members that do not run in step; a group that comes after takes the buffers over."""
    named = {f"w{number}": torch.full((300,), float(number)) for number in range(9)}
    buckets = make_buckets(named.items(), "float32", 1200 * 9 // num_buckets)
    assert len(buckets) == num_buckets
    slots: list[torch.Tensor] = []
    for life, num_engines in enumerate((2, 1), 1):
        learner, *engines = ipc_group(1 + num_engines, slots=slots)
        for update in range(6):
            sent = {name: tensor + update for name, tensor in named.items()}
            takes = [lambda engine=engine, sent=sent: take(engine, sent, buckets) for engine in engines]
            in_threads([lambda sent=sent, learner=learner: Outgoing(buckets, sent, learner).send(), *takes])
        assert len(slots) == num_slots
        assert len(shared) == num_slots * (2 if life == 1 else 3), "an export for each engine and buffer of a group"
    assert {flat.data_ptr() for flat in shared.values()} == {slot.data_ptr() for slot in slots}


def test_a_buffer_is_packed_again_only_when_the_last_member_has_copied_out_of_it(shared, monkeypatch):
    learner, quick, late = ipc_group(3)
    begun, wait = threading.Event(), ipc.Receipt.wait

    def waiting(*arguments):
        begun.set()
        wait(*arguments)

    def send():
        for value in range(5):
            learner.start(filled(learner, value))  # without a wait for its receipt
            if value == 2:
                begun.set()  # too early: the first one is overwritten

    def copy(engine, start):
        start()
        for value in range(5):
            flat = torch.full((10,), 99, dtype=torch.uint8)
            engine.start(flat)
            assert flat.tolist() == [value] * 10

    monkeypatch.setattr(ipc.Receipt, "wait", waiting)
    in_threads([send, lambda: copy(quick, lambda: None), lambda: copy(late, lambda: begun.wait(20))])
    assert len(shared) == 4


def test_a_slot_that_was_not_needed_for_long_is_free_again(shared):
    learner, engine = ipc_group(2, timeout_s=5)

    def both(num_in_flight):
        waits = [learner.start(filled(learner, value)) for value in range(num_in_flight)]
        for value in range(num_in_flight):
            engine.start(flat := torch.zeros(10, dtype=torch.uint8))()
            assert flat.tolist() == [value] * 10
        for wait in waits:
            wait()

    for num_in_flight in (2, 1, 1, 1, 1, 1, 2):
        both(num_in_flight)
    assert len(shared) == 2


def test_a_larger_bucket_gets_a_larger_buffer(shared):
    learner, engine = ipc_group(2)
    for number, num_bytes in enumerate((10, 1000, 10)):
        learner.start(filled(learner, number, num_bytes))
        engine.start(flat := torch.zeros(num_bytes, dtype=torch.uint8))()
        assert flat.unique().tolist() == [number]
    assert [len(flat) for flat in shared.values()] == [10, 1000]


def test_leaving_closes_what_was_opened(shared):
    learner, engine = ipc_group(2)
    learner.start(filled(learner, 1))
    engine.start(torch.zeros(10, dtype=torch.uint8))()
    (opened,) = engine._group._opened.values()
    opened = weakref.ref(opened)
    engine.leave()
    assert opened() is None
    assert shared


@pytest.mark.usefixtures("shared")
def test_a_rank_that_cannot_copy_is_heard_by_all_at_once():
    learner, good, bad = ipc_group(3, timeout_s=600)
    sent = filled(learner, 0)
    errors = []

    def broadcast(member, flat):
        with pytest.raises(RuntimeError, match=r"broadcast of .* bytes failed"):
            member.start(flat)()
        errors.append(member)

    members = ((learner, sent), (good, sent.clone()), (bad, sent[:3]))
    in_threads([lambda m=member, f=flat: broadcast(m, f) for member, flat in members])
    assert len(errors) == 3


@pytest.mark.usefixtures("shared")
def test_an_abandoned_group_ends_every_wait_at_once():
    learner, engine, silent = ipc_group(3, timeout_s=600)
    flat = filled(learner, 0)
    waits = [learner.start(flat), engine.start(flat.clone())]
    transport.abandon(learner.where, "actor 2 died")
    for wait in waits:
        with pytest.raises(RuntimeError, match="the group was abandoned: actor 2 died"):
            wait()
    with pytest.raises(RuntimeError, match="has left the group after a failure"):
        engine.start(flat)
    assert silent.rank == 2  # alive all the while


@pytest.mark.usefixtures("shared")
def test_an_ipc_rank_that_is_gone_is_missed_after_the_timeout():
    learner, _ = ipc_group(2, timeout_s=0.3)
    with pytest.raises(RuntimeError, match=r"rank 0: broadcast of 10 bytes failed or took longer than 0\.3 s"):
        learner.start(filled(learner, 0))()


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_who_waits_for_a_member_that_died_on_its_way_hears_of_it(backend):
    where, store = open_rendezvous("127.0.0.1", 2, 600, backend)
    errors = []

    def join():
        with pytest.raises(RuntimeError, match="the group was abandoned: actor 1 died") as caught:
            BroadcastGroup(where, 0, store=store)
        errors.append(caught.value)

    in_threads([join, lambda: transport.abandon(where, "actor 1 died")])
    assert len(errors) == 1


@pytest.mark.parametrize(("timeout_s", "why"), [(0.3, "nothing came for 0.3 s"), (600, "abandoned: actor 1 died")])
def test_who_meets_over_nccl_waits_no_longer_than_the_group_does(monkeypatch, timeout_s, why):
    """NCCL itself does not come back when a member dies while they meet."""
    met = threading.Event()
    monkeypatch.setattr(transport, "_meet_over_nccl", lambda *_: met.wait())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    where, store = open_rendezvous("127.0.0.1", 1, timeout_s, "nccl")
    if timeout_s > 1:
        transport.abandon(where, "actor 1 died")
    with pytest.raises(RuntimeError, match=f"rank 0 of 1 could not join the broadcast group .*{why}"):
        BroadcastGroup(where, 0, store=store)
    met.set()


def test_an_unknown_backend_is_refused():
    _, store = open_rendezvous("127.0.0.1", 1, 5)
    with pytest.raises(RuntimeError, match="must be 'gloo', 'nccl' or 'ipc', got 'smoke'"):
        BroadcastGroup(Rendezvous("127.0.0.1", store.port, 1, "x", "smoke", 5), 0, store=store)
