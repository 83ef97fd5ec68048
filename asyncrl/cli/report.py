"""Writes a run as one HTML page that needs no network: RUN_DIR/report.html, also while the run goes on.

python launch/report.py RUN_DIR [--out FILE.html] [--steps FIRST:LAST] [--trace FILE.json]

`--steps` chooses the window of the timeline (default: the last steps, as many as fit); `--trace` also writes the whole
timeline for ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncrl.config import loading as configuration
from asyncrl.monitor import events, metrics, samples, timeline
from asyncrl.monitor.bottleneck import ALIVE, blame, takes_turns, warmed_up
from asyncrl.monitor.sinks import flat
from asyncrl.monitor.timeline import Span
from asyncrl.recovery import run_folder
from asyncrl.utils.importing import check_run

PAGE = Path(__file__).parent / "report_page"
_MAX_SPANS = 40_000
_MAX_POINTS = 2_000
_MAX_SAMPLED_STEPS = 400
_MAX_EVENTS = 500

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: RUN_DIR/report.html")
    parser.add_argument("--steps", metavar="FIRST:LAST", help="window of the timeline")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="write the timeline for ui.perfetto.dev")
    options = parser.parse_args(arguments)
    try:
        window = parse_window(options.steps) if options.steps else None
        data = collect(options.run, window)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = options.out or options.run / "report.html"
    try:
        out.write_text(render(data))
        print(f"report: {out}")
        if options.trace:
            options.trace.write_text(json.dumps(timeline.perfetto(read_spans(options.run)[0])))
            print(f"trace: {options.trace}")
    except OSError as error:
        print(f"error: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def parse_window(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal() or int(first) > int(last):
        raise ValueError(f"--steps is FIRST:LAST, for example 20:60; got {text!r}")
    return int(first), int(last)


def collect(folder: Path, window: tuple[int, int] | None = None) -> dict[str, Any]:
    """Everything that the page shows, as plain values; what a run does not have is empty."""
    check_run(folder)
    rows: list[Row] = metrics.read(folder) if (folder / "metrics.jsonl").exists() else []
    steps = newest([row for row in rows if "reward/mean" in row])
    config = run_folder.read_json(folder / "config.json")
    begin, _ = run_folder.stretches(folder)[-1]  # of the configuration that it has now
    found = blame(warmed_up([row for row in steps if row["version"] > begin]), turns=takes_turns(config))
    spans, num_damaged = read_spans(folder)
    return {
        "name": folder.resolve().name,
        "origin": run_folder.read_json(folder / "run.json"),
        "config": describe_config(config),
        "meanings": metrics.METRICS,
        "num_rows": len(steps),
        "steps": columns(thin(steps)),
        "evals": columns(newest([row for row in rows if "eval/accuracy" in row])),
        "blame": found
        and {
            "sentence": found.sentence,
            "bound": found.bound,
            "shares": found.shares,
            "num_actors": found.num_actors,
            "balanced_actors": found.balanced_actors,
        },
        "timeline": gantt(spans, window) | {"num_damaged": num_damaged},
        "samples": sampled(folder),
        "drops": drops(spans),
        "events": news(folder),
    }


def newest(steps: Sequence[Row]) -> list[Row]:
    """One row a version: steps that a resumed run took again replace the lost ones."""
    return [row for _, row in sorted({row["version"]: row for row in steps}.items())]


def thin(steps: Sequence[Row]) -> Sequence[Row]:
    """At most 2000 rows, evenly spaced, the last one among them."""
    stride = math.ceil(len(steps) / _MAX_POINTS) or 1
    return steps[::-1][::stride][::-1]


def columns(steps: Sequence[Row]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in steps for name in row)
    return {name: [row.get(name) for row in steps] for name in names}


def describe_config(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Every knob with its value, and whether that is the default."""
    defaults = flat(configuration.to_store(configuration.Config()))
    return [{"key": key, "value": value, "default": defaults.get(key)} for key, value in flat(tree).items()]


def read_spans(folder: Path) -> tuple[list[Span], int]:
    path = folder / "timeline.jsonl"
    return timeline.read(path) if path.exists() else ([], 0)


def gantt(spans: Sequence[Span], window: tuple[int, int] | None) -> dict[str, Any]:
    """Lanes of spans in milliseconds since the run began, those of the window of steps only.

    A span is [lane, name, begin, duration, facts]; `counts` are the groups that were ready, `drops` when one was
    dropped. Without a window: the last steps whose spans fit.
    """
    if not spans:
        return {"lanes": [], "spans": [], "counts": [], "drops": [], "steps": []}
    origin = min(span.begin_s for span in spans)

    def ms(at_s: float) -> float:
        return round(1000 * (at_s - origin), 2)

    steps = [(span.facts["version"], span.begin_s, span.end_s) for span in spans if is_step(span)]
    begin_s, end_s = bounds(spans, steps, window)
    shown = [span for span in spans if span.end_s >= begin_s and span.begin_s <= end_s]
    lasting = [span for span in shown if "value" not in span.facts and span.name not in ("drop", ALIVE)]
    lanes = sorted({span.lane for span in lasting}, key=timeline.lane_order)
    names = {lane: number for number, lane in enumerate(lanes)}
    return {
        "lanes": lanes,
        "spans": [
            [names[span.lane], span.name, ms(span.begin_s), ms(span.end_s) - ms(span.begin_s), span.facts]
            for span in lasting
        ],
        "counts": [[ms(span.begin_s), span.facts["value"]] for span in shown if "value" in span.facts],
        "drops": [ms(span.begin_s) for span in shown if span.name == "drop"],
        "steps": [[version, ms(begin), ms(end)] for version, begin, end in steps if end >= begin_s and begin <= end_s],
    }


def is_step(span: Span) -> bool:
    return span.lane == "learner" and span.name == "step" and "version" in span.facts


def bounds(
    spans: Sequence[Span], steps: Sequence[tuple[int, float, float]], window: tuple[int, int] | None
) -> tuple[float, float]:
    if window is not None:
        inside = [(begin, end) for version, begin, end in steps if window[0] <= version <= window[1]]
        if not inside:
            known = f"{steps[0][0]}:{steps[-1][0]}" if steps else "none"
            raise ValueError(f"the timeline has no steps {window[0]}:{window[1]}; it has {known}")
        return min(begin for begin, _ in inside), max(end for _, end in inside)
    newest_first = sorted((span.begin_s for span in spans), reverse=True)
    return newest_first[min(len(newest_first), _MAX_SPANS) - 1], newest_first[0]


def sampled(folder: Path) -> list[dict[str, Any]]:
    """Trajectories for the samples browser, of at most 400 steps, evenly spaced."""
    rows = samples.read(folder)
    versions = sorted({row["version"] for row in rows})
    stride = math.ceil(len(versions) / _MAX_SAMPLED_STEPS) or 1
    kept = set(versions[::-1][::stride])
    names = ("version", "prompt_id", "sample", "reward", "advantage", "finish", "target", "tokens", "mask", "versions")
    return [
        {name: row[name] for name in names} | {"logprobs": [round(value, 3) for value in row["logprobs"]]}
        for row in rows
        if row["version"] in kept
    ]


def news(folder: Path) -> list[dict[str, Any]]:
    """The newest events, the newest one first."""
    return [
        {"run_s": event.run_s, "at": event.timestamp, "kind": event.kind, "message": event.line, "alarm": event.alarm}
        for event in events.read(folder)[-_MAX_EVENTS:][::-1]
    ]


def drops(spans: Sequence[Span]) -> dict[str, Any]:
    """Groups dropped and rollouts failed, by reason, and tokens a trajectory: of dropped and of finished groups."""
    dropped = [span for span in spans if span.name == "drop"]
    failed = [span for span in spans if span.name == "group" and "error" in span.facts]
    reasons = Counter(span.facts["reason"] for span in dropped)
    # A run that ends cancels what is in flight: nothing was lost there.
    reasons.update(f"failed: {name}" for span in failed if (name := span.facts["error"]) != "CancelledError")
    lengths = [length for span in dropped for length in span.facts.get("lengths", ())]
    made = [length for span in spans if span.name == "group" for length in span.facts.get("lengths", ())]
    return {"reasons": dict(reasons.most_common()), "dropped": histogram(lengths), "made": histogram(made)}


def histogram(lengths: Sequence[int]) -> dict[str, list[float]]:
    """Shares of the lengths in up to 20 bins of equal width; `edges` has one more entry than `shares`."""
    if not lengths:
        return {"edges": [], "shares": []}
    low, high = min(lengths), max(lengths)
    width = max(1, math.ceil((high - low + 1) / 20))
    counts = Counter((length - low) // width for length in lengths)
    num_bins = (high - low) // width + 1
    return {
        "edges": [low + width * number for number in range(num_bins + 1)],
        "shares": [counts[number] / len(lengths) for number in range(num_bins)],
    }


def render(data: Mapping[str, Any]) -> str:
    """The page. The data cannot end the script element that holds it: every `<` in it is escaped."""
    scripts = [(PAGE / name).read_text() for name in ("charts.js", "timeline.js", "samples.js", "main.js")]
    parts = {
        "title": html.escape(data["name"]),
        "style": (PAGE / "style.css").read_text(),
        "script": "\n".join(scripts),
        "data": json.dumps(clean(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    page = (PAGE / "page.html").read_text()
    for name, text in parts.items():
        before, _, after = page.partition(f"{{{{{name}}}}}")
        page = before + text + after
    return page


def clean(value: Any) -> Any:
    """JSON has no nan and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: clean(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [clean(part) for part in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
