"""What runs inside SGLang's scheduler processes: exact versions, salted prefixes, weights received and proved.

    rollout actor                            scheduler process (one per tensor-parallel rank)
    -----------------------                  --------------------------------------------------
    SGLangEngine --requests--------------->  salt = number of the weights; queue
                                             run a batch -> stamp every token with the version that ran it
    pause ------------------------------->   stop between batches (in place, or back to the queue)
    command "settle" -------------------->   wait for the device: nothing of the old weights still runs
    command "release" ------------------->   give GPU memory back (the requests are in the queue); "restore": take it
    command "receive" ------------------->   broadcast -> digest of what arrived -> the model (`sglang_weights.py`)
    command "resume" -------------------->   all parameters arrived? new version, new salt -> digest
    continue ---------------------------->   go on

SGLang labels a whole output with one version, read when the output is built, which is wrong for a request that spans
an update; and with the overlapped scheduler the batch that is in flight at a pause belongs to the old weights. Here the
version is noted when a batch is launched and travels beside its tokens, so no boundary has to be guessed.

The scheduler is the one that `Engine.run_scheduler_process_func` lets a caller replace; SGLang is imported only inside
functions, as the parent imports this module to name the function for the child.
"""

from __future__ import annotations

import functools
import json
import os
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor

from asyncrl import garbage
from asyncrl.engine.sglang_weights import ReceivedWeights
from asyncrl.transport import Rendezvous
from asyncrl.weights import Bucket

if TYPE_CHECKING:
    _Scheduler = Any
else:
    _Scheduler = object

_GOLDEN, _MIX_1, _MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_GREEDY = 1
"""The top-k by which SGLang writes temperature 0."""

VERSIONS_KEY = "asyncrl_versions"
"""Where in an output's `meta_info` the version of each token is."""

_RELEASED = ("weights", "kv_cache")
"""SGLang's names for the parts of its memory that can be given back."""

_FORGET_TOKENS = 1 << 14
"""Prefixes of old weights leave the cache in parts of this size, each while the device runs a batch."""

ABORTED = "ended by a weight update"
"""The message of a completion that an update cut short."""


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """The target of a scheduler process, in place of SGLang's own."""
    from sglang.srt.managers import scheduler

    scheduler.Scheduler = type("VersionedScheduler", (SchedulerMixin, scheduler.Scheduler), {})
    scheduler.run_scheduler_process(*args, **kwargs)


def _exits_on_error(method: Any) -> Any:
    """An exception ends the process at once, and the parent sees that; SGLang would kill the parent by a signal."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception:
            traceback.print_exc()
            os._exit(1)

    return wrapper


class SchedulerMixin(_Scheduler):  # type: ignore[misc]
    """Goes in front of SGLang's `Scheduler`: versions, and the commands of `SGLangEngine`."""

    @_exits_on_error
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._version, self._salt = 0, 0
        self._dead_tokens = 0
        super().__init__(*args, **kwargs)
        # A completion ends at the stop tokens that its request names, and at no others.
        self.model_config.hf_eos_token_id = None
        self._weights = ReceivedWeights(self.tp_worker.model_runner.model, self.ps.tp_rank, self.ps.tp_size)
        _replace_sampling()

    @_exits_on_error
    def run_event_loop(self) -> None:
        garbage.settle()
        super().run_event_loop()

    def init_request_dispatcher(self) -> None:
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        super().init_request_dispatcher()
        # The one request of SGLang that carries free text there and back, and is served during a pause.
        self._request_dispatcher._mapping[CheckWeightsReqInput] = self._obey

    def handle_generate_request(self, recv_req: Any) -> Any:
        # Salted here and not by the sender: a request may be sent before an update and arrive after it.
        recv_req.extra_key = str(self._salt)
        return super().handle_generate_request(recv_req)

    def run_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().run_batch(batch, *args, **kwargs)
        output = getattr(result, "logits_output", None)
        if output is not None:
            output.customized_info = {VERSIONS_KEY: [self._version] * len(batch.reqs)}
        self._forget()
        return result

    def _forget(self) -> None:
        """Frees a part of the prefixes that no request can match any more, oldest first.

        Left to SGLang they would fill the cache, and then every step of generation would look through all of them for
        one to evict: on an H200 that took two thirds of the throughput after some twenty updates.
        """
        if self._dead_tokens > 0:
            from sglang.srt.mem_cache.base_prefix_cache import EvictParams

            wanted = min(self._dead_tokens, _FORGET_TOKENS)
            self.token_to_kv_pool_allocator.free_group_begin()
            gone = self.tree_cache.evict(EvictParams(num_tokens=wanted)).num_tokens_evicted
            self.token_to_kv_pool_allocator.free_group_end()
            self._dead_tokens = self._dead_tokens - gone if gone >= wanted else 0

    def _obey(self, request: Any) -> Any:
        from sglang.srt.managers.io_struct import CheckWeightsReqOutput

        command = json.loads(request.action)
        try:
            reply = getattr(self, f"_do_{command.pop('do')}")(**command)
            success = True
        except Exception as error:  # Whatever it is, the parent is told and the scheduler lives on.
            reply, success = f"{type(error).__name__}: {error}", False
        success, reply = self._agree(success, reply)
        return CheckWeightsReqOutput(success=success, message=json.dumps(reply))

    def _agree(self, success: bool, reply: Any) -> tuple[bool, Any]:
        """One answer for all tensor-parallel ranks: the first failure, or what all of them say."""
        if self.ps.tp_size == 1:
            return success, reply
        answers: list[Any] = [None] * self.ps.tp_size
        torch.distributed.all_gather_object(answers, (success, reply), group=self.tp_cpu_group)
        for rank, (succeeded, said) in enumerate(answers):
            if not succeeded:
                return False, f"tensor-parallel rank {rank}: {said}"
            if said != answers[0][1]:
                return False, f"tensor-parallel ranks 0 and {rank} disagree: {answers[0][1]} and {said}"
        return success, reply

    def _do_settle(self) -> None:
        _synchronize(self._weights.device)

    def _do_release(self) -> None:
        if not self._engine_paused or self.running_batch.reqs:
            raise RuntimeError("memory is given back only while paused, with every request in the queue")
        # What the cache and the pools say about their contents is no longer true.
        self.tree_cache.reset()
        self.req_to_token_pool.clear()
        self.token_to_kv_pool_allocator.clear()
        self._dead_tokens = 0
        # Buffers live with the weights, and no update brings them.
        self._buffers = [(buffer, buffer.clone()) for buffer in self._weights.lose()]
        for tag in _RELEASED:
            self.memory_saver_adapter.pause(tag)

    def _do_restore(self) -> None:
        for tag in _RELEASED:
            self.memory_saver_adapter.resume(tag)
        for buffer, values in self._buffers:
            buffer.copy_(values)
        self._buffers.clear()

    def _do_join(self, where: Mapping[str, Any], first_rank: int, address: str) -> None:
        self._weights.join(Rendezvous(**where), first_rank, address)

    def _do_receive(self, buckets: list[dict[str, Any]]) -> None:
        if not self._engine_paused:
            raise RuntimeError("weights are received only while paused")
        self._weights.receive(msgspec.convert(buckets, list[Bucket]))

    def _do_resume(self, version: int, abort: bool) -> str | None:
        arrived = self._weights.finish()
        _synchronize(self._weights.device)
        self._version = version
        if arrived is not None:
            self._salt += 1
            evictable = self.tree_cache.evictable_size()
            self._dead_tokens = evictable if isinstance(evictable, int) else 0  # hybrid caches count in parts
            if abort:
                self._end_started()
            # Those that wait have no keys and values yet, or lost them: they start over under the new weights.
            for req in self.waiting_queue:
                req.extra_key = str(self._salt)
        return arrived

    def _end_started(self) -> None:
        """Ends the requests that have tokens; the pause has put all of them back into the queue."""
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        started = [req for req in self.waiting_queue if len(req.output_ids) > 0]
        self.waiting_queue[:] = [req for req in self.waiting_queue if len(req.output_ids) == 0]
        for req in started:
            req.finished_reason = FINISH_ABORT(ABORTED)
        if started:
            # SGLang's own abort would overtake the last tokens: this goes the way that tokens go.
            self.output_streamer.stream_output(started, True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _replace_sampling() -> None:
    """Makes SGLang's sampler follow the seeds and report log-probs of the truncated distribution.

    On its own it follows seeds in its deterministic mode only, and reports log-probs from before top-k and top-p.
    """
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    make = SamplingBatchInfo.from_schedule_batch

    def from_schedule_batch(batch: Any, vocab_size: int) -> Any:
        info = make(batch, vocab_size)
        seeds = [req.sampling_params.sampling_seed or 0 for req in batch.reqs]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=info.temperatures.device)
        # Greedy requests need no truncation, which waits for the device; and once a batch that goes on has needed any,
        # SGLang has it go through that to its end: one evaluation would have cost all later steps their overlap.
        info.need_top_k_sampling = any(req.sampling_params.top_k not in (TOP_K_ALL, _GREEDY) for req in batch.reqs)
        return info

    def sample(_sampler: Any, probs: Tensor, info: Any, positions: Tensor, simple: bool) -> Tensor:
        if not simple:
            # The caller takes the log-probs from `probs` afterwards.
            truncate(probs, info.top_ks, info.top_ps)
        tokens = draw(probs, info.sampling_seed, positions)
        return torch.where(info.top_ks == _GREEDY, probs.argmax(dim=-1).to(torch.int32), tokens)

    SamplingBatchInfo.from_schedule_batch = staticmethod(from_schedule_batch)
    Sampler._sample_from_probs = sample


def truncate(probs: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Cuts distributions, [R, V], to top-k, then to top-p of what top-k left, in place. Greedy rows stay whole."""
    size = probs.shape[1]
    rows = ((top_k != _GREEDY) & ((top_k < size) | (top_p < 1))).nonzero()[:, 0]
    ordered, order = probs[rows].sort(dim=-1, descending=True, stable=True)
    ordered.masked_fill_(torch.arange(size, device=probs.device) >= top_k[rows].unsqueeze(1), 0.0)
    shares = ordered.double() / ordered.double().sum(dim=-1, keepdim=True)
    # A token stays while the tokens before it do not reach top_p, so the most likely one always stays.
    before, limit = shares.cumsum(dim=-1) - shares, top_p[rows].unsqueeze(1)
    ordered.masked_fill_((before >= limit) & (limit < 1), 0.0)
    ordered /= ordered.sum(dim=-1, keepdim=True)
    probs[rows] = torch.empty_like(ordered).scatter_(1, order, ordered)


def draw(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """One token per row, int32[R], by inverting the cumulative distribution at a number made of seed and position.

    `probs` is [R, V] and need not be normalised; `seeds` and `positions` are integers, [R].
    """
    cumulative = probs.double().cumsum(dim=-1)
    targets = uniforms(seeds, positions).unsqueeze(1) * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target: one of probability 0 is never that.
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].to(torch.int32)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position), float64[R], by two rounds of splitmix64 (Steele et al., 2014)."""
    hashed = _mix(_mix(seeds + _GOLDEN) + (positions.to(torch.int64) + 1) * _GOLDEN)
    # 52 bits: the largest number times a total near 1 still rounds to less than the total.
    return _shift(hashed, 12).double() * 2.0**-52


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shift(values, 30)) * _MIX_1
    values = (values ^ _shift(values, 27)) * _MIX_2
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros; torch's own brings in the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
