"""Calls of the rollout actor that wait for SGLang: all of them raise when one of its processes ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import msgspec

from asyncrl.engines.base import EngineDied
from asyncrl.weights.broadcast import BroadcastFailed

T = TypeVar("T")


class Calls:
    """What is waited for on one engine, by one event loop; made in it.

    Once a process has ended, or did not answer in time, every call raises `EngineDied`, and once `end` was called what
    it was given.
    """

    def __init__(self, manager: Any, processes: Sequence[BaseProcess]) -> None:
        """`manager` is SGLang's `TokenizerManager`, `processes` are those that it talks to."""
        self.processes = processes
        self._manager = manager
        self._error: RuntimeError | None = None
        self._waited: set[asyncio.Future[Any]] = set()
        for process in processes:
            asyncio.get_running_loop().add_reader(process.sentinel, self._on_exit, process)

    async def result(self, work: Awaitable[T], timeout_s: float | None, doing: str) -> T:
        """The result of `work`, which goes on by itself if the caller is cancelled or the time is up."""
        task = asyncio.ensure_future(work)
        # Not one future for all to wait on: leaving it would look through all who wait, and there may be thousands.
        self._waited.add(task)
        task.add_done_callback(self._waited.discard)
        if self._error is not None:
            task.cancel()
        await asyncio.wait((task,), timeout=timeout_s)
        if task.cancelled():
            self.check()
        if task.done():
            return task.result()
        self.end(EngineDied(f"SGLang took longer than {timeout_s:g} s while {doing}"))
        self.check()
        raise AssertionError("an end is an error")

    async def command(self, doing: str, timeout_s: float, **command: Any) -> Any:
        """What `sglang_scheduler` answers to a command of plain values and dataclasses; raises `RuntimeError` with its
        message if it failed there."""
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        action = msgspec.json.encode(command).decode()  # engines are paused meanwhile: no slower encoder
        asking = self._manager.check_weights(CheckWeightsReqInput(action=action))
        success, message, *_ = await self.result(asking, timeout_s, doing)
        reply = msgspec.json.decode(message)
        if not success:
            kind = BroadcastFailed if BroadcastFailed.__name__ in str(reply) else RuntimeError
            raise kind(f"SGLang failed while {doing}: {reply}")
        return reply

    def check(self) -> None:
        """Raises an error if nothing can be waited for any more."""
        if self._error is not None:
            raise type(self._error)(str(self._error)) from self._error

    def end(self, error: RuntimeError) -> None:
        """Everything that is waited for raises; the first error is the one that is told."""
        if self._error is None:
            self._error = error
            for process in self.processes:
                asyncio.get_running_loop().remove_reader(process.sentinel)
            for task in list(self._waited):
                task.cancel()

    def _on_exit(self, process: BaseProcess) -> None:
        process.join(timeout=1)
        self.end(EngineDied(f"the SGLang process {process.pid} ended with exit code {process.exitcode}"))
