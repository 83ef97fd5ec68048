"""The choices made before SGLang starts; none of them needs SGLang itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncrl.engines import sampler
from asyncrl.engines.sglang.engine import _finish
from asyncrl.engines.sglang.launch import choose_attention_backend, server_arguments
from asyncrl.engines.sglang.memory import cache_bytes
from asyncrl.engines.sglang.sampling import draw, truncate, uniforms
from asyncrl.engines.sglang.scheduler import Refill
from asyncrl.types import Sampling

ALL = {"flashinfer", "fa3", "triton", "torch_native"}


@pytest.mark.parametrize(
    ("requested", "capability", "available", "chosen"),
    [
        ("auto", (9, 0), ALL, "flashinfer"),
        ("auto", (9, 0), ALL - {"flashinfer"}, "fa3"),
        ("auto", (10, 0), ALL - {"flashinfer"}, "triton"),
        ("auto", (7, 0), ALL, "triton"),
        ("auto", None, ALL, "torch_native"),
        ("torch_native", None, set(), "torch_native"),
        ("fa3", (8, 6), ALL, "fa3"),
        ("triton", (9, 0), ALL, "triton"),
        ("torch_native", (9, 0), ALL, "torch_native"),
    ],
)
def test_an_attention_backend_that_can_work_is_chosen(requested, capability, available, chosen):
    assert choose_attention_backend(requested, capability, available) == chosen


@pytest.mark.parametrize(
    ("requested", "capability", "available", "message"),
    [
        ("fa3", (10, 0), ALL, r"'fa3' needs compute capability 8.0 to 9.0, this GPU has 10.0: use 'auto' or 'flashinf"),
        ("flashinfer", (9, 0), {"triton"}, r"'flashinfer' is not installed: use 'auto' or 'triton'"),
        ("triton", None, ALL, r"'triton' needs a GPU and this engine runs on a CPU: use 'auto' or 'torch_native'"),
        ("auto", (6, 1), ALL, r"no attention backend works on this GPU: flashinfer needs .* 7.5 or more, .* 6.1;"),
        ("flashinfr", (9, 0), ALL, r"must be auto, flashinfer, .*, got 'flashinfr'; did you mean 'flashinfer'\?"),
    ],
)
def test_an_attention_backend_that_cannot_work_is_refused(requested, capability, available, message):
    with pytest.raises(ValueError, match=message):
        choose_attention_backend(requested, capability, available)


def test_only_stops_of_the_request_end_a_completion_well():
    sampling = Sampling(5, stop=("</answer>",))
    assert _finish({"type": "stop", "matched": 7}, sampling) == "stop"
    assert _finish({"type": "stop", "matched": "</answer>"}, sampling) == "stop"
    with pytest.raises(RuntimeError, match=r"SGLang ended a request: .*NaN happened"):
        _finish({"type": "stop", "matched": "NaN happened"}, sampling)


def arguments(device: str = "cuda", **extra):
    return server_arguments(
        model_path="m",
        dtype="bfloat16",
        device=device,
        tensor_parallel_size=2,
        attention_backend="triton",
        max_running=64,
        max_length=1024,
        gpu_memory_utilization=0.7,
        seed=5 - 2**40,
        extra=extra,
        known={"log_level", "max_total_tokens", "chunked_prefill_size", "disable_overlap_schedule"},
    )


def test_the_users_arguments_replace_defaults_only():
    made = arguments("cpu", log_level="info", chunked_prefill_size=512)
    assert (made["log_level"], made["chunked_prefill_size"]) == ("info", 512)
    assert (made["tp_size"], made["mem_fraction_static"], made["random_seed"]) == (2, 0.7, 5), "32 bits"
    assert made["max_total_tokens"] == (1 << 16) + 1024
    assert arguments()["cuda_graph_max_bs_decode"] == 64


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("tp_size", r"engine_args.tp_size is set from rollout.tensor_parallel_size: set that instead"),
        ("dp_size", r"engine_args.dp_size cannot be changed: .* raise rollout.num_actors"),
        ("chunked_prefil_size", r"is not an argument of this SGLang version; did you mean 'chunked_prefill_size'\?"),
    ],
)
def test_arguments_that_others_own_or_that_do_not_exist_are_refused(key, message):
    with pytest.raises(ValueError, match=message):
        arguments(**{key: 1})


def test_the_random_numbers_are_those_of_the_embedded_engine():
    seeds = np.array([0, 7, 2**63 - 1, 12345678901234567], dtype=np.uint64)
    indices = np.array([0, 3, 100000, 17], dtype=np.uint64)
    ours = uniforms(torch.from_numpy(seeds.astype(np.int64)), torch.from_numpy(indices.astype(np.int64)))
    assert ours.tolist() == sampler.uniforms(seeds, indices).tolist()


def test_truncated_draws_follow_the_distribution_that_is_left():
    probs = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).repeat(20000, 1)
    truncate(probs, torch.full((20000,), 3), torch.full((20000,), 0.7))
    # Top-k leaves 4/9, 3/9 and 2/9; the first two of them reach 0.7.
    assert torch.allclose(probs[0], torch.tensor([4 / 7, 0.0, 3 / 7, 0.0]))
    rows = torch.arange(20000)
    shares = torch.bincount(draw(probs, rows, rows).long(), minlength=4) / 20000
    assert torch.allclose(shares, probs[0], atol=0.015)


@pytest.mark.parametrize(
    ("waiting", "places", "running", "prefill", "steps"),
    [
        (3, 8, 0, 4, 0),
        (30, 30, 30, 1, 0),
        (200, 7, 28, 1, 3),
        (7, 200, 28, 1, 3),
        (7, 9, 28, 4, 15),
        (1, 1, 256, 1, 31),
        (9, 0, 28, 4, 0),
    ],
)
def test_requests_wait_until_that_costs_as_much_as_a_prefill(waiting, places, running, prefill, steps):
    refill = Refill(lambda: waiting, prefill)
    for _ in range(2):  # the second time as the first
        waited = [refill.should_delay(running_bs=running, num_allocatable_reqs=places) for _ in range(steps + 1)]
        assert waited == [True] * steps + [False]


SIZES = [5, 256, 2048, 9000]


def rows_of_weights(size):
    """Whole numbers, so that sums are exact; with zeros here and there, and at the end of half of the rows."""
    random = torch.Generator().manual_seed(size)
    weights = torch.randint(0, 9, (200, size), generator=random).float()
    weights *= torch.rand(200, size, generator=random) < 0.3
    weights[:, size // 2] += 1
    weights[:100, 3 * size // 4 :] = 0
    return weights, torch.randint(0, 2**62, (200,), generator=random), torch.arange(200)


@pytest.mark.parametrize("size", SIZES)
def test_draws_invert_the_cumulative_distribution(size):
    weights, seeds, positions = rows_of_weights(size)
    cumulative = weights.double().cumsum(dim=-1)
    targets = uniforms(seeds, positions).unsqueeze(1) * cumulative[:, -1:]
    chosen = draw(weights, seeds, positions)
    assert torch.equal(chosen, torch.searchsorted(cumulative, targets, right=True)[:, 0].int())
    assert (weights.gather(1, chosen.long().unsqueeze(1)) > 0).all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_draws_the_same():
    """In Triton's interpreter, which is chosen before Triton is imported."""
    script = """
import torch
from test_sglang_launch import SIZES, rows_of_weights
from asyncrl.engines.sglang import draw_kernel, sampling
for size in SIZES:
    rows = rows_of_weights(size)
    assert torch.equal(draw_kernel.draw(*rows), sampling.draw(*rows)), size
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=Path(__file__).parent)


def test_rows_that_are_not_numbers_draw_a_token_of_the_vocabulary():
    rows = torch.arange(3)
    probs = torch.full((3, 300), torch.nan)
    assert (draw(probs, rows, rows) < 300).all()


def test_truncation_leaves_other_rows_alone():
    row = [0.2, 0.5, 0.3]
    probs = torch.tensor([row, row, row, row])
    truncate(probs, torch.tensor([1, 2, 1 << 30, 1 << 30]), torch.tensor([0.1, 1.0, 1.0, 0.4]))
    assert probs[0].tolist() == probs[2].tolist() == pytest.approx(row)
    assert probs[1].tolist() == pytest.approx([0.0, 0.625, 0.375])
    assert probs[3].tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_a_cache_gets_its_share_of_the_gpu_less_the_model():
    assert cache_bytes(0.25, total=80 << 30, held=5 << 30, free=40 << 30) == 15 << 30


@pytest.mark.parametrize(
    ("held", "free", "message"),
    [
        (20, 40, r"utilization 0.25 leaves no room for a cache \(20.0 of 80.0 GiB, 20.0 for the model\): raise it"),
        (5, 14, r"0.25 is more than what is free \(20.0 of 80.0 GiB, 5.0 for the model; 14.0 free\): lower it, or end"),
    ],
)
def test_a_cache_that_has_no_room_says_what_to_change(held, free, message):
    with pytest.raises(ValueError, match=message):
        cache_bytes(0.25, total=80 << 30, held=held << 30, free=free << 30)
