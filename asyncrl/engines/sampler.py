"""How tokens are drawn: logits in, tokens and the log-probabilities they were drawn with out.

Randomness is counter-based: one uniform number per (seed of the request, index of the token), then the inverse of the
cumulative distribution. A request therefore gets the same tokens whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncrl.engines.base import LENGTH_IN_A_RUN
from asyncrl.types import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def check(sampling: Sampling) -> None:
    """Raises `ValueError` for settings that no distribution can be drawn with."""
    if sampling.max_new_tokens < 1:
        raise ValueError(f"sampling.max_new_tokens must be at least 1, got {sampling.max_new_tokens}")
    if not sampling.temperature >= 0:
        raise ValueError(f"sampling.temperature must be 0 (greedy) or more, got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"sampling.top_p must be above 0 and at most 1 (off), got {sampling.top_p}")
    if sampling.top_k < 0:
        raise ValueError(f"sampling.top_k must be 0 (off) or more, got {sampling.top_k}")


def check_request(token_ids: Sequence[int], sampling: Sampling, vocabulary: int, max_length: int) -> None:
    """Raises `ValueError` for a prompt or settings that an engine with this vocabulary and length cannot run."""
    check(sampling)
    if not token_ids or min(token_ids) < 0 or max(token_ids) >= vocabulary:
        wrong = [token for token in token_ids if not 0 <= token < vocabulary]
        raise ValueError(
            f"a prompt needs tokens, all in 0..{vocabulary - 1}, got {f'{wrong[0]} among them' if wrong else 'none'}: "
            "make them with the model's own tokenizer"
        )
    if len(token_ids) + sampling.max_new_tokens > max_length:
        raise ValueError(
            f"a prompt of {len(token_ids)} tokens and max_new_tokens {sampling.max_new_tokens} do not fit the engine's "
            f"max_length {max_length}, in a run {LENGTH_IN_A_RUN}: raise one of these, or shorten the prompt"
        )


def uniforms(seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, index), by two rounds of splitmix64 (Steele et al., 2014)."""
    hashed = _mix(_mix(seeds + _GOLDEN) + (indices + np.uint64(1)) * _GOLDEN)
    # 52 bits: the largest number times a total near 1 still rounds to less than the total.
    return (hashed >> np.uint64(12)).astype(np.float64) * 2.0**-52


def sample(
    logits: Tensor, samplings: Sequence[Sampling], randoms: npt.NDArray[np.float64]
) -> tuple[list[int], list[float]]:
    """Draws one token per row: token ids and log-probs, each of length R.

    `logits` is [R, V] in any float dtype, `randoms` R numbers in [0, 1). The log-probs are of the distribution that was
    sampled from; greedy rows report the untempered one.
    """
    logits = logits.float()
    plain = all(s.temperature == 1 and s.top_p == 1 and s.top_k == 0 for s in samplings)
    logprobs = torch.log_softmax(logits if plain else _shape(logits, samplings), dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    # The first token whose cumulative probability exceeds the target: one of probability 0 is never that.
    targets = torch.from_numpy(randoms).to(logits.device).unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True)
    if not plain:
        greedy = torch.tensor([s.temperature == 0 for s in samplings], device=logits.device)
        tokens = torch.where(greedy.unsqueeze(1), logits.argmax(dim=-1, keepdim=True), tokens)
    chosen = torch.cat([tokens.double(), logprobs.gather(1, tokens).double()], dim=1)
    # One copy to the host for both columns: on a GPU it is the only wait of a tick.
    columns = chosen.T.tolist()
    return [int(token) for token in columns[0]], columns[1]


def _shape(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Applies temperature, then top-k, then top-p of what top-k left; excluded tokens become -inf. [R, V] -> [R, V]."""
    device, vocabulary = logits.device, logits.shape[1]
    temperatures = torch.tensor([s.temperature or 1.0 for s in samplings], device=device)
    logits = logits / temperatures.unsqueeze(1)
    truncated = [i for i, s in enumerate(samplings) if s.temperature > 0 and (s.top_p < 1 or s.top_k > 0)]
    if not truncated:
        return logits
    rows = torch.tensor(truncated, device=device)
    top_k = torch.tensor([samplings[i].top_k or vocabulary for i in truncated], device=device).unsqueeze(1)
    top_p = torch.tensor([samplings[i].top_p for i in truncated], device=device, dtype=torch.float64).unsqueeze(1)
    ordered, order = logits[rows].sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=device) >= top_k, -torch.inf)
    probabilities = ordered.double().softmax(dim=-1)
    # A token stays while the tokens before it do not reach top_p, so the most likely one always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -torch.inf)
    return logits.index_copy(0, rows, torch.empty_like(ordered).scatter_(1, order, ordered))


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
