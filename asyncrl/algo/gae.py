"""Advantages of tokens by a value function, and the loss that the value function learns by. Pure functions on tensors.

The value of a token is that of the context before it: V_t = V(everything before token t). Only sampled tokens are
steps; what a tool wrote between two of them belongs to the passage from one to the next, so no discount counts it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, sequence: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (1506.02438, equation 16) over the trained tokens; float[n].

        A_t = sum_k (gamma lam)^k delta_{t+k},   delta_t = r_t + gamma V_{t+1} - V_t

    `rewards` and `values` float[n], of each token; `sequence` int64[n], the trajectory, whose tokens follow one another
    in order. The value after the last token is 0: a trajectory that ran out of tokens ends there like any other. What a
    stale policy's tokens teach is the value of that policy: nothing here reweights them.
    """
    if not len(rewards):
        return rewards.clone()
    lengths = torch.bincount(sequence)
    starts = lengths.cumsum(0) - lengths
    place = sequence, torch.arange(len(sequence), device=sequence.device) - starts[sequence]
    shape = len(lengths), int(lengths.max())
    reward, value = rewards.new_zeros(shape), values.new_zeros(shape[0], shape[1] + 1)
    reward[place], value[:, :-1][place] = rewards, values
    delta = reward + gamma * value[:, 1:] - value[:, :-1]
    advantage = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for step in reversed(range(shape[1])):  # the padding behind a shorter trajectory holds zeros
        following = delta[:, step] + gamma * lam * following
        advantage[:, step] = following
    return advantage[place]


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of each token, and whether the clip took its gradient; float[n] and bool[n].

    The larger of the errors of V and of V held within `clip` of `old_values`, which are those from before the first
    update on the batch (as the authors of PPO, 1707.06347, implemented it); 0 is no clip.
    """
    plain = (values - returns).square() / 2
    if not clip:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    held = (torch.clamp(values, old_values - clip, old_values + clip) - returns).square() / 2
    return torch.maximum(plain, held), held.detach() > plain.detach()
