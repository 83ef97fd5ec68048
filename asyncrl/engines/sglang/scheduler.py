"""What runs inside SGLang's scheduler processes: exact versions, salted prefixes, weights received and proved.

    rollout actor                            scheduler process (one per tensor-parallel rank)
    -----------------------                  --------------------------------------------------
    SGLangEngine --requests--------------->  salt = number of the weights; queue
                                             run a batch -> stamp every token with the version that ran it
    pause ------------------------------->   stop between batches (in place, or back to the queue)
    command "join" --------------------->    a thread meets the others of the broadcast group; "joined": are all there?
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

import contextlib
import functools
import json
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from asyncrl.engines.sglang.memory import replace_memory
from asyncrl.engines.sglang.results import VERSIONS_KEY, replace_results
from asyncrl.engines.sglang.sampling import replace_sampling
from asyncrl.engines.sglang.weights import ReceivedWeights
from asyncrl.engines.stop_texts import reach
from asyncrl.models.loading import load_tokenizer
from asyncrl.utils import gc_freeze as garbage
from asyncrl.weights.broadcast import Rendezvous
from asyncrl.weights.buckets import Bucket

if TYPE_CHECKING:
    _Scheduler = Any
else:
    _Scheduler = object

_RELEASED = ("weights", "kv_cache")
"""SGLang's names for the parts of its memory that can be given back."""

_FORGET_TOKENS = 1 << 14
"""Prefixes of old weights leave the cache in parts of this size, each while the device runs a batch."""

_MAX_WAIT_STEPS = 32
"""Steps of decoding that a request waits at most for others to be prefilled with."""

_PREFILL_STEPS = {"cuda": 4, "cpu": 1}
"""Steps of decoding that a prefill takes, however small; docs/performance.md has what was measured."""

ABORTED = "ended by a weight update"
"""The message of a completion that an update cut short."""

STOP_KEY = "asyncrl_stop"
"""Of a request's custom parameters: its stop texts. SGLang takes them itself only where it has the tokenizer in every
process, and then ends completions at that tokenizer's end tokens, too."""

START_ERRORS = "ASYNCRL_SGLANG_START_ERRORS"
"""Environment variable with the folder in which a scheduler that cannot start leaves a file that says why."""


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
        except Exception as error:
            traceback.print_exc()
            with contextlib.suppress(OSError):  # the folder is gone after the start
                Path(os.environ[START_ERRORS], f"{os.getpid()}.txt").write_text(f"{type(error).__name__}: {error}")
            os._exit(1)

    return wrapper


class Refill:
    """Lets requests that wait enter together, as decoding stops for each prefill, however small.

    SGLang fills every place as soon as it is free. With replies of different lengths that is a prefill in almost every
    step. Here the queue is let in when its waiting has cost as many request-steps as a prefill of `prefill_steps` costs
    those that run: holding and ordering cost the same at the economic order quantity (Harris, 1913). Steps are counted,
    not time, as tensor-parallel ranks must come to the same answer.
    """

    def __init__(self, num_waiting: Callable[[], int], prefill_steps: int) -> None:
        self._num_waiting, self._prefill_steps = num_waiting, prefill_steps
        self._cost, self._num_steps = 0, 0

    def should_delay(self, *, running_bs: int, num_allocatable_reqs: int) -> bool:
        """Asked by SGLang in each step in which requests wait."""
        if num_allocatable_reqs <= 0:
            return False  # SGLang finds that out itself, and asks no more until a place is free
        self._cost += min(self._num_waiting(), num_allocatable_reqs)
        self._num_steps += 1
        if self._cost < self._prefill_steps * running_bs and self._num_steps < _MAX_WAIT_STEPS:
            return True
        self._cost = self._num_steps = 0
        return False


class _Texts:
    """What SGLang asks of a request's tokenizer where it looks for stop texts; end tokens are the request's own."""

    eos_token_id = additional_stop_token_ids = None

    def __init__(self, folder: str) -> None:
        self.decode = load_tokenizer(folder).decode


class SchedulerMixin(_Scheduler):  # type: ignore[misc]
    """Goes in front of SGLang's `Scheduler`: versions, and the commands of `SGLangEngine`."""

    min_free_slots_delayer: Any

    @_exits_on_error
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._version, self._salt = 0, 0
        self._dead_tokens = 0
        replace_memory()
        super().__init__(*args, **kwargs)
        # A completion ends at the stop tokens that its request names, and at no others.
        self.model_config.hf_eos_token_id = None
        self._weights = ReceivedWeights(self.tp_worker.model_runner.model, self.ps.tp_rank, self.ps.tp_size)
        replace_sampling()
        replace_results(self)
        if self.prefill_delayer is None and self.min_free_slots_delayer is None:
            # The user asked for none of SGLang's own.
            self.min_free_slots_delayer = Refill(
                lambda: len(self.waiting_queue), _PREFILL_STEPS[self._weights.device.type]
            )
        self.load_snapshot_writer = None  # written for others at each prefill, by a walk through the whole queue

    @_exits_on_error
    def run_event_loop(self) -> None:
        garbage.settle()
        super().run_event_loop()

    def init_request_dispatcher(self) -> None:
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        super().init_request_dispatcher()
        # The one request of SGLang that carries free text there and back, and is served during a pause.
        self._request_dispatcher._mapping[CheckWeightsReqInput] = self._obey

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        # Log-probs of sampled tokens only. SGLang's own mark is the end of the prompt, past which a retracted request
        # would have those of all its tokens computed once more, over the whole vocabulary, to be thrown away.
        req.logprob_start_len = -1
        # Its keys and values are made by the weights of now, or made again if it was retracted. The sender cannot know
        # the salt: a request may be sent before an update and arrive after it.
        req.extra_key = str(self._salt)
        params = req.sampling_params
        if stop := (params.custom_params or {}).get(STOP_KEY):
            params.stop_strs, params.stop_str_max_len = stop, reach(stop) - 1  # SGLang looks at one token more
            params.custom_params = None  # SGLang puts the request itself there: a cycle, collected late
            req.tokenizer = self._texts
        super()._add_request_to_queue(req, is_retracted)

    @functools.cached_property
    def _texts(self) -> _Texts:
        return _Texts(self.server_args.model_path)

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
        """One answer for all tensor-parallel ranks: the first failure, or what all of them say. Yes is yes of all."""
        if self.ps.tp_size == 1:
            return success, reply
        answers: list[Any] = [None] * self.ps.tp_size
        torch.distributed.all_gather_object(answers, (success, reply), group=self.tp_cpu_group)
        for rank, (succeeded, said) in enumerate(answers):
            if not succeeded:
                return False, f"tensor-parallel rank {rank}: {said}"
            if said != answers[0][1] and not isinstance(said, bool):
                return False, f"tensor-parallel ranks 0 and {rank} disagree: {answers[0][1]} and {said}"
        return success, all(said for _, said in answers) if isinstance(reply, bool) else reply

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

    def _do_joined(self, name: str) -> bool:
        return self._weights.joined(name)

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
            self._dead_tokens = evictable if isinstance(evictable, int) else 0  # some caches count by layer kind
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
