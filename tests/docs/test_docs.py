"""Every command of the documents is run here, with fewer and smaller steps, or says what it needs beyond a CPU.

Commands in blocks are run. Commands within sentences are those of measurements, which have their hardware beside them:
of these the script, the flags and the settings have to exist.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import datasets
import pytest

from asyncrl.cli import doctor, evaluate, prepare_gsm8k, replay, report, scale, watch
from asyncrl.cli import train as run
from asyncrl.config import loading as configuration
from asyncrl.recovery.journal import Journal

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = re.compile(
    r"# needs (one GPU|two GPUs|four GPUs|several nodes|two nodes with GPUs|an NVIDIA GPU|pip install |the two above)"
)
SMALL = [
    "runtime=local",
    "num_steps=2",
    "rollout.group_size=2",
    "rollout.max_new_tokens=2",
    "learner.groups_per_step=2",
]
SMALL += ["eval.num_prompts=4", "checkpoint.every=1"]
ONLY_PARSED = {
    "python bench/staleness/ablation.py --full --out runs/staleness-full": "the page says that it has not been run"
}


def blocks(page):
    """Its blocks of commands, a command a line."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
        yield from (line for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines() if line.strip())


def inline(page):
    """Commands in its sentences, on one line each."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    yield from (
        span for span in spans if re.match(r"(time )?(python )?(launch|bench)/\w+(/\w+)?\.py|python -m pytest", span)
    )


def words_of(command):
    return shlex.split(command, comments=True)


LINES = sorted({line for page in PAGES for line in blocks(page)})
UNMARKED = [line for line in LINES if not NEEDS.search(line) and " ".join(words_of(line)) not in ONLY_PARSED]
MARKED = [line for line in LINES if line not in UNMARKED]
SENTENCES = sorted({command for page in PAGES for command in inline(page)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps that any command may be given as RUN_DIR."""
    folder = tmp_path_factory.mktemp("runs")
    assert run.main([*SMALL, "journal.keep_groups=true", f"run_dir={folder}"]) == 0
    (found,) = folder.glob("2*")
    return found


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def problems(source):
    """A folder of problems, laid out as GSM8K is."""
    source.mkdir()
    for split, count in (("train", 12), ("test", 4)):
        rows = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(count)]
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(source)


@pytest.mark.parametrize("command", UNMARKED)
def test_a_command_runs(command, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    first, *words = words_of(command)
    if first == "make":
        assert words in (["run"], ["test"]), "CI runs `make test`; which job `make run` starts is looked at"
        recipe = subprocess.run(["make", "--dry-run", *words], capture_output=True, text=True, check=True).stdout
        assert {"run": "python launch/run.py\n", "test": "-m pytest"}[words[0]] in recipe.replace(" \n", "\n")
        return
    assert first in ("python", ".venv/bin/python")
    script, *words = (word.replace("RUN_DIR", str(folder)) for word in words)
    name = Path(script).stem
    if any(word.startswith("[") for word in words):  # a synopsis: what it offers is what there is
        assert_known(script, words, monkeypatch, capsys)
        return
    if name == "run":
        more = ["num_steps=3"] if "--resume" in words else []
        more += ["warmup.num_steps=1"] if "configs/sort_digits.toml" in words else []
        assert run.main([*words, *SMALL, *more, f"run_dir={tmp_path / 'new'}"]) == 0
    elif name == "report":
        trace = tmp_path / "trace.json"
        words = [{"40:60": "1:2", "trace.json": str(trace)}.get(word, word) for word in words]
        assert report.main(words) == 0
        assert trace.exists() == ("--trace" in words)
    elif name == "replay":
        changed = len(words) > 1
        assert replay.main(words) == int(changed), "other settings give other weights, the same give the same"
    elif name == "evaluate":
        assert evaluate.main(["eval.num_prompts=4" if "heldout" in word else word for word in words]) == 0
    elif name == "prepare_gsm8k":
        words = [
            "--source",
            problems(tmp_path / "source"),
            "--num-validation",
            "3",
            "--folder",
            str(tmp_path / "gsm8k"),
        ]
        assert prepare_gsm8k.main(words) == 0
    elif name == "scale":
        with closing(Journal(folder / "journal.bin")):  # as a run in progress holds it
            assert scale.main(words) == 0
    else:
        assert {"watch": watch, "doctor": doctor}[name].main(words) in ((0, 1) if name == "doctor" else (0,))
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [*MARKED, *SENTENCES])
def test_a_command_that_is_not_run_could_be(command, monkeypatch, capsys):
    """Its script is there, and knows the flags and the settings."""
    monkeypatch.chdir(ROOT)
    words = words_of(command)
    if words[0] in ("pip", "ray", "export") or "pytest" in words:
        return
    script, *words = words[next(number for number, word in enumerate(words) if word.endswith(".py")) :]
    assert_known(script, words, monkeypatch, capsys)
    if script == "launch/run.py" and "--resume" not in words:
        run.resolve(run.parse([word for word in words if word != "--watch"]))


def assert_known(script, words, monkeypatch, capsys):
    """The script starts, and its help has these flags."""
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    told = capsys.readouterr().out
    asked = {flag for word in words for flag in re.findall(r"^\[?(--[a-z0-9-]+)", word)}
    assert asked <= set(re.findall(r"--[a-z0-9-]+", told))


def test_the_bench_of_the_timeline_runs(finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench/timeline.py", str(finished), "--repeats", "2"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "bench" / "timeline.py"), run_name="__main__")
    assert "2 steps, " in capsys.readouterr().out


def test_sampled_trajectories_open_as_the_guide_says(finished, tmp_path):
    page = (ROOT / "docs" / "guide.md").read_text().replace("RUN_DIR", str(finished))
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "read_parquet" in block)
    names = {}
    exec(block, names)
    (other,) = re.findall(r"# or: (.*)", block)
    loaded = eval(other[:-1] + f", cache_dir={str(tmp_path)!r})", {"datasets": datasets})["train"]
    assert len(names["table"]) == len(loaded) == 2 * 2
    assert list(names["table"].columns) == loaded.column_names
    told = page.partition("Columns: ")[2].partition("\n\n")[0]
    assert set(loaded.column_names) == set(re.findall(r"`(\w+)`", told))


def test_there_are_commands():
    assert len(UNMARKED) > 15
    assert len(MARKED) > 5
    assert len(SENTENCES) > 20
    assert {command for command in ONLY_PARSED if command not in LINES} == set()
    assert configuration.load(None, SMALL).num_steps == 2


def test_the_job_of_the_guide_goes_on_with_the_newest_run_while_it_ends_with_75(tmp_path):
    guide = (ROOT / "docs" / "guide.md").read_text()
    (job,) = re.findall(r"```bash\n(.*?)```", guide, re.S)
    (tmp_path / "job.sh").write_text(job)
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/sh\necho "$@" >> told\nnumber=$(wc -l < told)\nmkdir -p runs/night/cache "runs/night/2026-$number"\n'
        '[ "$number" -eq 3 ] || exit 75\n'
    )
    stand_in.chmod(0o700)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    again = re.search(r"`(while bash job\.sh.*?)`", guide)[1]
    subprocess.run(["bash", "-c", again], cwd=tmp_path, env=environment, check=True, timeout=60)
    first, *others = (tmp_path / "told").read_text().splitlines()
    assert others == [f"launch/run.py --resume runs/night/2026-{number}" for number in (1, 2)]
    run.resolve(run.parse(first.split()[1:]))


def test_an_interrupt_at_the_start_is_one_line(monkeypatch, capsys):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("asyncrl.driver.run.train", interrupted)
    assert run.main(["runtime=local"]) == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


def test_a_mistake_that_an_actor_finds_is_told_without_its_stack(monkeypatch, capsys):
    class Brought(ValueError):
        cause = ValueError("lora.targets names nothing")

    def failing(*_arguments, **_options):
        raise Brought("ray::LearnerActor.start() and twenty lines")

    monkeypatch.setattr("asyncrl.driver.run.train", failing)
    assert run.main(["runtime=local"]) == 2
    assert capsys.readouterr().err == "error: lora.targets names nothing\n"
