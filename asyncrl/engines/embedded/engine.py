"""The embedded engine: one asyncio task that owns a Hugging Face model and runs every live request together.

    generate() --> waiting --admit--> live rows --finished--> the caller's future
                                      |        ^
                                      +- tick -+   one token for every row, then one turn of the event loop

    waits: the task, on `_work`, until there is a request and the engine is not paused
           generate(), on its own future
           join() and receive(), on the other members of the broadcast group, in a thread

A tick runs on the event loop's thread without a break, so between ticks nothing is half done: that is when requests
join and leave, when `pause` takes hold and when weights change.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from asyncrl.config import out_of_memory as memory
from asyncrl.engines import sampler
from asyncrl.engines import stop_texts as stops
from asyncrl.engines.base import CHECKPOINT, OnUpdate
from asyncrl.engines.embedded.kv_cache import SlotCache
from asyncrl.engines.stop_texts import Decode
from asyncrl.types import Completion, Finish, Sampling, Version
from asyncrl.utils.threads import in_thread
from asyncrl.weights.broadcast import BroadcastGroup, Rendezvous
from asyncrl.weights.buckets import Bucket, digest_of
from asyncrl.weights.sender import receive

if TYPE_CHECKING:
    from asyncrl.models.loading import PreTrainedModel

_ADMIT_FRACTION = 8  # While more are waiting, one in this many places must be free before any is filled.


@dataclass(slots=True, eq=False)
class _Request:
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    future: asyncio.Future[Completion]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class EmbeddedEngine:
    """Implements `engine.base.Engine` on a model in this process. All methods belong to one event loop.

    Public counters, all since the start: `num_tokens` generated, `num_prefill_tokens` that went through a prefill.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_running: int,
        max_length: int,
        on_update: OnUpdate = "keep",
        address: str = "127.0.0.1",
        updated: Mapping[str, Tensor] | None = None,
        decode: Decode | None = None,
        remedies: Sequence[str] = ("lower max_running or max_length",),
    ) -> None:
        """At most `max_running` requests run at once, the rest wait; prompt and completion fit in `max_length` tokens.

        `address` is this node's own, for the broadcast group. The weights that the model comes with are version 0.
        `updated`: those of its parameters that an update brings, by default all. `decode`: the tokenizer's, which stop
        texts need. `remedies`: settings to change where memory runs out.
        """
        self.num_tokens = 0
        self.num_prefill_tokens = 0
        self._model, self._on_update, self._address = model, on_update, address
        self._decode, self._remedies = decode, remedies
        self._max_running, self._max_length = max_running, max_length
        self.vocabulary: int = model.config.vocab_size
        self._cache = SlotCache(model, max_running, max_length)
        self._waiting: deque[_Request] = deque()
        self._live: list[_Request] = []
        # Rows 0..num_cached-1 have their keys and values in the cache, the live rows after them need a prefill.
        self._num_cached = 0
        self._busy_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._paused = self._closed = False
        self._group: BroadcastGroup | None = None
        # Names that the current update has yet to bring; None while no part of one has arrived.
        self._missing: set[str] | None = None
        self._parameters: dict[str, Tensor] = dict(updated or model.named_parameters())
        self._version: Version = 0
        self._digests: dict[Version, str] = {0: CHECKPOINT}
        self._received: list[Bucket] = []

    @property
    def num_ranks(self) -> int:
        return 1

    @property
    def busy_s(self) -> float:
        return self._busy_s

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        """One completion; cancelling the call drops the request.

        Raises `ValueError` for a prompt or settings that cannot be run, `RuntimeError` once closed, and whatever a tick
        raised while the request was in it.
        """
        if self._closed:
            raise RuntimeError("the engine is closed")
        prompt = tuple(token_ids)
        sampler.check_request(prompt, sampling, self.vocabulary, self._max_length)
        stops.check(sampling, self._decode)
        request = _Request(prompt, sampling, seed, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._task is None:
            self._task = asyncio.create_task(self._serve(), name="embedded engine")
        self._wake()
        return await request.future

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        """Enters a broadcast group. An update that was cut short in the last one starts over from its first bucket."""
        if self._group is not None:
            self._group.leave()
        self._received = []
        if self._missing is not None:
            self._missing = set(self._parameters)
        self._group = await in_thread(partial(BroadcastGroup, where, first_rank, self._address))

    async def pause(self) -> None:
        # No tick can be running now, as a tick does not give up the event loop's thread.
        self._paused = True
        self._wake()

    async def release(self) -> None:
        raise RuntimeError("this engine's memory is PyTorch's own and is not given back; use SGLang for that")

    async def receive(self, buckets: Sequence[Bucket]) -> None:
        """Takes part in the broadcasts and copies what came into the parameters.

        Raises `RuntimeError` unless paused and joined, and for a bucket that does not fit the model. A bucket is
        checked after its broadcast, so that the other members do not wait for this one.
        """
        if not self._paused or self._group is None:
            raise RuntimeError(
                f"an engine receives weights only while paused and in a broadcast group: paused={self._paused}, "
                f"in a group={self._group is not None}"
            )
        await in_thread(partial(receive, self._group, buckets, self._load))

    def _load(self, bucket: Bucket, flat: Tensor) -> None:
        if self._missing is None:
            self._missing = set(self._parameters)
        self._check_bucket(bucket, self._missing)
        with torch.no_grad():
            for name, tensor in bucket.unpack(flat):
                self._parameters[name].copy_(tensor)
        self._missing.difference_update(bucket.names)
        self._received.append(bucket)

    async def resume(self, version: Version) -> str:
        """Goes on with the weights that arrived since `pause`, or with the old ones if none did.

        Raises `RuntimeError` when only a part arrived, or when live requests already have tokens of this version that
        other weights made.
        """
        if not self._paused:
            raise RuntimeError("an engine is resumed only after a pause")
        if self._missing:
            some = ", ".join(sorted(self._missing)[:3])
            raise RuntimeError(
                f"the update to version {version} is partial: {len(self._missing)} of {len(self._parameters)} "
                f"parameters did not arrive ({some}, ...)"
            )
        current = self._digests[self._version]
        if self._received:
            current, self._received = digest_of(self._received, self._parameters), []
        live = {v for request in self._live for v in request.versions}
        if version in live and self._digests[version] != current:
            raise RuntimeError(
                f"live requests have tokens of version {version} from weights {self._digests[version]}, and weights "
                f"{current} are now called version {version} too"
            )
        self._digests = {v: self._digests[v] for v in live} | {version: current}
        self._version = version
        if self._missing is not None:
            self._missing = None
            self._apply_update()
        self._paused = False
        self._wake()
        return current

    async def close(self) -> None:
        """Ends the task; requests still in flight raise `RuntimeError`."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail(RuntimeError("the engine was closed with the request in flight"))
        self._group = None

    def _check_bucket(self, bucket: Bucket, missing: set[str]) -> None:
        for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
            if name not in self._parameters:
                raise RuntimeError(f"the model has no parameter {name!r}")
            own = self._parameters[name]
            if (dtype, tuple(shape)) != (str(own.dtype).removeprefix("torch."), tuple(own.shape)):
                raise RuntimeError(
                    f"parameter {name!r} arrived as {dtype}{list(shape)}, the model has {own.dtype}{list(own.shape)}"
                )
            if name not in missing:
                raise RuntimeError(f"parameter {name!r} arrived twice in one update")

    def _apply_update(self) -> None:
        if self._on_update == "recompute":
            self._num_cached = 0
        elif self._on_update == "abort":
            for request in self._live:
                self._finish(request, "abort")
            self._live.clear()
            self._num_cached = 0

    def _wake(self) -> None:
        """Sets the event that the task waits on exactly while there is something to do."""
        if (self._live or self._waiting) and not self._paused:
            self._work.set()
        else:
            self._work.clear()

    async def _serve(self) -> None:
        while True:
            await self._work.wait()
            start = time.perf_counter()
            try:
                with memory.told("generating", self._remedies, "the engine"), torch.inference_mode():
                    self._tick()
            except Exception as error:  # Every request must hear of it, whatever it is.
                self._fail(error)
            self._wake()
            await asyncio.sleep(0)
            self._busy_s += time.perf_counter() - start

    def _tick(self) -> None:
        for row in reversed(range(len(self._live))):
            if self._live[row].future.done():  # Its caller was cancelled.
                self._remove(row)
        self._admit()
        if not self._live:
            return
        logits = self._logits()
        self._num_cached = len(self._live)
        seeds = np.array([request.seed % 2**64 for request in self._live], dtype=np.uint64)
        indices = np.array([len(request.tokens) for request in self._live], dtype=np.uint64)
        tokens, logprobs = sampler.sample(
            logits, [request.sampling for request in self._live], sampler.uniforms(seeds, indices)
        )
        self.num_tokens += len(tokens)
        for row in reversed(range(len(tokens))):
            self._append(row, tokens[row], logprobs[row])

    def _admit(self) -> None:
        # On a small model a prefill costs about as much as a tick, whatever it holds, so places are filled several at a
        # time. The samples of a group then also start together and share theirs.
        free = self._max_running - len(self._live)
        if self._live and free < min(len(self._waiting), self._max_running // _ADMIT_FRACTION):
            return
        while self._waiting and len(self._live) < self._max_running:
            request = self._waiting.popleft()
            if not request.future.done():
                self._live.append(request)

    def _logits(self) -> Tensor:
        """The next-token logits of every live row, [R, V]."""
        decoded, fresh = self._live[: self._num_cached], self._live[self._num_cached :]
        parts = []
        if decoded:
            positions = [len(request.prompt) + len(request.tokens) - 1 for request in decoded]
            parts.append(self._cache.decode([request.tokens[-1] for request in decoded], positions))
        if fresh:
            sequences = [(*request.prompt, *request.tokens) for request in fresh]
            logits, num_computed = self._cache.fill(sequences, self._num_cached)
            self.num_prefill_tokens += num_computed
            parts.append(logits)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _append(self, row: int, token: int, logprob: float) -> None:
        request = self._live[row]
        request.tokens.append(token)
        request.logprobs.append(logprob)
        request.versions.append(self._version)
        if stops.is_stopped(request.tokens, request.sampling, self._decode):
            self._finish(request, "stop")
        elif len(request.tokens) == request.sampling.max_new_tokens:
            self._finish(request, "length")
        else:
            return
        self._remove(row)

    def _finish(self, request: _Request, finish: Finish) -> None:
        if request.future.done():
            return
        completion = Completion(
            token_ids=np.array(request.tokens, dtype=np.int32),
            logprobs=np.array(request.logprobs, dtype=np.float32),
            versions=np.array(request.versions, dtype=np.int32),
            finish=finish,
            digests={version: self._digests[version] for version in sorted(set(request.versions))},
        )
        request.future.set_result(completion)

    def _remove(self, row: int) -> None:
        """Frees a row; the last row moves into the hole, so that the live rows stay the first ones."""
        last = len(self._live) - 1
        if row != last:
            self._live[row] = self._live[last]
            if last < self._num_cached:
                self._cache.move(last, row)
        self._live.pop()
        self._num_cached = min(self._num_cached, last)

    def _fail(self, error: Exception) -> None:
        for request in (*self._live, *self._waiting):
            if not request.future.done():
                request.future.set_exception(error)
        self._live.clear()
        self._waiting.clear()
        self._num_cached = 0
