"""The learner on a GPU: attention over segments gives what a dense mask gives, and keeps trajectories apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import trajectory

from asyncrl.config import loading as configuration
from asyncrl.models.loading import load_model
from asyncrl.models.tiny import build_tiny
from asyncrl.training.learner import Learner
from asyncrl.training.packing import MicroBatch, pack

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
GROUPS = [[trajectory(20, 30 * n, seed=10 * g + n, reward=float(n == 3)) for n in (1, 3, 7)] for g in range(4)]


def make(folder, attention: str, *words: str) -> Learner:
    config = configuration.load(None, [f"learner.attention={attention}", *words])
    return Learner(config, load_model(folder, torch.float32, "cuda"), 512)


def one_micro_batch(learner: Learner, groups=GROUPS) -> MicroBatch:
    options = {"row_tokens": 512, "micro_batch_tokens": 99999, "max_new_tokens": 300, "share_prompts": False}
    (part,) = pack(groups, learner.loss, **options).micro_batches
    return part.to(torch.device("cuda"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    build_tiny(path, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2, seed=0)
    return str(path)


@pytest.mark.parametrize("words", [(), ("learner.compile=true",)])
def test_attention_by_segment_agrees_with_a_mask(folder, words):
    found = []
    for learner in (make(folder, "sdpa"), make(folder, "varlen", *words)):
        part = one_micro_batch(learner)
        logprobs, _ = learner.score(part)
        (part.normalizers * part.advantages * logprobs).sum().backward()
        found.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in learner.model.parameters()])))
    (masked, expected), (segments, gradient) = found
    assert (masked - segments).abs().mean() < 0.02, "both round to bfloat16, in different places"
    assert torch.nn.functional.cosine_similarity(gradient, expected, dim=0) > 0.99


def test_attention_by_segment_keeps_trajectories_apart(folder):
    learner = make(folder, "varlen")
    changed = [list(group) for group in GROUPS]
    item = changed[1][1]
    changed[1][1] = replace(item, token_ids=np.where(item.mask, 9, item.token_ids))
    found = []
    for groups in (GROUPS, changed):
        part = one_micro_batch(learner, groups)
        with torch.no_grad():
            logprobs = learner.score(part)[0]
        found.append([logprobs[part.sequence == number] for number in range(part.num_sequences)])
    assert sum(not torch.equal(*pair) for pair in zip(*found, strict=True)) == 1


def test_auto_takes_segments_in_bfloat16_only(folder):
    assert make(folder, "auto").attention == "varlen"
    assert make(folder, "auto", "learner.dtype=float32").attention == "sdpa"
    with pytest.raises(ValueError, match="needs bfloat16"):
        make(folder, "varlen", "learner.dtype=float32")
