"""The guide: its knobs and links exist, and its environment, loss and advantages run."""

import re
from pathlib import Path

import helpers
from helpers import run as run_coroutine

from asyncrl.config import loading as configuration
from asyncrl.config.schema import Config
from asyncrl.driver import run as job
from asyncrl.monitor import metrics
from asyncrl.monitor.sinks import flat

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()


def test_knobs_exist():
    # The table of other projects' names has ours in its first column only.
    table = GUIDE.partition("| here |")[2]
    first = [line.split("|")[1] for line in table.splitlines() if line.count("|") > 3]
    ours = GUIDE.replace(table, "") + "\n".join(first)
    sections = set(Config.__struct_fields__)
    named = {name for name in re.findall(r"`([a-z_]+\.[a-z_]+)[`=]", ours) if name.partition(".")[0] in sections}
    knobs = set(flat(configuration.to_tree(Config())))
    assert len(named) > 25
    assert {name for name in named if name not in knobs and not name.endswith((".md", ".path"))} == set()


def test_metrics_exist():
    areas = {name.partition("/")[0] for name in metrics.METRICS}
    named = {name for name in re.findall(r"`([a-z]+/[a-z0-9_]+)`", GUIDE) if name.partition("/")[0] in areas}
    assert len(named) > 8
    assert named <= set(metrics.METRICS)


def test_links_lead_somewhere():
    headings = [line[3:].lower() for line in GUIDE.splitlines() if line.startswith("## ")]
    anchors = {"#" + re.sub(r"[^a-z0-9 -]", "", heading).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        if target.startswith("#"):
            assert target in anchors
        elif not target.startswith("http"):
            assert (ROOT / "docs" / target).exists(), target


def test_the_data_set_of_the_guide_runs(tmp_path, monkeypatch):
    section = GUIDE.partition("## Use your own data")[2]
    monkeypatch.chdir(tmp_path)
    rows, score = re.findall(r"```python\n(.*?)```", section, re.S)[:2]
    exec(rows, {})
    shown = re.search(r"```json\n(.*?)```", section, re.S)[1].splitlines()
    assert set(shown) < set(Path("data/sums.jsonl").read_text().splitlines())
    names = {}
    exec(score, names)
    monkeypatch.setattr(helpers, "right", names["right"], raising=False)
    command = re.search(r"```sh\n(.*?)```", section, re.S)[1].replace("\\\n", "").split()
    words = [word.replace("my_package.rewards", "helpers") for word in command if "=" in word]
    words += ["runtime=local", "num_steps=1", "learner.groups_per_step=2", "rollout.group_size=2", "eval.num_prompts=2"]
    assert run_coroutine(job.train(configuration.load(None, words), quiet=True)).version == 1


def test_a_run_from_python_is_as_the_guide_shows_it(tmp_path, monkeypatch, capsys):
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.S) if "job.train" in block]
    monkeypatch.chdir(ROOT)
    small = ["rollout.group_size=2", "learner.groups_per_step=2", "eval.num_prompts=2", f"run_dir={tmp_path}"]
    exec(source.replace('"runtime=local"', f'"runtime=local", *{small}'), {})
    assert str(tmp_path) in capsys.readouterr().out.splitlines()[-1]


def test_the_environment_and_the_loss_of_the_guide_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    for name in ("class LastDigit", "def capped", "def only_better"):
        (source,) = [block for block in blocks if name in block]
        names = {}
        exec(source, names)
        monkeypatch.setattr(helpers, name.split()[1], names[name.split()[1]], raising=False)
    words = ["runtime=local", "env.path=helpers:LastDigit", "num_steps=2", "rollout.group_size=4"]
    words += ["algorithm.preset=helpers:capped", "algorithm.loss.advantage=helpers:only_better"]
    words += ["learner.groups_per_step=2", "rollout.max_new_tokens=2", "eval.num_prompts=4"]
    words += ["metrics.timeline=false", f"run_dir={tmp_path}"]
    result = run_coroutine(job.train(configuration.load(None, words), quiet=True))
    assert result.version == 2
    assert list(result.baselines) == ["always 7"]
    assert not (result.folder / "timeline.jsonl").exists()
