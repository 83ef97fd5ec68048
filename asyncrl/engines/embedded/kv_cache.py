"""The keys and values of every live request, in fixed slots, and the two forwards that fill them.

    slot    positions ->
      0     k k k k k k .  .  .        row 0 of a decode forward
      1     k k k .  .  .  .  .        row 1
      2     k k k k .  .  .  .  .      row 2: live rows are 0..R-1, so a slice is the batch
      3     .  .  .  .  .  .  .  .     free

A model's own forward calls `update` once per layer on what it is given as its cache. A prefill attends within itself
and leaves a copy in the slots; a decode step writes one position per row and attends over the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asyncrl.engines.base import LENGTH_IN_A_RUN
from asyncrl.models.loading import attention_of, rope_limit

_PREFILL_TOKENS = 1 << 14  # Padded tokens in one prefill forward; bounds its memory.
_ROUND = 16  # Positions are read in whole multiples: the GPU attention kernels want an aligned mask.


class SlotCache:
    """Keys and values, [2 * layers, rows, kv_heads, max_length, head_dim], and the mask of what is filled."""

    def __init__(self, model: Any, num_rows: int, max_length: int) -> None:
        """Allocates everything at once. Raises `ValueError` for a model whose layers do not attend to everything."""
        config = model.config
        _check(model, max_length)
        self.num_rows, self.max_length = num_rows, -(-max_length // _ROUND) * _ROUND
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._model, self._device, dtype = model, model.device, model.dtype
        # Zeros, not garbage: a masked position has weight 0, and 0 times NaN is NaN.
        shape = (2 * config.num_hidden_layers, num_rows, kv_heads, self.max_length, head_dim)
        self._slots = torch.zeros(shape, dtype=dtype, device=self._device)
        self._flat = self._slots.flatten(1, 3).unbind(0)
        # Added to the attention scores, see `_additive`: which positions of a slot are filled.
        self._mask = torch.full((num_rows, self.max_length), -torch.inf, dtype=dtype, device=self._device)
        self._steps = torch.arange(self.max_length, device=self._device)
        # Where each row of the mask, and each (row, head) of the slots, starts when flattened.
        self._mask_starts = self.max_length * torch.arange(num_rows, device=self._device)
        self._slot_starts = self.max_length * torch.arange(num_rows * kv_heads, device=self._device).view(num_rows, -1)

    @property
    def num_bytes(self) -> int:
        """Of the keys and values; the mask is a small part of that."""
        return self._slots.nbytes

    def move(self, source: int, target: int) -> None:
        """Copies the row `source` over the row `target`."""
        self._slots[:, target] = self._slots[:, source]
        self._mask[target] = self._mask[source]

    def decode(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """One token for each of rows 0..R-1; row r's token goes to `positions[r]`. Next-token logits, [R, V]."""
        num_rows, longest = len(token_ids), max(positions) + 1
        ids, at = torch.tensor([token_ids, positions], device=self._device)
        self._mask.view(-1).index_fill_(0, self._mask_starts[:num_rows] + at, 0.0)
        position_ids = at.unsqueeze(1)
        where = (self._slot_starts[:num_rows] + position_ids).view(-1)
        span = -(-longest // _ROUND) * _ROUND
        cache = _Decode(self._flat, self._slots[:, :num_rows, :, :span].unbind(0), where)
        return self._forward(ids.unsqueeze(1), position_ids, self._mask[:num_rows, None, None, :span], cache)

    def fill(self, sequences: Sequence[tuple[int, ...]], first_row: int) -> tuple[Tensor, int]:
        """Sequence i goes to the slot `first_row + i`; equal sequences are computed once and copied.

        Returns next-token logits, [N, V], and how many tokens were computed.
        """
        members: dict[tuple[int, ...], list[int]] = {}
        for index, sequence in enumerate(sequences):
            members.setdefault(sequence, []).append(index)
        order: list[int] = []
        parts = []
        for chunk in _chunks(sorted(members, key=len, reverse=True)):
            indices = [index for sequence in chunk for index in members[sequence]]
            owners = [owner for owner, sequence in enumerate(chunk) for _ in members[sequence]]
            logits = self._prefill(chunk, owners, [first_row + index for index in indices])
            parts.append(logits[torch.tensor(owners, device=self._device)])
            order.extend(indices)
        logits = torch.cat(parts)
        in_order = torch.empty_like(logits).index_copy_(0, torch.tensor(order, device=self._device), logits)
        return in_order, sum(map(len, members))

    def _prefill(self, sequences: Sequence[tuple[int, ...]], owners: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Fills slots from whole sequences; slot `rows[i]` gets `sequences[owners[i]]`. Next-token logits, [U, V].

        The U sequences are padded on the left, so that the last position of each is the one that needs logits.
        """
        longest = max(map(len, sequences))
        pads = torch.tensor([longest - len(sequence) for sequence in sequences], device=self._device).unsqueeze(1)
        ids = torch.tensor([[0] * (longest - len(s)) + list(s) for s in sequences], device=self._device)
        steps = self._steps[:longest]
        # Causal, without the padding; a padding position sees itself, as an empty softmax would be NaN.
        visible = (steps <= steps[:, None]) & ((steps >= pads.unsqueeze(2)) | (steps == steps[:, None]))
        mask = _additive(visible, self._slots.dtype)
        owner, row = torch.tensor([owners, rows], device=self._device)
        # Position t of a slot is position t + pad of the padded sequence; what lies past its end is masked.
        gather = (steps + pads).clamp_(max=longest - 1)[owner]
        filled = (self._steps + pads)[owner] < longest
        self._mask[row] = _additive(filled, mask.dtype)
        cache = _Prefill(self._slots, owner.unsqueeze(1), gather, row)
        return self._forward(ids, (steps - pads).clamp_(min=0), mask.unsqueeze(1), cache)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class _Decode:
    """The cache of one decode step: writes one position per row, reads all that is filled."""

    def __init__(self, flat: Sequence[Tensor], readable: Sequence[Tensor], where: Tensor) -> None:
        self._flat, self._readable, self._where = flat, readable, where

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """`keys` and `values` are [R, kv_heads, 1, head_dim]; returns [R, kv_heads, span, head_dim]."""
        self._flat[2 * layer].index_copy_(0, self._where, keys.flatten(0, 2))
        self._flat[2 * layer + 1].index_copy_(0, self._where, values.flatten(0, 2))
        return self._readable[2 * layer], self._readable[2 * layer + 1]


class _Prefill:
    """The cache of one prefill: copies what was computed into the slots and hands it back."""

    def __init__(self, slots: Tensor, owner: Tensor, gather: Tensor, row: Tensor) -> None:
        self._slots, self._owner, self._gather, self._row = slots, owner, gather, row

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """`keys` and `values` are [U, kv_heads, longest, head_dim]."""
        length = keys.shape[2]
        for index, computed in ((2 * layer, keys), (2 * layer + 1, values)):
            # Indexing by two tensors around a slice puts their dimensions first: [rows, length, kv_heads, head_dim].
            copied = computed[self._owner, :, self._gather]
            self._slots[index, self._row, :, :length] = copied.transpose(1, 2)
        return keys, values


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _chunks(sequences: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Cuts sequences, longest first, into batches of at most `_PREFILL_TOKENS` padded tokens (or of one sequence)."""
    chunks: list[list[tuple[int, ...]]] = []
    for sequence in sequences:
        if chunks and (len(chunks[-1]) + 1) * len(chunks[-1][0]) <= _PREFILL_TOKENS:
            chunks[-1].append(sequence)
        else:
            chunks.append([sequence])
    return chunks


def _check(model: Any, max_length: int) -> None:
    config = model.config
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"the embedded engine needs attention 'sdpa' or 'eager', the model uses {attention!r}")
    kinds, window = attention_of(config)
    if kinds:
        raise ValueError(f"the embedded engine runs attention layers only, the model has {kinds}")
    if window is not None and window < max_length:
        raise ValueError(
            f"max_length {max_length} exceeds the model's sliding attention window of {window}, which the embedded "
            f"engine does not apply: lower {LENGTH_IN_A_RUN} to {window} in all"
        )
    limit = rope_limit(model)
    if limit is not None and limit < max_length:
        raise ValueError(
            f"max_length {max_length} exceeds {limit}, beyond which the model's rotary frequencies change with the "
            f"length, also those of the keys that are cached: lower {LENGTH_IN_A_RUN} to {limit} in all"
        )
