"""The engine protocol: what a rollout actor needs from whatever generates tokens.

A weight update is `pause`, `receive`, `resume`; requests stay in flight through it. An engine joins the broadcast group
with `num_ranks` consecutive ranks (one per tensor-parallel rank), starting at `first_rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from asyncrl.types import Completion, Sampling, Version
from asyncrl.weights.broadcast import Rendezvous
from asyncrl.weights.buckets import Bucket

OnUpdate: TypeAlias = Literal["keep", "recompute", "abort"]
"""What new weights do to live requests: keep their KV cache, compute it again, or end them."""

CHECKPOINT = "checkpoint"
"""Stands for the digest of the weights that an engine started with, until the first update."""


LENGTH_IN_A_RUN = "the environment's max_prompt_tokens plus rollout.max_new_tokens"
"""What an engine's `max_length` is there: errors name what one can set."""


class EngineDied(RuntimeError):
    """A process behind an engine has ended: nothing that is asked of it will ever be answered."""


class Engine(Protocol):
    """Two implementations: `engine.embedded` and `engine.sglang`. One contract suite runs against both."""

    vocabulary: int
    """Token ids are below it."""

    @property
    def num_ranks(self) -> int:
        """Ranks that this engine takes in the broadcast group."""

    @property
    def busy_s(self) -> float:
        """Seconds since the start during which at least one request was being generated."""

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        """One completion. The same seed, prompt and weights give the same tokens."""

    async def join(self, where: Rendezvous, first_rank: int) -> None:
        """Enter a broadcast group, leaving the one before. Blocks until every member has arrived."""

    async def pause(self) -> None:
        """Stop making tokens, keep the requests. On return no token of the old weights is still being made.

        After `release`: take the memory back."""

    async def release(self) -> None:
        """`pause`, and give the GPU memory of weights and cache back until the next `pause`; a whole update must
        follow. Requests in flight start over on it."""

    async def receive(self, buckets: Sequence[Bucket]) -> None:
        """Take part in the broadcast of these buckets, in order, and load them. Only while paused."""

    async def resume(self, version: Version) -> str:
        """Go on; every token sampled from here on carries `version`. Returns the digest of the weights in use."""

    async def close(self) -> None:
        """Free everything; requests still in flight end with an error."""
