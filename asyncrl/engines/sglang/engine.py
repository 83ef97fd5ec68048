"""SGLang as an engine: its `Engine` inside the rollout actor's event loop, weights updated with requests in flight.

    generate ---> GenerateReqInput ------------> scheduler processes (`sglang_scheduler.py`), one per GPU
         ^------- tokens, log-probs, versions --------'
    update:   pause -> settle -> receive x buckets -> resume -> continue
    guard:    a scheduler that ends -> every waiting call raises

`on_update` says what new weights do to a request in flight. "keep": it pauses in place and goes on with the keys and
values that the old weights made. "recompute": it goes back to the queue, and its keys and values are made again by the
new weights. "abort": it goes back to the queue and ends there, with the tokens that it has.

A prefix is shared only between requests under the same weights: entries of older weights stay in the cache until they
are the least recently used. Nothing is flushed at an update, as a flush with requests in flight ends the scheduler.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from asyncrl.engines import sampler
from asyncrl.engines import stop_texts as stops
from asyncrl.engines.base import CHECKPOINT, LENGTH_IN_A_RUN, OnUpdate
from asyncrl.engines.sglang import launch as sglang_launch
from asyncrl.engines.sglang import scheduler as sglang_scheduler
from asyncrl.engines.sglang.calls import Calls
from asyncrl.engines.sglang.results import VERSIONS_KEY
from asyncrl.engines.stop_texts import Decode
from asyncrl.types import Completion, Finish, Sampling, Version
from asyncrl.utils.threads import in_thread
from asyncrl.weights.broadcast import Rendezvous
from asyncrl.weights.buckets import Bucket

_COMMAND_S = 60.0
"""Bound on everything that needs no other process than the scheduler: a decoding step, or a long prefill, fits in."""
_EXTRA_S = 15.0
"""What joining or receiving may take longer than its group's own timeout: the group's error is the one to be seen."""
_JOIN_LOOK_S = 0.02


class SGLangEngine:
    """Implements `engine.base.Engine`; made by `start`. All methods belong to one event loop.

    A seed draws the same tokens again as long as the log-probs are the same; on a GPU they depend, in their last bits,
    on what else is in the batch.

    Public counters: requests that are in flight, `num_open`; tokens of the requests that ended, `num_tokens` generated
    and `num_cached_tokens` of prompts found in the prefix cache. `on_update` may be changed between updates.
    """

    def __init__(
        self,
        engine: Any,
        *,
        num_ranks: int,
        max_length: int,
        on_update: OnUpdate,
        dtype: str,
        address: str,
        decode: Decode | None,
    ) -> None:
        """Takes over a started `sglang.Engine`; use `start`."""
        self.num_open = self.num_tokens = self.num_cached_tokens = 0
        self.on_update = on_update
        self._engine, self._manager = engine, engine.tokenizer_manager
        self._num_ranks, self._max_length, self._address = num_ranks, max_length, address
        self._dtype, self._decode = dtype, decode
        self.vocabulary: int = self._manager.model_config.vocab_size
        self._digests: dict[Version, str] = {0: CHECKPOINT}
        self._version: Version = 0
        self._paused = self._released = False
        self._num_requests = 0
        self._busy_s, self._busy_since = 0.0, 0.0
        self._group_timeout_s = 0.0
        self._calls = Calls(self._manager, sglang_launch.own_processes(engine))

    @classmethod
    async def start(
        cls,
        model_path: str,
        *,
        dtype: str,
        device: Literal["cuda", "cpu"],
        max_running: int,
        max_length: int,
        tensor_parallel_size: int = 1,
        attention_backend: sglang_launch.AttentionBackend = "auto",
        gpu_memory_utilization: float = 0.8,
        release_memory: bool = False,
        on_update: OnUpdate = "keep",
        seed: int = 0,
        address: str = "127.0.0.1",
        engine_args: Mapping[str, Any] | None = None,
        decode: Decode | None = None,
    ) -> SGLangEngine:
        """Starts SGLang's processes and blocks the event loop until the model is loaded.

        At most `max_running` requests run at once; prompt and completion fit in `max_length` tokens. `address` is this
        node's own, for the broadcast group. `release_memory` prepares for `release`. `engine_args` are further
        arguments of SGLang; `decode` is the tokenizer's, which stop texts need. Raises `ValueError` for settings that
        cannot work, `RuntimeError` when a process ends while it starts.
        """
        sglang_launch.check_version()
        arguments = sglang_launch.server_arguments(
            model_path=str(model_path),
            dtype=dtype,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            attention_backend=sglang_launch.attention_backend_here(attention_backend, device),
            max_running=max_running,
            max_length=max_length,
            gpu_memory_utilization=gpu_memory_utilization,
            release_memory=release_memory,
            seed=seed,
            extra=engine_args or {},
            known=sglang_launch.known_arguments(),
        )
        engine = sglang_launch.launch(arguments)
        started = cls(
            engine,
            num_ranks=tensor_parallel_size,
            max_length=max_length,
            on_update=on_update,
            dtype=dtype,
            address=address,
            decode=decode,
        )
        await started._check_room()
        return started

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    @property
    def busy_s(self) -> float:
        running = self.num_open > 0 and not self._paused
        return self._busy_s + (time.perf_counter() - self._busy_since if running else 0.0)

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        """One completion; cancelling the call drops the request.

        Raises `ValueError` for a prompt or settings that cannot be run, `RuntimeError` once closed or when a scheduler
        process has ended.
        """
        sampler.check_request(token_ids, sampling, self.vocabulary, self._max_length)
        stops.check(sampling, self._decode)
        self._calls.check()
        self._num_requests += 1
        # SGLang aborts every request whose id begins with the given one: ids of equal length are never such a prefix.
        request_id = f"{self._num_requests:016x}"
        task = asyncio.create_task(self._request(request_id, token_ids, sampling, seed))
        self._count_open(1)
        try:
            output = await self._calls.result(task, None, "generating")
        except asyncio.CancelledError:
            # The task stays, as the one that takes the answer to the abort.
            self._manager.abort_request(request_id)
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise
        finally:
            self._count_open(-1)
        completion = self._completion(output, sampling)
        self.num_tokens += len(completion.token_ids)
        self.num_cached_tokens += output["meta_info"]["cached_tokens"]
        return completion

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        """Enters a broadcast group, and generates meanwhile. An update that was cut short in the last one starts over
        from its first bucket."""
        doing = f"joining the broadcast group {where.name!r}"
        join = {"where": where, "first_rank": first_rank, "address": self._address}
        await self._calls.command(doing, _COMMAND_S, do="join", **join)
        end = time.monotonic() + where.timeout_s + _EXTRA_S
        while not await self._calls.command(doing, _COMMAND_S, do="joined", name=where.name):
            if time.monotonic() > end:
                raise RuntimeError(f"SGLang took longer than {where.timeout_s + _EXTRA_S:g} s while {doing}")
            await asyncio.sleep(_JOIN_LOOK_S)
        self._group_timeout_s = where.timeout_s

    async def pause(self) -> None:
        if not self._paused:
            await self._pause("in_place" if self.on_update == "keep" else "retract")
        if self._released:
            await self._calls.command("taking its memory back", _COMMAND_S, do="restore")
            self._released = False

    async def release(self) -> None:
        """Raises `RuntimeError` when already paused. On a CPU no memory is given back."""
        if self._paused:
            raise RuntimeError("an engine gives its memory back before the pause of an update, not within it")
        await self._pause("retract")
        await self._calls.command("giving its memory back", _COMMAND_S, do="release")
        self._released = True

    async def _pause(self, mode: Literal["in_place", "retract"]) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        self._pause_clock(True)
        pausing = self._manager.pause_generation(PauseGenerationReqInput(mode=mode))
        await self._calls.result(pausing, _COMMAND_S, "pausing")
        # The pause is only sent by now, and a batch of the old weights may still run on the device.
        await self._calls.command("pausing", _COMMAND_S, do="settle")

    async def receive(self, buckets: Sequence[Bucket]) -> None:
        """Takes part in the broadcasts and loads what came.

        Raises `RuntimeError` unless paused and joined, and for a bucket that does not fit the model.
        """
        other = {dtype for bucket in buckets for dtype in bucket.dtypes} - {self._dtype}
        num_bytes = sum(bucket.num_bytes for bucket in buckets)
        await self._calls.command(
            f"receiving {len(buckets)} buckets of {num_bytes} bytes in all",
            len(buckets) * self._group_timeout_s + _EXTRA_S,
            do="receive",
            buckets=buckets,
        )
        if other:
            raise RuntimeError(f"weights arrived as {min(other)}, the engine runs {self._dtype}")

    async def resume(self, version: Version) -> str:
        """Goes on with the weights that arrived since `pause`, or with the old ones if none did.

        Raises `RuntimeError` when only a part arrived, or when requests in flight may have tokens of this version that
        other weights made.
        """
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        if not self._paused:
            raise RuntimeError("an engine is resumed only after a pause")
        abort = self.on_update == "abort"
        arrived = await self._calls.command(
            f"resuming with version {version}", _COMMAND_S, do="resume", version=version, abort=abort
        )
        digest = self._digests[self._version] if arrived is None else str(arrived)
        before = self._digests.get(version, digest)
        if before != digest and self.num_open > 0:
            raise RuntimeError(
                f"requests are in flight, and weights {digest} are now called version {version}, as weights {before} "
                "were before"
            )
        self._digests[version], self._version = digest, version
        # Giving back cached memory would cost time at each update.
        going_on = self._manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
        await self._calls.result(going_on, _COMMAND_S, "continuing")
        self._pause_clock(False)
        return digest

    async def close(self) -> None:
        """Ends SGLang's processes; requests still in flight raise `RuntimeError`."""
        self._calls.end(RuntimeError("the engine was closed with the request in flight"))
        for task in list(self._manager.asyncio_tasks):
            task.cancel()
        await in_thread(partial(sglang_launch.end_processes, self._calls.processes))
        sglang_launch.close_sockets(self._engine)

    async def _check_room(self) -> None:
        """SGLang would shorten a completion that its cache or the model's context has no room for, without a word."""
        longest = self._manager.max_req_input_len
        if self._max_length > longest:
            await self.close()
            raise ValueError(
                f"max_length must be at most {longest}, which the model's context and the cache leave for one request, "
                f"got {self._max_length}: lower {LENGTH_IN_A_RUN}, or raise rollout.gpu_memory_utilization or "
                "rollout.engine_args.max_total_tokens"
            )

    async def _request(self, request_id: str, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Any:
        from fastapi import HTTPException
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(
            rid=request_id,
            input_ids=[int(token) for token in token_ids],
            sampling_params={
                "max_new_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "stop_token_ids": list(sampling.stop_token_ids),
                "sampling_seed": seed % 2**63,
                "custom_params": {sglang_scheduler.STOP_KEY: list(sampling.stop)} if sampling.stop else None,
            },
            return_logprob=True,
            # Nothing is lost without streaming: an end by an update brings the tokens along.
            stream=False,
        )
        try:
            async for output in self._manager.generate_request(request, None):
                return output
        except HTTPException as error:  # it would not survive the way to another process
            raise RuntimeError(f"SGLang ended a request: {error.detail}") from None
        raise RuntimeError("SGLang ended a request without an answer")

    def _completion(self, output: Mapping[str, Any], sampling: Sampling) -> Completion:
        info = output["meta_info"]
        finish = _finish(info["finish_reason"], sampling)
        if finish == "length" and stops.is_stopped(output["output_ids"], sampling, self._decode):
            finish = "stop"  # SGLang looks at the length first
        tokens = np.array(output["output_ids"], dtype=np.int32)
        logprobs = [entry[0] for entry in info["output_token_logprobs"]]
        if sampling.top_k == 1 and sampling.temperature > 0:
            # One token is left of the distribution. SGLang takes it for greedy sampling, which is not truncated.
            logprobs = [0.0] * len(logprobs)
        versions = info.get(VERSIONS_KEY, [])
        if not len(tokens) == len(logprobs) == len(versions):
            raise RuntimeError(
                f"SGLang returned {len(tokens)} tokens, {len(logprobs)} log-probs and {len(versions)} versions"
            )
        return Completion(
            token_ids=tokens,
            logprobs=np.array(logprobs, dtype=np.float32),
            versions=np.array(versions, dtype=np.int32),
            finish=finish,
            digests={version: self._digests[version] for version in sorted(set(versions))},
        )

    def _count_open(self, change: int) -> None:
        busy_s, self.num_open = self.busy_s, self.num_open + change
        self._busy_s, self._busy_since = busy_s, time.perf_counter()

    def _pause_clock(self, paused: bool) -> None:
        busy_s, self._paused = self.busy_s, paused
        self._busy_s, self._busy_since = busy_s, time.perf_counter()


def _finish(reason: Mapping[str, Any], sampling: Sampling) -> Finish:
    kind, matched = reason["type"], reason.get("matched")
    if kind == "length":
        return "length"
    if kind == "stop" and (isinstance(matched, int) or matched in sampling.stop):  # another text tells of a fault
        return "stop"
    if kind == "abort" and reason.get("message") == sglang_scheduler.ABORTED:
        return "abort"
    raise RuntimeError(f"SGLang ended a request: {reason}")
