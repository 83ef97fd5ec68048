"""The preconditions: each passes and fails for its own reason, through the doctor and through a run, without the
hardware that it is about."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from asyncrl.cli import doctor
from asyncrl.config import loading as configuration
from asyncrl.driver import machine, preconditions, preflight
from asyncrl.driver import run as job
from asyncrl.driver.preconditions import PRECONDITIONS, Look
from asyncrl.engines.sglang.launch import SUPPORTED_VERSION
from asyncrl.models.loading import longest_context
from asyncrl.models.tiny import build_tiny

SCRIPT = Path(__file__).parents[2] / "launch" / "doctor.py"

H100 = preflight.Gpu("H100", (9, 0), 80.0, 85.0)
T4 = preflight.Gpu("T4", (7, 5), 15.0, 16.0)


def config(*words):
    return configuration.load(None, list(words))


def raising(error):
    def action(*_):
        raise error

    return action


def row(name, wanted, scratch, **facts):
    """The doctor's row of one precondition, where some of what is looked at is given."""
    look = Look(wanted, Path(wanted.run_dir), str(scratch), num_heldout=1)
    vars(look).update(facts)
    condition = next(condition for condition in PRECONDITIONS if condition.name == name)
    return preconditions.tried(condition, look)


@pytest.mark.parametrize(
    ("python", "torch", "status", "word"),
    [
        ("3.11.0", "2.11.0", "ok", "torch 2.11.0"),
        ("3.13.1", "2.13.0+cpu", "ok", "Python 3.13.1"),
        ("3.10.9", "2.13.0", "FAIL", "Python 3.10.9, needed is >=3.11"),
        ("3.11.0", None, "FAIL", "torch not installed, needed is >=2.11"),
        ("3.11.0", "2.10.1", "FAIL", "torch 2.10.1"),
    ],
)
def test_packages(python, torch, status, word):
    needs = ["torch>=2.11", "peft>=0.18; extra == 'lora'"]
    check = preflight.check_packages(needs, ">=3.11", python, {"torch": torch}.get)
    assert (check.status, word in check.finding, bool(check.remedy)) == (status, True, status == "FAIL")


def test_the_sglang_that_the_engine_takes_is_the_one_that_is_installed_and_tested():
    pinned = f"sglang=={SUPPORTED_VERSION}"
    assert f'"{pinned}"' in (doctor.ROOT / "pyproject.toml").read_text()
    assert pinned in (doctor.ROOT / "tests" / "sglang" / "requirements-no-deps.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("found", "status", "remedy"),
    [
        (("auto", None, None, 0), "ok", ""),
        (("cpu", None, "580.1", 0), "ok", ""),
        (("cuda", "12.8", "580.1", 2), "ok", ""),
        (("cuda", "12.8", None, 0), "FAIL", "install NVIDIA's driver"),
        (("cuda", None, "580.1", 0), "FAIL", "CUDA build of torch"),
        (("auto", None, "580.1", 0), "warn", "CUDA build of torch"),
        (("auto", "13.0", "570.1", 0), "warn", "580 or later"),
        (("cuda", "13.0", "580.1", 0), "FAIL", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_cuda(found, status, remedy):
    check = preflight.check_cuda(*found)
    assert check.status == status
    assert remedy in check.remedy


def test_the_transformers_that_sglang_was_made_for():
    needs = ["torch==2.11", "sentence_transformers; extra == 'test'", "transformers==5.12.1"]
    check = preflight.check_transformers(needs, "5.23.0", "fa3")
    assert (check.status, "made for ==5.12.1" in check.finding) == ("warn", True)
    assert check.remedy.endswith(" -m pip install 'transformers==5.12.1'")
    assert {preflight.check_transformers(*facts, "fa3").status for facts in [(needs, "5.12.1"), ([], "5.23.0")]} == {
        "ok"
    }


SGLANG = ["rollout.engine=sglang", "rollout.dtype=bfloat16"]


@pytest.mark.parametrize(
    ("gpus", "words", "status"),
    [
        ([], [], "ok"),
        ([H100], [], "ok"),
        ([H100, T4], [], "warn"),
        ([], SGLANG, "FAIL"),
        ([], [*SGLANG, "cluster.address=auto"], "warn"),
        ([], [*SGLANG, "device=cpu"], "ok"),
        ([], ["device=cuda"], "FAIL"),
        ([H100], SGLANG, "ok"),
    ],
)
def test_gpus(gpus, words, status):
    assert preflight.check_gpus(config(*words), gpus).status == status


@pytest.mark.parametrize(("capability", "word"), [((9, 0), "for 9.0"), (None, "torch_native on the CPU")])
def test_sglang_and_its_attention(monkeypatch, tmp_path, capability, word):
    from asyncrl.engines.sglang import launch as sglang_launch

    monkeypatch.setattr(sglang_launch, "available_attention_backends", lambda: {"triton", "torch_native"})
    monkeypatch.setattr(sglang_launch, "check_version", lambda: None)
    monkeypatch.setattr(preconditions.metadata, "requires", lambda _: [])
    gpus = [H100] if capability else []
    assert word in row("sglang", config(), tmp_path, gpus=gpus).finding
    wrong = row("sglang", config("rollout.attention_backend=flashinfer"), tmp_path, gpus=gpus)
    assert (wrong.status, "attention_backend 'flashinfer'" in wrong.finding) == ("FAIL", True)


def test_placement(tmp_path):
    words = ["device=cuda", "rollout.num_actors=2"]
    assert row("placement", config(*words), tmp_path, gpus=[H100] * 3).status == "ok"
    few = row("placement", config(*words), tmp_path, gpus=[H100])
    assert (few.status, "needs 3 GPUs" in few.finding, "lower" in few.remedy) == ("FAIL", True, True)


def test_what_nodes_of_the_runs_own_have(monkeypatch, tmp_path):
    named = config('cluster.learner_resources={"node:127.0.0.1"=0.1, big=1}')
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"big": 1}')
    assert row("placement", named, tmp_path).status == "ok"
    monkeypatch.delenv("RAY_OVERRIDE_RESOURCES")
    assert row("placement", named, tmp_path).status == "FAIL"


@pytest.mark.parametrize(("have", "status"), [(20.0, "ok"), (11.0, "warn"), (9.0, "FAIL")])
def test_compare(have, status):
    assert preflight.compare("disk", 10.0, have, "free some").status == status


def test_host_memory_grows_with_the_model_on_a_cpu_only():
    assert preflight.check_host_memory(config(), False, 400_000, 16.0).status == "ok"
    assert preflight.check_host_memory(config(), False, 10**9, 16.0).status == "FAIL"
    assert preflight.check_host_memory(config(), True, 10**9, 16.0).status == "ok"
    assert preflight.check_host_memory(config("learner.num_gpus=2"), True, 10**9, 15.0).status == "FAIL", "a checkpoint"
    assert preflight.check_host_memory(config(), False, 1, None).status == "warn"


@pytest.mark.parametrize(
    ("has_gpus", "have", "status"),
    [(False, 4.0, "ok"), (False, 1.0, "warn"), (False, 0.7, "FAIL"), (True, 15.0, "ok"), (True, 3.0, "FAIL")],
)
def test_only_what_surely_does_not_fit_in_host_memory_is_refused(has_gpus, have, status):
    assert preflight.check_host_memory(config(), has_gpus, 400_000, have).status == status


def test_gpu_memory_counts_the_share_that_sglang_takes():
    shared = ["rollout.engine=sglang", "rollout.num_actors=1", "placement=colocated", "rollout.dtype=bfloat16"]
    assert preflight.check_gpu_memory(config(), 10**9, []).status == "ok"
    assert preflight.check_gpu_memory(config(), 10**9, [H100]).status == "ok"
    assert preflight.check_gpu_memory(config(), 10**9, [H100, T4]).status == "FAIL"
    assert preflight.check_gpu_memory(config(), 7 * 10**9, [H100]).status == "FAIL"
    assert preflight.check_gpu_memory(config("learner.num_gpus=4"), 7 * 10**9, [H100]).status == "ok"
    assert preflight.check_gpu_memory(config("lora.rank=16"), 7 * 10**9, [H100]).status == "ok"
    alone = ["lora.rank=16", "rollout.engine=sglang", "rollout.dtype=bfloat16"]
    assert preflight.check_gpu_memory(config(*alone), 30 * 10**9, [H100]).status == "FAIL", "of the learner"
    assert preflight.check_gpu_memory(config(*alone, "learner.num_gpus=4"), 30 * 10**9, [H100]).status == "ok"
    alone += ["learner.num_gpus=4", "lora.sync=adapter"]
    assert preflight.check_gpu_memory(config(*alone), 30 * 10**9, [H100]).status == "FAIL", "the base is kept"
    low, high = (f"rollout.gpu_memory_utilization={share}" for share in (0.3, 0.9))
    assert preflight.check_gpu_memory(config(*shared, low), 10**9, [H100]).status == "ok"
    assert preflight.check_gpu_memory(config(*shared, high), 10**9, [H100]).status == "FAIL"


def test_disk_counts_the_checkpoints():
    assert preflight.check_disk(config(), 10**9, 100.0).status == "ok"
    assert preflight.check_disk(config(), 10**9, 20.0).status == "FAIL"
    assert preflight.check_disk(config("lora.rank=16"), 10**9, 20.0).status == "ok"
    assert preflight.check_disk(config("checkpoint.keep=20"), 10**9, 100.0).status == "FAIL"


def test_ports():
    assert preflight.check_ports(8, lambda wanted: wanted).status == "ok"
    assert preflight.check_ports(8, lambda _: 3).status == "FAIL"
    assert machine.bind_loopback(3) == 3


@pytest.mark.parametrize(
    ("words", "limit", "status"),
    [
        (["runtime=local", "rollout.num_actors=2"], 1024, "ok"),
        (["runtime=local", "rollout.num_actors=64"], 1024, "FAIL"),
        (["runtime=local", "rollout.num_actors=64"], 4096, "ok"),
        (["rollout.num_actors=64"], 1024, "ok"),
    ],
)
def test_open_files(words, limit, status):
    assert preflight.check_open_files(config(*words), limit).status == status


def test_a_port_for_metrics_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"metrics.prometheus_port={taken.getsockname()[1]}"
        assert row("metrics port", config(port), tmp_path).status == "FAIL"
    assert row("metrics port", config(port), tmp_path).status == "ok"


def test_model_and_environment(tmp_path):
    look = Look(config(), tmp_path, str(tmp_path))
    assert look.parameters == pytest.approx(400_000, rel=0.05)
    assert "0.4 M parameters, 25 tokens" in row("model", config(), tmp_path).finding
    assert "first prompt of 5 tokens" in row("environment", config(), tmp_path).finding
    wrong = row("environment", config("env.path=asyncrl.envs.digits:Nothing"), tmp_path)
    assert (wrong.status, wrong.remedy) == ("FAIL", "write 'package.module:Name'")


def test_adapters_that_match_no_layer(tmp_path):
    targets = 'lora.targets=["q_proj", "v_proj"]'
    assert row("adapters", config("lora.rank=4", targets), tmp_path).finding == "rank 4, q_proj, v_proj"
    check = row("adapters", config("lora.rank=4", 'lora.targets=["query"]'), tmp_path)
    assert (check.status, check.remedy) == ("FAIL", 'set lora.targets="all-linear", or name linear layers')


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_cache_of_an_embedded_engine(tmp_path, dtype, size):
    """Keys and values of 2 layers with 2 heads of 32 numbers, for 500 requests of 27 tokens, in whole 16s."""
    wanted = config("rollout.max_running=500", "rollout.max_new_tokens=20", f"rollout.dtype={dtype}")
    assert Look(wanted, tmp_path, str(tmp_path)).cache_gb == 2 * 2 * 500 * 2 * 32 * 32 * size / 1e9
    assert row("kv cache", wanted, tmp_path).finding.endswith("MB in each engine, for 500 requests of 27 tokens")
    few = ["rollout.group_size=2", "learner.groups_per_step=3", "eval.num_prompts=5"]
    least = row("kv cache", config("rollout.max_running=500", *few), tmp_path)
    assert "for 17 requests" in least.finding, "as many as can be in flight: 2 batches of 3 groups, and 5 of evaluation"


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "linear", "factor": 2.0}, 8192),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}, 4096),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, 8192),
    ],
)
def test_positions_of_a_model(rope, most):
    assert longest_context(SimpleNamespace(max_position_embeddings=4096, rope_parameters=rope)) == most
    assert longest_context(SimpleNamespace(text_config=SimpleNamespace())) is None


def test_the_cache_finds_prompts_that_are_too_long_for_the_model(tmp_path):
    windowed = tmp_path / "windowed"
    build_tiny(windowed, seed=0)
    settings = json.loads((windowed / "config.json").read_text())
    settings |= {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}
    (windowed / "config.json").write_text(json.dumps(settings))
    check = row("kv cache", config(f"model.path={windowed}"), tmp_path)
    assert (check.status, "window of 8" in check.finding) == ("FAIL", True)
    assert check.remedy.startswith("lower the environment's max_prompt_tokens plus rollout.max_new_tokens to 8")


def test_memory_counts_the_caches():
    one = ["rollout.num_actors=1"]
    assert preflight.check_host_memory(config(*one), False, 400_000, 15.0, cache_gb=15.0).status == "FAIL"
    assert preflight.check_host_memory(config(*one), True, 400_000, 16.0, cache_gb=15.0).status == "ok", "on the GPU"
    full = preflight.check_gpu_memory(config(*one), 10**9, [H100], cache_gb=90.0)
    assert (full.status, "rollout.max_running" in full.remedy) == ("FAIL", True)


def test_settings_that_do_nothing():
    assert preflight.check_settings(config()).status == "ok"
    check = preflight.check_settings(config("lora.alpha=8", "learner.learning_rate=0"))
    assert (check.status, check.finding.count("\n")) == ("warn", 1)


@pytest.mark.parametrize(
    ("words", "cores", "status"),
    [
        (["rollout.num_actors=3"], 4, "ok"),
        (["rollout.num_actors=3"], 3, "warn"),
        (["rollout.num_actors=2", "eval.num_actors=2"], 4, "warn"),
        (["rollout.num_threads=4"], 8, "warn"),
        (["learner.num_gpus=2", "learner.num_threads=2"], 5, "warn"),
        (["rollout.num_actors=3", "runtime=local"], 1, "ok"),
        (["rollout.num_threads=1", "learner.num_threads=1"], 5, "ok"),
        (["rollout.num_threads=1", "learner.num_threads=1"], 6, "warn"),
        (["rollout.num_threads=1"], 64, "ok"),
    ],
)
def test_threads(words, cores, status):
    assert preflight.check_threads(config(*words), cores).status == status


def test_idle_cores_do_not_matter_where_a_gpu_computes():
    few = config("rollout.num_threads=1", "learner.num_threads=1")
    assert preflight.check_threads(few, 64, on_gpu=True).status == "ok"
    assert "61 of them idle" in preflight.check_threads(few, 64).finding


@pytest.mark.parametrize(
    ("found", "status", "word"),
    [
        ((None, "", True), "FAIL", "-m pip install 'wandb'"),
        (("0.20", "", False), "warn", "WANDB_MODE=offline"),
        (("0.20", "", True), "ok", ""),
        (("0.20", "offline", False), "ok", ""),
    ],
)
def test_wandb(found, status, word):
    check = preflight.check_wandb("project", *found)
    assert (check.status, word in check.remedy) == (status, True)


def test_a_key_for_wandb_is_in_the_environment_or_in_a_netrc_file(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not machine.has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password made-up\n")
    assert machine.has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    assert not machine.has_wandb_key(), "of another server"
    monkeypatch.setenv("WANDB_API_KEY", "made-up")
    assert machine.has_wandb_key()


def test_a_cluster_is_reached_or_not(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ValueError, match="no Ray was started on this machine"):
        machine.reach("auto")
    with pytest.raises(ValueError, match="has no host and port: write HOST:6379"):
        machine.reach("somewhere")
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        assert machine.reach(address) == f"{address} answers"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert machine.reach("auto") == f"{address} answers"
    with pytest.raises(ConnectionRefusedError):
        machine.reach(address)


@pytest.mark.parametrize(
    ("address", "has_token", "modes"),
    [
        ("head:6379", True, (None, "token")),
        ("head:6379", True, ("disabled", "disabled")),
        ("head:6379", False, (None, None)),
        (None, True, (None, None)),
    ],
)
def test_a_cluster_is_shown_the_token_that_there_is_unless_the_user_says_otherwise(
    monkeypatch, tmp_path, address, has_token, modes
):
    if has_token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("made-up")
    before, after = modes
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)} | ({"RAY_AUTH_MODE": before} if before else {}))
    machine.show_token(address)
    assert os.environ.get("RAY_AUTH_MODE") == after


def test_a_cluster_is_joined_or_the_reason_is_told(monkeypatch):
    """By what the process that tries it prints, so without Ray."""
    monkeypatch.setattr(machine, "_JOIN", 'print("a warning"); print("TOTALS", \'{"CPU": 2.0}\')')
    assert machine.join("head:6379") == {"CPU": 2.0}
    endless = 'import time; print("Unauthenticated: InvalidAuthToken", flush=True); time.sleep(60)'
    monkeypatch.setattr(machine, "_JOIN", endless)
    with pytest.raises(ValueError, match=r"head:6379 asks for a token, .* ~/.ray/auth_token"):
        machine.join("head:6379")
    monkeypatch.setattr(machine, "_JOIN", "raise RuntimeError('Version mismatch')")
    with pytest.raises(ValueError, match=r"cannot be joined \(RuntimeError: Version mismatch\)"):
        machine.join("head:6379")
    monkeypatch.setattr(machine, "_JOIN", 'import time; print("waiting", flush=True); time.sleep(60)')
    with pytest.raises(ValueError, match=r"cannot be joined \(waiting\)"):
        machine.join("head:6379", timeout_s=2)


def nobody(*_):
    raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


def no_token(address):
    raise ValueError(f"the Ray cluster at {address} asks for a token, and none is here: copy ~/.ray/auth_token")


DRIVER = {"find_driver": lambda: "580.1", "cuda_build": lambda: "13.0"}
JOINED = ["cluster.address=head:6379"]


@pytest.mark.parametrize(
    "case",
    [
        ("packages", [], {"installed": lambda _: None}, "torch not installed"),
        ("open files", ["rollout.num_actors=64", "runtime=local"], {"open_files_limit": lambda: 1024}, "1,024 allowed"),
        ("ports", [], {"bind_loopback": lambda _: 3}, "3 of 12 ports"),
        ("wandb", ["metrics.wandb=project"], {}, "the package is not installed"),
        ("cluster", JOINED, {"reach": nobody}, "Connection refused"),
        ("placement", JOINED, {"reach": str, "join": no_token}, "asks for a token"),
        ("placement", [*JOINED, "device=cuda"], {"reach": str, "join": lambda _: {"CPU": 8.0}}, "needs 3 GPUs"),
        (
            "placement",
            [*JOINED, "cluster.learner_resources={big=1}"],
            {"reach": str, "join": lambda _: {"CPU": 8.0}},
            "the Ray resource 'big'",
        ),
        ("placement", ["cluster.learner_resources={big=1}"], {}, "the Ray resource 'big'"),
        ("gpus", ["device=cuda"], {"find_gpus": list}, "made for GPUs"),
        ("gpus", SGLANG, {"find_gpus": list}, "made for GPUs"),
        (
            "placement",
            ["device=cuda"],
            {"find_gpus": lambda: [H100] * 2, **DRIVER},
            "needs 3 GPUs",
        ),
        ("sglang", SGLANG, {"find_gpus": lambda: [H100] * 3, **DRIVER}, "package sglang"),
        ("learner attention", ["device=cpu", "learner.attention=varlen"], {}, "needs a GPU"),
        ("own loss", ["device=cpu", "algorithm.loss.advantage=test_doctor:raising"], {}, "tried on made-up numbers"),
        ("own loss", ["algorithm.loss.advantage=test_doctor:nowhere"], {}, "no function 'nowhere'"),
        ("model", ["model.path=models/none"], {}, "there is no folder 'models/none'"),
        ("environment", ["env.path=asyncrl.envs.digits:Nothing"], {}, "no 'Nothing'"),
        ("adapters", ["lora.rank=4", 'lora.targets=["nowhere"]'], {}, "does not fit Qwen2ForCausalLM"),
        ("context", ["rollout.max_new_tokens=4090"], {}, "positions for 4096"),
        ("host memory", [], {"available_gb": lambda: 0.1}, "0.1 GB free"),
        ("disk", ["checkpoint.keep=1000000000"], {}, "GB needed"),
    ],
)
def test_the_doctor_and_a_run_refuse_the_same_and_a_run_has_nothing_yet(monkeypatch, tmp_path, case):
    name, words, facts, message = case
    for fact, found in facts.items():
        monkeypatch.setattr(machine, fact, found)
    wanted = config(f"run_dir={tmp_path / 'runs'}", *words)
    failed = next(row for row in doctor.examine(wanted, tmp_path / "runs", False) if row.status == "FAIL")
    assert failed.name == name
    assert message in failed.finding
    assert failed.remedy
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        job.load_task(wanted, quiet=True)
    assert failed.remedy in " ".join(str(told.value).split())
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_does_not_use_has_no_row(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "reach", str)
    monkeypatch.setattr(machine, "join", lambda _: {})
    rows = {check.name for check in doctor.examine(config(), tmp_path, False)}
    assert rows >= {"settings", "kv cache", "threads"}
    assert rows.isdisjoint({"own loss", "adapters", "wandb", "cluster", "learner attention"})
    words = ["lora.rank=4", "metrics.wandb=project", *JOINED, "algorithm.loss.advantage=nowhere:no"]
    words.append("learner.attention=varlen")
    rows |= (more := {check.name for check in doctor.examine(config(*words), tmp_path, False)})
    assert more >= {"own loss", "adapters", "wandb", "cluster", "learner attention"}
    assert more.isdisjoint({"threads", "host memory", "peft"}), "of other machines"


def test_the_number_of_rollout_actors_as_launch_run_takes_it(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "examine", lambda config, *_: seen.append(config) or [])
    assert doctor.main(["--num-rollout-actors", "5"]) == 0
    assert seen[0].rollout.num_actors == 5
    assert doctor.main(["--num-rollout-actors", "5", "rollout.num_actors=4"]) == 2


def test_a_run_to_resume_is_looked_at_with_the_words_of_launch_run(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(configuration.to_tree(config("rollout.num_actors=5"))))
    seen = []
    monkeypatch.setattr(doctor, "examine", lambda config, *_: seen.append(config) or [])
    resume = ["--resume", str(tmp_path), "--watch", "--dry-run"]
    assert doctor.main([*resume, "num_steps=7"]) == 0
    assert (seen[0].rollout.num_actors, seen[0].num_steps) == (5, 7)
    assert doctor.main([*resume, "model.num_layers=3"]) == 2
    assert "the checkpoints of" in capsys.readouterr().err
    assert doctor.main(["--resume", str(tmp_path / "nowhere")]) == 2


def test_an_error_keeps_its_own_remedy():
    check = preflight.attempt("a", "other", raising(ValueError("the rule, 3: do this")))
    assert (check.finding, check.remedy) == ("the rule, 3", "do this")
    check = preflight.attempt("a", "other", raising(OSError("disk: gone")))
    assert (check.finding, check.remedy) == ("OSError: disk: gone", "other")


def test_the_run_folder(tmp_path, monkeypatch):
    machine.write(tmp_path / "new" / "runs")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert row("run folder", config(f"run_dir={tmp_path / 'file'}"), tmp_path).status == "FAIL"
    monkeypatch.setattr(fcntl, "flock", raising(OSError(errno.ENOSYS, "Function not implemented")))
    check = row("run folder", config(f"run_dir={tmp_path}"), tmp_path)
    assert (check.status, "cannot be locked" in check.finding) == ("FAIL", True)
    assert check.remedy.startswith("mount its file system with locks")


def test_exit_codes(capsys, monkeypatch):
    for status, code in (("ok", 0), ("warn", 0), ("FAIL", 1)):
        monkeypatch.setattr(doctor, "examine", lambda *_, status=status: [preflight.Check("one", status, "found")])
        assert doctor.main([]) == code
    assert doctor.main(["rollout.group_sice=3"]) == 2
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--num_steps=10", "--rollout.seed", "1"])
    assert capsys.readouterr().err.endswith(": a setting is written without dashes, num_steps=10\n")


def test_a_python_without_the_package_is_told_in_a_line():
    bare = [sys.executable, "-I", "-S", SCRIPT]
    done = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No module named 'asyncrl' for" in done.stderr
    assert "run `make .venv/installed`" in done.stderr


def test_the_script_runs_here(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == (0 if done.stdout.endswith(", 0 FAIL\n") else 1)
    assert "first prompt" in done.stdout, done.stdout + done.stderr
