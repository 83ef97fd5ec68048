"""Packing: nothing cut, nothing lost, every trained token where the model predicts it."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algo.presets import resolve
from asyncrl.training.packing import pack

LOSS = resolve("async_default", {})


def groups_of(sizes):
    return [
        [of_prompt(g, trajectory(p, n, seed=97 * g + i, reward=float(i % 2))) for i, (p, n) in enumerate(group)]
        for g, group in enumerate(sizes)
    ]


def of_prompt(number, item):
    """With the first tokens of prompt `number`, as many as its own prompt has."""
    prompt = np.random.default_rng(number).integers(2, 25, len(item.token_ids)).astype(np.int32)
    return dataclasses.replace(item, token_ids=np.where(item.mask, item.token_ids, prompt))


lengths = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(lengths, min_size=2, max_size=5), min_size=1, max_size=6),
    st.integers(18, 60),
    st.integers(1, 200),
)
def test_every_token_is_packed_once_and_every_trained_token_is_predicted_from_the_one_before(sizes, row, micro):
    groups = groups_of(sizes)
    batch = pack(groups, LOSS, row_tokens=row, micro_batch_tokens=micro, max_new_tokens=9)
    flat = [item for group in groups for item in group]
    assert batch.num_tokens == sum(int(item.mask.sum()) for item in flat)
    seen = []
    for part in batch.micro_batches:
        assert part.input_ids.shape[1] <= row
        mask = part.attention_mask()[:, 0]
        for number in range(part.num_sequences):
            mine = part.sequence == number
            (place,) = part.rows[mine].unique()
            visible = mask[place, part.columns[mine][-1]]  # what the last prediction is made from
            tokens = part.input_ids[place, visible]
            assert torch.equal(part.positions[place, visible], torch.arange(len(tokens)))
            at = part.positions[place, part.columns[mine]]
            targets = part.targets[mine]
            assert torch.equal(targets[:-1], tokens[at[:-1] + 1]), "a prediction is one place before its token"
            text = (*tokens.tolist(), int(targets[-1]))
            seen.append((text, tuple((at + 1).tolist()), tuple(part.behavior_logprobs[mine].tolist())))
    wanted = [
        (tuple(t.token_ids.tolist()), tuple(t.mask.nonzero()[0].tolist()), tuple(t.logprobs[t.mask].tolist()))
        for t in flat
    ]
    assert sorted(seen) == sorted(wanted)
    inputs = sum(int((part.groups >= 0).sum()) for part in batch.micro_batches)
    assert batch.num_inputs == inputs <= batch.num_held - len(flat)
    assert batch.num_held == sum(len(item.token_ids) for item in flat)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(lengths, min_size=2, max_size=5), min_size=1, max_size=6),
    st.integers(18, 60),
    st.integers(1, 200),
    st.integers(2, 5),
)
def test_ranks_share_all_trajectories_evenly_in_equally_many_passes(sizes, row, micro, num_ranks):
    groups = groups_of(sizes)
    common = {"row_tokens": row, "micro_batch_tokens": micro, "max_new_tokens": 9}
    one = pack(groups, LOSS, **common)
    ranks = [pack(groups, LOSS, **common, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert len({len(batch.micro_batches) for batch in ranks}) == 1, "a rank would wait for a pass that never comes"
    assert {batch.num_tokens for batch in ranks} == {one.num_tokens}
    assert all(torch.equal(batch.advantages, one.advantages) for batch in ranks)
    parts = [part for batch in ranks for part in batch.micro_batches]
    assert all(part.input_ids.numel() <= max(micro, part.input_ids.shape[1]) for part in parts)
    columns = [trained([part]) for part in parts]
    assert sorted(column for part in columns for column in part) == sorted(trained(one.micro_batches))
    apart = [pack(groups, LOSS, **common, rank=r, num_ranks=num_ranks, share_prompts=False) for r in range(num_ranks)]
    held = [sum(int((part.segments >= 0).sum()) for part in batch.micro_batches) for batch in apart]
    assert max(held) - min(held) <= max(p + n for group in sizes for p, n in group)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(lengths, min_size=2, max_size=5), min_size=1, max_size=6), st.integers(18, 60))
def test_without_shared_prompts_rows_are_even_and_hold_no_empty_place(sizes, row):
    """Empty places would be one more segment, and its attention grows with the square of its length."""
    groups = groups_of(sizes)
    batch = pack(groups, LOSS, row_tokens=row, micro_batch_tokens=row, max_new_tokens=9, share_prompts=False)
    assert batch.fill == 1
    assert all((part.segments >= 0).all() for part in batch.micro_batches)
    assert {part.starts[-1].item() for part in batch.micro_batches} == {
        part.input_ids.numel() for part in batch.micro_batches
    }
    held = [part.input_ids.numel() for part in batch.micro_batches]
    assert max(held) <= row
    assert max(held) - min(held) <= max(p + n for group in sizes for p, n in group)


def trained(micro_batches):
    """Every trained token with its weight in the loss."""
    names = ("targets", "behavior_logprobs", "advantages", "normalizers")
    return [
        row for part in micro_batches for row in zip(*(getattr(part, name).tolist() for name in names), strict=True)
    ]


@pytest.mark.parametrize("share", [True, False])
def test_attention_sees_its_own_trajectory_and_nothing_later(share):
    (part,) = pack(
        groups_of([[(2, 2), (2, 3)]]),
        LOSS,
        row_tokens=8,
        micro_batch_tokens=99,
        max_new_tokens=3,
        share_prompts=share,
    ).micro_batches
    mask = part.attention_mask()[0, 0]
    if share:
        assert part.positions.tolist() == [[0, 1, 2, 3, 2]]
        rows = ["10000", "11000", "11100", "11110", "11001"]
    else:
        assert part.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
        rows = ["1000000", "1100000", "1110000", "1111000", "0000100", "0000110", "0000111"]
    assert mask.int().tolist() == [[int(visible) for visible in row] for row in rows]


def test_denominators_come_from_the_whole_batch():
    groups = groups_of([[(3, 4), (3, 2)], [(5, 6), (5, 8)]])
    whole = pack(groups, LOSS, row_tokens=30, micro_batch_tokens=1000, max_new_tokens=9)
    parts = pack(groups, LOSS, row_tokens=13, micro_batch_tokens=1, max_new_tokens=9)
    assert len(parts.micro_batches) > len(whole.micro_batches) == 1
    for batch in (whole, parts):
        total = sum(float(part.normalizers.sum()) for part in batch.micro_batches)
        assert total == pytest.approx(1.0), "token mean: the weights of all trained tokens add up to one"


def test_truncated_trajectories_keep_their_place_in_the_denominator():
    groups = groups_of([[(3, 4), (3, 4)]])
    groups[0][1] = dataclasses.replace(groups[0][1], finish="length")
    batch = pack(groups, LOSS, row_tokens=20, micro_batch_tokens=99, max_new_tokens=9, mask_truncated=True)
    assert batch.advantages.tolist() == [-0.5, 0.0]
    (part,) = batch.micro_batches
    factors = {part.members[n].item(): part.normalizers[part.sequence == n].tolist() for n in range(2)}
    assert factors == {0: [1 / 8] * 4, 1: [0.0] * 4}


def test_tokens_of_two_versions_in_one_trajectory_keep_their_own_version_and_logprob():
    mixed = dataclasses.replace(
        trajectory(2, 5, seed=0, reward=1.0),
        versions=np.array([0, 0, 3, 3, 3, 5, 5], np.int32),
        logprobs=np.array([0, 0, -0.3, -0.31, -0.32, -0.5, -0.51], np.float32),
    )
    groups = [[trajectory(3, 2, seed=1, version=4), mixed]]
    batch = pack(groups, LOSS, row_tokens=40, micro_batch_tokens=99, max_new_tokens=9)
    pairs = [
        (version, round(logprob, 2))
        for part in batch.micro_batches
        for version, logprob in zip(part.versions.tolist(), part.behavior_logprobs.tolist(), strict=True)
        if version != 4
    ]
    assert pairs == [(3, -0.3), (3, -0.31), (3, -0.32), (5, -0.5), (5, -0.51)]


def test_long_replies_are_punished_before_advantages_are_taken():
    groups = groups_of([[(3, 4), (3, 8)]])
    groups[0][0] = dataclasses.replace(groups[0][0], reward=1.0)
    batch = pack(groups, LOSS, row_tokens=30, micro_batch_tokens=99, max_new_tokens=10, overlong_tail=4)
    assert batch.advantages.tolist() == [0.25, -0.25], "rewards 1 and 1 - 0.5"


def test_the_replies_of_several_turns_are_punished_for_the_longest():
    """The limit cuts a reply: 5 + 9 + 5 tokens under one of 10 are 9, of which 6 are free of punishment."""
    mask = np.repeat([False, True, False, True, False, True], [2, 5, 3, 9, 1, 5])
    turns = dataclasses.replace(trajectory(2, 23, seed=0), mask=mask)
    batch = pack([[turns]], LOSS, row_tokens=30, micro_batch_tokens=99, max_new_tokens=10, overlong_tail=4)
    assert batch.rewards.tolist() == [-0.75]


def test_a_trajectory_that_cannot_fit_is_an_error_not_a_drop():
    with pytest.raises(RuntimeError, match="18 tokens does not fit a row of 10"):
        pack(groups_of([[(9, 9), (1, 1)]]), LOSS, row_tokens=10, micro_batch_tokens=99, max_new_tokens=9)
