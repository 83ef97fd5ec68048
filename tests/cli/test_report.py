"""A run, seen afterwards and from outside: the page, the terminal view, sampled trajectories and the other sinks."""

import json
import math
import re
import shutil
import subprocess
import sys
import types
import urllib.error
import urllib.request
from dataclasses import replace

import pandas
import pytest
from helpers import run, trajectory
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asyncrl.cli import report, watch
from asyncrl.config import loading as configuration
from asyncrl.driver import run as job
from asyncrl.monitor import metrics, samples, sinks, view
from asyncrl.monitor.sinks import Prometheus, WeightsAndBiases
from asyncrl.types import Group, Prompt

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--enable-logging=stderr", "--virtual-time-budget=3000", "--window-size=1320,2900"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 12 short steps that drops groups."""
    config = configuration.load(
        None,
        [
            *("runtime=local", "num_steps=12", "env.path=helpers:Sevens", "rollout.max_new_tokens=3"),
            *("rollout.group_size=4", "learner.groups_per_step=4", "eval.num_prompts=8", "eval.every=4"),
            *("algorithm.drop_zero_variance=true", "metrics.sample_trajectories=3"),
            f"run_dir={tmp_path_factory.mktemp('runs')}",
        ],
    )
    return run(job.train(config, quiet=True)).folder


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def check_trace(trace):
    """The rules of the Trace Event Format that a viewer relies on: fields, pairs, and slices that nest."""
    events = trace["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"learner", "weight sync", "buffer", "evaluation", "rollout 0", "rollout 1"} == set(lanes.values())
    slices, open_pairs = {}, set()
    for event in events:
        if event["ph"] == "M":
            continue
        assert lanes[event["tid"]] == event["cat"]
        assert event["ts"] >= 0
        key = event.get("cat"), event.get("id"), event["name"]
        if event["ph"] == "X":
            slices.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "b":
            assert key not in open_pairs
            open_pairs.add(key)
        elif event["ph"] == "e":
            open_pairs.remove(key)
        else:
            assert event["ph"] in "Ci"
    assert not open_pairs
    for spans in slices.values():
        ends = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or end <= ends[-1], "slices of one thread nest or are apart"
            ends.append(end)


def test_the_page_holds_the_run_and_needs_no_network(folder, tmp_path):
    out = tmp_path / "page.html"
    assert report.main([str(folder), "--out", str(out), "--trace", str(tmp_path / "trace.json")]) == 0
    page = out.read_text()
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", page.split('id="data"')[0])
    data = data_of(page)
    assert data["steps"]["version"] == list(range(1, 13))
    assert data["evals"]["version"] == [0, 4, 8, 12]
    assert data["timeline"]["lanes"] == ["learner", "weight sync", "evaluation", "rollout 0", "rollout 1"]
    assert data["timeline"]["counts"]
    assert len(data["timeline"]["drops"]) == data["drops"]["reasons"]["zero variance"]
    dropped = metrics.read(folder)[-2]["buffer/dropped"]
    assert data["drops"]["reasons"]["zero variance"] >= dropped > 0
    assert sum(data["drops"]["dropped"]["shares"]) == pytest.approx(1)
    assert {row["key"]: row["value"] for row in data["config"]}["num_steps"] == 12
    check_trace(json.loads((tmp_path / "trace.json").read_text()))


def test_a_window_of_steps(folder, capsys):
    shown = report.collect(folder, (5, 6))["timeline"]
    assert {5, 6} <= {version for version, _, _ in shown["steps"]} <= {4, 5, 6, 7}
    assert report.main([str(folder), "--steps", "40:50"]) == 2
    assert "has no steps 40:50; it has 1:12" in capsys.readouterr().err
    assert report.main([str(folder), "--steps", "9"]) == 2
    assert "--steps is FIRST:LAST" in capsys.readouterr().err


def test_a_run_that_has_just_begun_has_a_page(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(configuration.to_tree(configuration.Config())))
    (tmp_path / "metrics.jsonl").write_text('{"version": 0, "time": 1.0, "eval/accuracy": 0.25}\n{"version": 1, "rew')
    assert report.main([str(tmp_path)]) == 0
    assert report.main([str(tmp_path), "--out", str(tmp_path / "no" / "report.html")]) == 2
    assert "report.html cannot be written: No such file or directory" in capsys.readouterr().err
    data = data_of((tmp_path / "report.html").read_text())
    assert data["evals"]["eval/accuracy"] == [0.25]
    assert data["blame"] is None
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_text_of_a_sample_cannot_leave_its_script_element(folder):
    data = report.collect(folder)
    data["samples"][0]["tokens"][0] = "</script><b>{{data}}"
    page = report.render(data)
    assert "</script><b>" not in page
    assert data_of(page)["samples"][0]["tokens"][0] == "</script><b>{{data}}"


def begun(folder):
    """A run folder in which nothing has happened yet."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(configuration.to_tree(configuration.Config())))
    return folder


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, none here")
@pytest.mark.timeout(300)
def test_the_page_draws_in_a_browser(folder, tmp_path):
    flags = [*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    for run_folder, num_charts, num_samples in ((begun(tmp_path / "begun"), 0, 0), (folder, 14, 3)):
        page.write_text(report.render(report.collect(run_folder)))
        command = [CHROMIUM, *flags, "--dump-dom", page.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in dom.stderr, dom.stderr
        body = dom.stdout.split('id="data"')[0]
        assert body.count("<svg") >= num_charts
        assert body.count('class="sample"') == num_samples
        assert not {"undefined", "NaN"} & set(re.findall(r"\w+", body))
    subprocess.run([CHROMIUM, *flags, f"--screenshot={picture}", page.as_uri()], timeout=120, check=True)
    assert picture.stat().st_size > 100_000


def test_sampled_trajectories_open_in_pandas_with_every_column(folder):
    table = pandas.concat(pandas.read_parquet(path) for path in sorted((folder / samples.FOLDER).glob("*.parquet")))
    assert len(table) == 12 * 3
    assert (table.groupby("version")["prompt_id"].nunique() == 1).all(), "one group a step"
    for row in table.itertuples():
        assert len(row.token_ids) == len(row.tokens) == len(row.mask) == len(row.logprobs) == len(row.versions)
        own = row.mask.astype(bool)
        assert (row.logprobs[own] < 0).all()
        assert row.versions[own].max() < row.version, "trained by the step that made the version"
        assert row.reward == pytest.approx((row.tokens[own] == "7").mean())
    for _, group in table.groupby("version"):
        baseline = group["reward"] - group["advantage"]
        assert baseline.to_numpy() == pytest.approx(baseline.iloc[0]), "the mean reward of the group"
    assert (table["advantage"] != 0).any()
    assert [row["version"] for row in samples.read(folder)] == sorted([*range(1, 13)] * 3)


def double(rewards, _groups):
    return 2 * rewards


@pytest.mark.parametrize(
    ("word", "advantages"),
    [
        ("algorithm.loss.advantage=test_report:double", [2.0, 0.0]),
        ("algorithm.mask_truncated=true", [0.5, 0.0]),
        ("algorithm.overlong_tail=1", [math.nan, math.nan]),
    ],
)
def test_a_sample_has_the_advantage_that_it_was_trained_with(tmp_path, word, advantages):
    whole, cut = trajectory(1, 1, seed=0, reward=1.0), replace(trajectory(1, 1, seed=1), finish="length")
    words = [word] if "mask" in word or "tail" in word else [word, "algorithm.loss.scale=none"]
    drawn = samples.Samples(tmp_path, configuration.load(None, words), decode=str)
    rows = run(drawn.draw(1, [Group(Prompt(0, (1,), ""), (1.0, 0.0), (1, 1), 0, 0, {}, {}, [whole, cut])]))
    assert [row["advantage"] for row in rows] == pytest.approx(advantages, nan_ok=True)


def test_a_sample_of_any_text_is_kept_and_shown_as_it_is(tmp_path):
    text = "\ud800\0\x1b[2J\n```\n\n![x](http://127.0.0.1:9/x.png)"
    drawn = samples.Samples(tmp_path, configuration.load(None, []), decode=lambda _tokens: text)
    whole = [trajectory(1, 1, seed=0, reward=math.nan)]
    (row,) = run(drawn.draw(1, [Group(Prompt(0, (1,), text), (math.nan,), (1,), 0, 0, {}, {}, whole)]))
    drawn.flush()
    assert samples.read(tmp_path)[0]["target"] == row["target"] == text.replace("\ud800", "\\ud800")
    board = sinks.TensorBoard(tmp_path, None, {})
    board.samples(1, [row])
    board.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (shown,) = read.Tensors("samples/text_summary")
    told = shown.tensor_proto.string_val[0].decode()
    assert told.startswith("reward none")
    assert "\x1b" not in told


def test_numbers_are_written_with_seven_digits_however_small_and_counts_in_full(tmp_path):
    row = {"eval/accuracy": 0.123456789, "eval/low": 2.6e-8, "eval/high": 123456789.0}
    with metrics.Metrics(tmp_path, 1, quiet=True) as sink:
        sink.evaluation(3, row)
    (written,) = metrics.read(tmp_path)
    assert [written[name] for name in row] == [0.1234568, 2.6e-8, 123456789]


def test_the_time_of_a_resumed_run_goes_on_from_the_last_line_that_is_kept(tmp_path):
    row = {"eval/accuracy": 0.5, "eval/low": 0.4, "eval/high": 0.6}
    lines = [{"version": 1, "time": 500.0}, {"version": 3, "time": 900.0}, {"version": 0, "time": 600.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with metrics.Metrics(tmp_path, 9, first_step=2, quiet=True) as sink:
        sink.evaluation(2, row)
    *_, written = metrics.read(tmp_path)
    assert 600 <= written["time"] < 900, "of the steps that are made again, nothing counts"


def test_tensorboard_has_the_metrics_the_settings_and_texts(folder):
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert set(metrics.METRICS) == set(tags["scalars"])
    assert {"config/text_summary", "samples/text_summary"} <= set(tags["tensors"])
    named = {name for charts in metrics.OVERVIEW.values() for names in charts.values() for name in names}
    assert named <= set(metrics.METRICS)


def test_watching_a_run_that_grows(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    follower = view.Follower(path, view.NAMES, view.NUM_STEPS)
    assert not follower.read().steps
    path.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    assert sum(len(curve.points) for curve in follower.read().curves.values()) > 4
    with path.open("ab") as file:
        file.write(b"".join(lines)[path.stat().st_size :])
    rows = metrics.read(folder)
    assert list(follower.read().steps) == [row for row in rows if "reward/mean" in row]
    assert follower.read().curves["eval/accuracy"].points == [
        row["eval/accuracy"] for row in rows if "eval/accuracy" in row
    ]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view.screen("a run", config, follower.read()))
    text = console.export_text()
    assert "step 12 of 12" in text
    assert "learner for groups" in text


def test_watching_once_and_nothing(folder, tmp_path, capsys):
    assert watch.main([str(folder), "--once"]) == 0
    assert "step 12 of 12" in capsys.readouterr().out
    assert watch.main([str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*) (NaN|[+-]Inf|[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?)")
COMMENT = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.*)")


def parse(text):
    """Values by name. Fails where the text breaks a rule of Prometheus' exposition format 0.0.4."""
    assert text.endswith("\n"), "the last line ends in a line feed, too"
    told, values = {}, {}
    for line in text[:-1].split("\n"):
        if line.startswith("#"):
            kind, name, rest = COMMENT.fullmatch(line).groups()
            assert (kind, name) not in told, "one HELP and one TYPE a metric"
            assert name not in values, "both come before its samples"
            assert re.fullmatch(r"(?:[^\\]|\\\\|\\n)*", rest), "a backslash is escaped"
            assert kind == "HELP" or rest in ("counter", "gauge", "histogram", "summary", "untyped")
            told[kind, name] = rest
        else:
            name, number = SAMPLE.fullmatch(line).groups()
            assert name not in values, "no name twice"
            assert ("TYPE", name) in told
            values[name] = float(number)
    return values


def test_prometheus_reads_the_newest_values_on_loopback(folder):
    sink = Prometheus("127.0.0.1", 0, metrics.METRICS | {"odd": "a back\\slash\nand two lines"})
    try:
        sink.write(3, {"reward/mean": 0.25, "lag/mean": float("nan"), "odd": float("inf"), "reward/my task.v2": -1e-9})
        for row in metrics.read(folder):
            sink.write(12, {name: value for name, value in row.items() if value is not None})
        sink.write(4, {"reward/mean": 0.5})
        address = f"http://127.0.0.1:{sink.port}"
        answer = urllib.request.urlopen(f"{address}/metrics?x=1", timeout=10)
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.read().decode()
        values = parse(text)
        assert f"# HELP asyncrl_reward_mean {metrics.METRICS['reward/mean']}\n" in text
        assert "# HELP asyncrl_odd a back\\\\slash\\nand two lines\n" in text
        assert (values["asyncrl_reward_mean"], values["asyncrl_version"]) == (0.5, 4)
        assert (values["asyncrl_odd"], values["asyncrl_reward_my_task_v2"]) == (float("inf"), -1e-9)
        assert {"asyncrl_eval_pass_1", "asyncrl_wait_learner_for_groups_s", "asyncrl_lag_mean"} <= set(values)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/", timeout=10)
        with pytest.raises(ValueError, match=rf"metrics\.prometheus_port {sink.port} of 127\.0\.0\.1 cannot be opened"):
            Prometheus("127.0.0.1", sink.port, {})
    finally:
        sink.close()


def test_prometheus_is_told_nothing_before_the_first_step():
    sink = Prometheus(configuration.Config().metrics.prometheus_host, 0, {})
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10).read().decode()
        assert text == ""
    finally:
        sink.close()


class FakeWandb(types.ModuleType):
    """Records what it is told, in place of the package."""

    def init(self, **arguments):
        self.arguments, self.logged, self.finished = arguments, [], False
        return self

    def define_metric(self, name, step_metric):
        self.axis = (name, step_metric)

    def log(self, row):
        self.logged.append(row)

    def finish(self):
        self.finished = True


def test_weights_and_biases_by_one_line_of_configuration(tmp_path, monkeypatch):
    config = configuration.load(None, ["metrics.wandb=my-project"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="package wandb is not installed: pip install wandb"):
        WeightsAndBiases(tmp_path, config)
    fake = FakeWandb("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WeightsAndBiases(tmp_path, config)
    sink.write(7, {"reward/mean": 0.5})
    sink.close()
    assert (fake.arguments["project"], fake.arguments["config"]) == ("my-project", configuration.to_tree(config))
    assert fake.logged == [{"version": 7, "reward/mean": 0.5}]
    assert fake.axis == ("*", "version")
    assert fake.finished
