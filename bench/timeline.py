"""What the timeline costs: the spans of a finished run recorded once more, and the waits of each step summed up.

    python bench/timeline.py RUN_DIR [--repeats 5]

Every step's spans go through a `Timeline` that writes to a file, then the file is flushed and the waits are taken from
the spans, as in the run itself. The seconds for that are compared with the seconds that the step took in the run, from
its metrics.jsonl. Both are of this machine only if the run was. Then the terminal view of the run is drawn.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console

from asyncrl.monitor import metrics, timeline, view
from asyncrl.monitor.bottleneck import waits
from asyncrl.monitor.course import Course
from asyncrl.monitor.timeline import Span, Timeline


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    steps = spans_of_steps(timeline.read(options.run / "timeline.jsonl")[0])
    rows = {row["version"]: row for row in metrics.read(options.run) if row.get("wait/window_s")}
    known = [version for version in steps if version in rows]
    if not known:
        print(f"error: {options.run} has no step with both spans and metrics", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        repeats = [record([steps[version] for version in known], Path(folder)) for _ in range(options.repeats)]
    costs = [min(seconds) for seconds in zip(*repeats, strict=True)]
    took = [rows[version]["wait/window_s"] for version in known]
    num_spans = [len(steps[version]) for version in known]
    print(
        f"{len(known)} steps, {statistics.median(num_spans):.0f} spans a step (median), "
        f"{1e6 * sum(costs) / sum(num_spans):.1f} us a span, its share of the waits included\n"
        f"{1e3 * statistics.median(costs):.2f} ms of a step of {1e3 * statistics.median(took):.0f} ms (medians): "
        f"{sum(costs) / sum(took):.2%} of all steps' time, {max(map(share, costs, took)):.2%} of the worst one's"
    )
    steps_drawn = [draw(rows, json.loads((options.run / "config.json").read_text()), n) for n in (len(rows), 10_000)]
    print(
        f"the view, drawn: {steps_drawn[0]:.1f} ms of CPU, {steps_drawn[1]:.1f} ms for a run of 10,000 steps (medians)"
    )
    return 0


def draw(rows: dict[int, dict[str, float]], config: dict[str, Any], num_rows: int) -> float:
    """Milliseconds of CPU to draw the terminal view of the run, its rows repeated up to `num_rows`."""
    course = Course(view.NAMES, view.NUM_STEPS, islice(cycle(rows.values()), num_rows))
    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    costs = []
    for _ in range(20):
        began = time.thread_time()
        console.print(view.screen("run", config, course))
        costs.append(time.thread_time() - began)
    return 1e3 * statistics.median(costs)


def share(cost_s: float, step_s: float) -> float:
    return cost_s / step_s


def spans_of_steps(spans: list[Span]) -> dict[int, list[Span]]:
    """By version: the spans that ended before the engines' update to it did, and after the one before."""
    ends = sorted((span.end_s, span.facts["version"]) for span in spans if span.lane == "weight sync")
    found: dict[int, list[Span]] = defaultdict(list)
    waiting = iter(sorted(spans, key=lambda span: span.end_s))
    span = next(waiting, None)
    for end_s, version in ends:
        while span is not None and span.end_s <= end_s:
            found[version].append(span)
            span = next(waiting, None)
    return dict(found)


def record(steps: list[list[Span]], folder: Path) -> list[float]:
    """Seconds that each step's spans cost."""
    line = Timeline(folder / "timeline.jsonl")
    seconds = []
    before_s = line.now()
    for spans in steps:
        began = time.perf_counter()
        for span in spans:
            with line.span(span.lane, span.name) as facts:
                facts.update(span.facts)
        line.flush()
        now_s = line.now()
        waits(line.since(before_s), before_s, now_s, 2)
        seconds.append(time.perf_counter() - began)
        before_s = now_s
    line.close()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
