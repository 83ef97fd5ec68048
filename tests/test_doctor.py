"""The preflight: each check passes and fails for its own reason, without the hardware that it is about."""

import errno
import fcntl
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl import config as configuration
from asyncrl.engine.sglang_launch import SUPPORTED_VERSION
from asyncrl.runtime import preflight

SCRIPT = Path(__file__).parent.parent / "launch" / "doctor.py"
_spec = importlib.util.spec_from_file_location("doctor", SCRIPT)
doctor = sys.modules["doctor"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(doctor)

H100 = doctor.Gpu("H100", (9, 0), 80.0, 85.0)
T4 = doctor.Gpu("T4", (7, 5), 15.0, 16.0)


def config(*words):
    return configuration.load(None, list(words))


def raising(error):
    def action(*_):
        raise error

    return action


@pytest.mark.parametrize(("version", "status"), [("3.10.9", "FAIL"), ("3.11.0", "ok"), ("3.13.1", "ok")])
def test_python(version, status):
    assert doctor.check_python(version, ">=3.11").status == status


@pytest.mark.parametrize(
    ("found", "status"), [(None, "FAIL"), ("2.10.1", "FAIL"), ("2.11.0", "ok"), ("2.13.0+cpu", "ok")]
)
def test_package(found, status):
    check = doctor.check_package("torch>=2.11", {"torch": found}.get)
    assert (check.name, check.status) == ("torch", status)
    assert bool(check.remedy) == (status == "FAIL")


def test_the_sglang_that_the_engine_takes_is_the_one_that_is_installed_and_tested():
    pinned = f"sglang=={SUPPORTED_VERSION}"
    assert f'"{pinned}"' in (doctor.ROOT / "pyproject.toml").read_text()
    assert pinned in (doctor.ROOT / "tests" / "sglang" / "requirements-no-deps.txt").read_text().splitlines()
    assert doctor.check_package(pinned, {"sglang": "0.5.18"}.get).status == "FAIL"


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
    check = doctor.check_cuda(*found)
    assert check.status == status
    assert remedy in check.remedy


def test_the_transformers_that_sglang_was_made_for():
    needs = ["torch==2.11", "sentence_transformers; extra == 'test'", "transformers==5.12.1"]
    check = doctor.check_transformers(needs, "5.23.0")
    assert (check.status, "made for ==5.12.1" in check.finding) == ("warn", True)
    assert check.remedy.endswith(" -m pip install 'transformers==5.12.1'")
    assert {doctor.check_transformers(*facts).status for facts in [(needs, "5.12.1"), ([], "5.23.0")]} == {"ok"}


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
    assert doctor.check_gpus(config(*words), gpus).status == status


def test_without_a_gpu_that_comes_first_and_sglang_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: ([], None))
    first, *rest = doctor.examine(config(*SGLANG), False)
    assert (first.name, first.status, "configs/quickstart_cpu.toml" in first.remedy) == ("gpus", "FAIL", True)
    assert {"sglang", "flashinfer-python", "attention backend"}.isdisjoint(check.name for check in rest)


@pytest.mark.parametrize(("capability", "word"), [((9, 0), "for 9.0"), (None, "torch_native on the CPU")])
def test_attention(monkeypatch, capability, word):
    from asyncrl.engine import sglang_launch

    monkeypatch.setattr(sglang_launch, "available_attention_backends", lambda: {"triton", "torch_native"})
    gpus = [H100] if capability else []
    assert word in doctor.attention(config(), gpus)
    with pytest.raises(ValueError, match="attention_backend 'flashinfer'"):
        doctor.attention(config("rollout.attention_backend=flashinfer"), gpus)


def test_placement():
    words = ["device=cuda", "rollout.num_actors=2"]
    assert doctor.check_placement(config(*words), 3).status == "ok"
    few = doctor.check_placement(config(*words), 1)
    assert (few.status, "needs 3 GPUs" in few.finding, "lower" in few.remedy) == ("FAIL", True, True)
    assert doctor.check_placement(config(*words, "cluster.address=auto"), 1).status == "warn"


@pytest.mark.parametrize(("have", "status"), [(20.0, "ok"), (11.0, "warn"), (9.0, "FAIL")])
def test_compare(have, status):
    assert preflight.compare("disk", 10.0, have, "free some").status == status


def test_host_memory_grows_with_the_model_on_a_cpu_only():
    assert doctor.check_host_memory(config(), False, 400_000, 16.0).status == "ok"
    assert doctor.check_host_memory(config(), False, 10**9, 16.0).status == "FAIL"
    assert doctor.check_host_memory(config(), True, 10**9, 16.0).status == "ok"
    assert doctor.check_host_memory(config("learner.num_gpus=2"), True, 10**9, 16.0).status == "FAIL", "a checkpoint"
    assert doctor.check_host_memory(config(), False, 1, None).status == "warn"


def test_gpu_memory_counts_the_share_that_sglang_takes():
    shared = ["rollout.engine=sglang", "rollout.num_actors=1", "placement=colocated", "rollout.dtype=bfloat16"]
    assert doctor.check_gpu_memory(config(), 10**9, []).status == "ok"
    assert doctor.check_gpu_memory(config(), 10**9, [H100]).status == "ok"
    assert doctor.check_gpu_memory(config(), 10**9, [H100, T4]).status == "FAIL"
    assert doctor.check_gpu_memory(config(), 7 * 10**9, [H100]).status == "FAIL"
    assert doctor.check_gpu_memory(config("learner.num_gpus=4"), 7 * 10**9, [H100]).status == "ok"
    assert doctor.check_gpu_memory(config("lora.rank=16"), 7 * 10**9, [H100]).status == "ok"
    alone = ["lora.rank=16", "rollout.engine=sglang", "rollout.dtype=bfloat16"]
    assert doctor.check_gpu_memory(config(*alone), 30 * 10**9, [H100]).status == "FAIL", "of the learner"
    assert doctor.check_gpu_memory(config(*alone, "learner.num_gpus=4"), 30 * 10**9, [H100]).status == "ok"
    alone += ["learner.num_gpus=4", "lora.sync=adapter"]
    assert doctor.check_gpu_memory(config(*alone), 30 * 10**9, [H100]).status == "FAIL", "the base is kept"
    low, high = (f"rollout.gpu_memory_utilization={share}" for share in (0.3, 0.9))
    assert doctor.check_gpu_memory(config(*shared, low), 10**9, [H100]).status == "ok"
    assert doctor.check_gpu_memory(config(*shared, high), 10**9, [H100]).status == "FAIL"


def test_disk_counts_the_checkpoints():
    assert doctor.check_disk(config(), 10**9, 100.0).status == "ok"
    assert doctor.check_disk(config(), 10**9, 20.0).status == "FAIL"
    assert doctor.check_disk(config("lora.rank=16"), 10**9, 20.0).status == "ok"
    assert doctor.check_disk(config("checkpoint.keep=20"), 10**9, 100.0).status == "FAIL"


def test_ports():
    assert doctor.check_ports(8, lambda wanted: wanted).status == "ok"
    assert doctor.check_ports(8, lambda _: 3).status == "FAIL"
    assert doctor.bind_loopback(3) == 3


def test_a_port_for_metrics_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert doctor.attempt("metrics port", "another", lambda: doctor.listen("127.0.0.1", port)).status == "FAIL"
    assert doctor.attempt("metrics port", "another", lambda: doctor.listen("127.0.0.1", port)).status == "ok"


def test_model_environment_and_parameters(tmp_path):
    check, model = doctor.attempt_for("model", "", lambda: doctor.read_model(config(), tmp_path))
    assert check.status == "ok"
    folder, parameters, tokenizer = model
    assert folder == tmp_path
    assert parameters == pytest.approx(400_000, rel=0.05)
    told, longest = doctor.draw_prompt(config(), tokenizer)
    assert ("first prompt" in told, longest) == (True, 7)
    wrong = config("env.path=asyncrl.envs.digits:Nothing")
    check, longest = doctor.attempt_for("environment", "", lambda: doctor.draw_prompt(wrong, tokenizer))
    assert (check.status, check.remedy, longest) == ("FAIL", "write 'package.module:Name'", None)


def test_a_missing_model_fails(tmp_path):
    missing = config(f"model.path={tmp_path / 'none'}")
    check, model = doctor.attempt_for("model", "", lambda: doctor.read_model(missing, tmp_path))
    assert (check.status, model) == ("FAIL", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    doctor.read_model(config(), path)
    return path


def test_adapters_that_match_no_layer(folder):
    targets = 'lora.targets=["q_proj", "v_proj"]'
    assert doctor.try_targets(config("lora.rank=4", targets), folder) == "rank 4, q_proj, v_proj"
    wrong = config("lora.rank=4", 'lora.targets=["query"]')
    check = doctor.attempt("adapters", "", lambda: doctor.try_targets(wrong, folder))
    assert (check.status, check.remedy) == ("FAIL", 'set lora.targets="all-linear", or name linear layers')


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_cache_of_an_embedded_engine(folder, dtype, size):
    """Keys and values of 2 layers with 2 heads of 32 numbers, for 1,000 requests of 30 tokens, in whole 16s."""
    words = ["rollout.max_running=1000", "rollout.max_new_tokens=20", f"rollout.dtype={dtype}"]
    told, num_bytes = doctor.size_cache(config(*words), folder, 10)
    assert num_bytes == 2 * 2 * 1000 * 2 * 32 * 32 * size
    assert told.endswith("MB in each engine, for 1000 requests of 30 tokens")


def test_the_cache_finds_prompts_that_are_too_long_for_the_model(folder, tmp_path):
    windowed = shutil.copytree(folder, tmp_path / "windowed")
    settings = json.loads((windowed / "config.json").read_text())
    settings |= {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}
    (windowed / "config.json").write_text(json.dumps(settings))
    check, _ = doctor.attempt_for("kv cache", "", lambda: doctor.size_cache(config(), windowed, 7))
    assert (check.status, "window of 8" in check.finding) == ("FAIL", True)
    assert check.remedy.startswith("lower the environment's max_prompt_tokens plus rollout.max_new_tokens to 8")


def test_memory_counts_the_caches():
    one = ["rollout.num_actors=1"]
    few = [*one, "learner.groups_per_step=1", "rollout.group_size=2", "eval.max_running=6", "rollout.max_running=100"]
    assert doctor.check_host_memory(config(*one), False, 400_000, 16.0, cache_gb=15.0).status == "FAIL"
    assert doctor.check_host_memory(config(*few), False, 400_000, 16.0, cache_gb=10.0).status == "ok", "a tenth of it"
    assert doctor.check_host_memory(config(*few), False, 400_000, 16.0, cache_gb=17.0).status == "FAIL", "in one piece"
    assert doctor.check_host_memory(config(*one), True, 400_000, 16.0, cache_gb=15.0).status == "ok", "on the GPU"
    full = doctor.check_gpu_memory(config(*one), 10**9, [H100], cache_gb=90.0)
    assert (full.status, "rollout.max_running" in full.remedy) == ("FAIL", True)


def test_settings_that_do_nothing():
    assert doctor.check_settings(config()).status == "ok"
    check = doctor.check_settings(config("lora.alpha=8", "learner.learning_rate=0"))
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
    ],
)
def test_threads(words, cores, status):
    assert doctor.check_threads(config(*words), cores).status == status


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
    check = doctor.check_wandb("project", *found)
    assert (check.status, word in check.remedy) == (status, True)


def test_a_key_for_wandb_is_in_the_environment_or_in_a_netrc_file(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not doctor.has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password made-up\n")
    assert doctor.has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    assert not doctor.has_wandb_key(), "of another server"
    monkeypatch.setenv("WANDB_API_KEY", "made-up")
    assert doctor.has_wandb_key()


def test_a_cluster_is_reached_or_not(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ValueError, match="no Ray was started on this machine"):
        doctor.reach("auto")
    with pytest.raises(ValueError, match="has no host and port: write HOST:6379"):
        doctor.reach("somewhere")
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        assert doctor.reach(address) == f"{address} answers"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert doctor.reach("auto") == f"{address} answers"
    with pytest.raises(ConnectionRefusedError):
        doctor.reach(address)


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
    doctor.show_token(address)
    assert os.environ.get("RAY_AUTH_MODE") == after


def test_an_own_loss_is_tried():
    own = config("algorithm.loss.advantage=test_doctor:raising", "device=cpu")
    check = doctor.attempt("own loss", "", lambda: doctor.try_loss(own))
    assert (check.status, "tried on made-up numbers" in check.finding) == ("FAIL", True)
    own = config("algorithm.loss.advantage=test_doctor:nowhere")
    check = doctor.attempt("own loss", "", lambda: doctor.try_loss(own))
    assert (check.status, "no function 'nowhere'" in check.finding) == ("FAIL", True)


def test_what_a_run_does_not_use_has_no_row(monkeypatch):
    monkeypatch.setattr(doctor, "check_package", lambda *_: doctor.Check("package", "ok", ""))
    rows = {check.name for check in doctor.examine(config(), False)}
    assert rows >= {"settings", "kv cache", "threads"}
    assert rows.isdisjoint({"own loss", "adapters", "wandb", "cluster", "learner attention"})
    words = ["lora.rank=4", "metrics.wandb=project", "cluster.address=auto", "algorithm.loss.advantage=nowhere:no"]
    words.append("learner.attention=varlen")
    rows |= (more := {check.name for check in doctor.examine(config(*words), False)})
    assert more >= {"own loss", "adapters", "wandb", "cluster", "learner attention"}
    assert "threads" not in more, "of other machines"


def test_attention_without_a_gpu_fails():
    config_of_gpus = config("device=cpu", "learner.attention=varlen")
    check = doctor.attempt("learner attention", "", lambda: doctor.try_attention(config_of_gpus))
    assert (check.status, check.remedy) == ("FAIL", "set learner.attention=auto")


def test_the_number_of_rollout_actors_as_launch_run_takes_it(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "examine", lambda config, _: seen.append(config) or [])
    assert doctor.main(["--num-rollout-actors", "5"]) == 0
    assert seen[0].rollout.num_actors == 5
    assert doctor.main(["--num-rollout-actors", "5", "rollout.num_actors=4"]) == 2


def test_a_run_to_resume_is_looked_at_with_the_words_of_launch_run(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(configuration.to_tree(config("rollout.num_actors=5"))))
    seen = []
    monkeypatch.setattr(doctor, "examine", lambda config, _: seen.append(config) or [])
    resume = ["--resume", str(tmp_path), "--watch", "--dry-run"]
    assert doctor.main([*resume, "num_steps=7"]) == 0
    assert (seen[0].rollout.num_actors, seen[0].num_steps) == (5, 7)
    assert doctor.main([*resume, "model.num_layers=3"]) == 2
    assert "the checkpoints of" in capsys.readouterr().err
    assert doctor.main(["--resume", str(tmp_path / "nowhere")]) == 2


def test_an_error_keeps_its_own_remedy():
    check = doctor.attempt("a", "other", raising(ValueError("the rule, 3: do this")))
    assert (check.finding, check.remedy) == ("the rule, 3", "do this")
    check = doctor.attempt("a", "other", raising(OSError("disk: gone")))
    assert (check.finding, check.remedy) == ("OSError: disk: gone", "other")


def test_the_run_folder(tmp_path, monkeypatch):
    doctor.write(tmp_path / "new" / "runs")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert doctor.attempt("run folder", "", lambda: doctor.write(tmp_path / "file")).status == "FAIL"
    monkeypatch.setattr(fcntl, "flock", raising(OSError(errno.ENOSYS, "Function not implemented")))
    check = doctor.attempt("run folder", "", lambda: doctor.write(tmp_path))
    assert (check.status, "cannot be locked" in check.finding) == ("FAIL", True)
    assert check.remedy.startswith("mount its file system with locks")


def test_exit_codes(capsys, monkeypatch):
    for status, code in (("ok", 0), ("warn", 0), ("FAIL", 1)):
        monkeypatch.setattr(doctor, "examine", lambda *_, status=status: [doctor.Check("one", status, "found")])
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
