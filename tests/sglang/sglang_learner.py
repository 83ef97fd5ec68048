"""A learner in a process of its own, which the engine tests tell what to broadcast."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from asyncrl.weights.broadcast import BroadcastGroup, Rendezvous, open_rendezvous
from asyncrl.weights.buckets import Bucket, digest_of, make_buckets
from asyncrl.weights.sender import Outgoing

Tensors = Mapping[str, torch.Tensor]


def _serve(pipe: Connection, backend: str, device: str, dtype: str) -> None:
    """Obeys ("open", world size, seconds), ("join",), ("send", tensors, how many buckets) until the pipe closes;
    ("join as", rendezvous, rank) and ("receive", buckets) make it another member instead; ("memory",) asks for the
    bytes that it holds on its GPU."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)
    where: Any = None
    store: Any = None
    group: Any = None
    while True:
        try:
            command, *rest = pipe.recv()
        except EOFError:
            return
        if command == "open":
            where, store = open_rendezvous("127.0.0.1", *rest, backend)
            pipe.send(where)
        elif command == "join":
            if group is not None:
                group.leave()
            group = BroadcastGroup(where, 0, "127.0.0.1", store)
            pipe.send("joined")
        elif command == "join as":
            group = BroadcastGroup(*rest)
            pipe.send("joined")
        elif command == "memory":
            pipe.send(torch.cuda.memory_allocated())
        elif command == "receive":
            flats = [torch.empty(bucket.num_bytes, dtype=torch.uint8, device=group.device) for bucket in rest[0]]
            for flat in flats:
                group.start(flat)()
            pipe.send([flat.cpu() for flat in flats])
        else:
            tensors, limit = rest
            try:
                outgoing = Outgoing(buckets_of(tensors, dtype)[:limit], dict(tensors), group)
                pipe.send(outgoing.send())
            except RuntimeError as error:
                pipe.send(error)


def buckets_of(tensors: Tensors, dtype: str = "float32") -> list[Bucket]:
    """Several buckets, so that an update can stop between two."""
    return make_buckets(tensors.items(), dtype, 200_000)


class Learner:
    """Its handle in the test process."""

    def __init__(self, backend: str = "gloo", device: str = "cpu", dtype: str = "float32") -> None:
        context = multiprocessing.get_context("spawn")
        self._dtype = dtype
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, backend, device, dtype), daemon=True)
        self._process.start()
        theirs.close()

    async def _ask(self, *command: Any) -> Any:
        self._pipe.send(command)
        answer = await asyncio.to_thread(self._pipe.recv)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def meet(self, *engines: Any, timeout_s: float = 30) -> Rendezvous:
        """A new broadcast group with the engines in it."""
        where = await self.rendezvous(1 + sum(engine.num_ranks for engine in engines), timeout_s)
        joins, rank = [self.enter()], 1
        for engine in engines:
            joins.append(engine.join(where, rank))
            rank += engine.num_ranks
        await asyncio.gather(*joins)
        return where

    async def rendezvous(self, world_size: int, timeout_s: float) -> Rendezvous:
        """A meeting point that the learner itself has not entered."""
        where: Rendezvous = await self._ask("open", world_size, timeout_s)
        return where

    async def enter(self) -> None:
        """Joins at the meeting point that was made last."""
        await self._ask("join")

    async def update(self, version: int, tensors: Tensors, *engines: Any) -> str:
        """A whole update of engines that are in the group; checks their digests."""
        await asyncio.gather(*(engine.pause() for engine in engines))
        await self.send(tensors, None, *engines)
        digests = [await engine.resume(version) for engine in engines]
        assert digests == [digest_of(buckets_of(tensors, self._dtype), dict(tensors))] * len(engines)
        return digests[0]

    async def send(self, tensors: Tensors, limit: int | None, *engines: Any) -> None:
        """The first `limit` buckets, to paused engines."""
        sending = asyncio.create_task(self._ask("send", tensors, limit))
        buckets = buckets_of(tensors, self._dtype)[:limit]
        await asyncio.gather(*(engine.receive(buckets) for engine in engines))
        await sending

    async def join_as(self, where: Rendezvous, rank: int) -> None:
        """Enters the group of another learner."""
        await self._ask("join as", where, rank)

    async def receive(self, buckets: list[Bucket]) -> list[torch.Tensor]:
        """What arrives, as a member that is not the first."""
        received: list[torch.Tensor] = await self._ask("receive", buckets)
        return received

    async def memory(self) -> int:
        """Bytes that it holds on its GPU."""
        num_bytes: int = await self._ask("memory")
        return num_bytes

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
