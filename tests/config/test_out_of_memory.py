"""Memory that runs out is told with what was asked for, what there was, who held it, and the settings to change."""

import pytest
import torch
from helpers import run

from asyncrl.config import loading as configuration
from asyncrl.config import out_of_memory as memory
from asyncrl.config.out_of_memory import OutOfMemory, available_bytes, told
from asyncrl.engines.embedded.engine import EmbeddedEngine
from asyncrl.models.loading import load_model
from asyncrl.models.tiny import build_tiny
from asyncrl.types import Sampling

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.72 GiB in all"
REMEDIES = ["lower a (3)", "lower b (4)"]


def failing(error):
    def fail(*_arguments, **_options):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError(CUDA), "out of GPU memory in the step, 2.5 GiB asked for"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of GPU memory in the step"),
        (RuntimeError("NCCL error: Failed to CUDA calloc: out of memory"), "out of GPU memory in the step"),
        (RuntimeError("can't allocate memory: you tried to allocate 56151244800 bytes."), "52.3 GiB asked for, "),
        (MemoryError(), "out of host memory in the step, "),
    ],
)
def test_every_kind_of_it_is_told_once(error, words):
    with pytest.raises(OutOfMemory) as caught, told("outer", ["other"]), told("the step", REMEDIES, "the learner"):
        raise error
    assert words in str(caught.value)
    assert str(caught.value).endswith(": lower a (3), then lower b (4)")
    assert "\n" not in str(caught.value)


def test_what_torch_raises_here_is_known():
    with pytest.raises(OutOfMemory, match=r"1048576\.0 GiB asked for, [\d.]+ GiB free; the engine held [\d.]+ .iB"):  # noqa: SIM117
        with told("the cache", REMEDIES, "the engine"):
            torch.empty(1 << 50, dtype=torch.uint8)


def test_who_holds_a_gpu(monkeypatch):
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib, 140 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 * gib)
    line = memory.describe("the step", CUDA, REMEDIES, "the learner")
    assert ", 1.0 GiB of 140.0 GiB free; the learner held 4.0 GiB, other processes 135.0 GiB: " in line


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes") as caught, told("the step", REMEDIES):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, ValueError)


def test_requests_hear_that_their_engine_ran_out(tmp_path, monkeypatch):
    build_tiny(tmp_path, seed=0)
    engine = EmbeddedEngine(load_model(tmp_path, torch.float32, "cpu"), max_running=2, max_length=16, remedies=REMEDIES)

    async def ask():
        monkeypatch.setattr(engine, "_logits", failing(torch.OutOfMemoryError(CUDA)))
        with pytest.raises(OutOfMemory, match=r"in generating, .* lower a \(3\)"):
            await engine.generate([2, 3], Sampling(2, 1.0), 0)
        await engine.close()

    run(ask())


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (
            ["placement=colocated", "device=cuda", "rollout.engine=sglang", "rollout.gpu_memory_utilization=0.97"],
            "lower rollout.gpu_memory_utilization (0.97 of the GPU for each of 2 engines)",
        ),
        (["device=cuda"], "lower learner.micro_batch_tokens (16384)"),
        (["device=cpu"], "lower rollout.num_actors (2 engines) or rollout.max_running"),
    ],
)
def test_the_most_effective_setting_comes_first(words, first):
    assert memory.learner_remedies(configuration.load(None, words))[0] == first


@pytest.mark.parametrize(
    ("limit", "left"), [("max", 8192 * 1024), ("4000000", 4_000_000 - 3_000_000 + 500_000), ("1000000", 0)]
)
def test_the_limit_of_a_container_counts(tmp_path, limit, left):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8192 kB\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path) == 8192 * 1024
    for name, text in {"max": limit, "current": "3000000", "stat": "anon 1\ninactive_file 500000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_bytes(tmp_path / "meminfo", tmp_path) == left
    assert available_bytes(tmp_path / "none", tmp_path / "none") is None
