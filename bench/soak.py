"""Soak test: a long run, followed step by step; nothing of it may grow with the number of steps.

    python bench/soak.py CONFIG.toml --steps 3000 [section.key=value ...] [--minutes 25] [--out TABLE.md]

Starts the run as launch/run.py does and reads, every few seconds, the memory of each of its processes, GPU memory,
shared memory, open files, threads, the time of a step and what lies in the run folder. After a warm-up, the first third
of the steps, a line is fitted through each series: Theil and Sen's, whose slope is the median over all pairs of points.
What grows in the rest of the run by more than a share of its level and a fixed amount fails; journal, metrics and their
like grow with the steps by design, and have a bound on the bytes of a step. After `--minutes` the run is stopped as by
Ctrl-C and judged by the steps that it made. The table is written to `--out` every minute and at the end.

Exit code: 0 if nothing grew, 1 if something did or the run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import theilslopes

RUN = Path(__file__).parent.parent / "launch" / "run.py"
SHM = Path("/dev/shm")
WARM_UP = 1 / 3
MOST_POINTS = 400
"""Of a series that are fitted, evenly spread: their pairs take memory by the square."""
FEWEST_POINTS = 8
STOP_S = 120.0
WRITE_S = 60.0


@dataclass(frozen=True, slots=True)
class Limit:
    """What a series may grow by over the measured steps: a share of its level and a fixed amount."""

    share: float
    amount: float
    per_step: bool = False
    """The amount is for each step."""

    def of(self, level: float, num_steps: float) -> float:
        return self.share * level + self.amount * (num_steps if self.per_step else 1)


LIMITS = {
    "memory, MiB": Limit(0.05, 16),
    "GPU memory, MiB": Limit(0.02, 64),
    "learner/memory_gib, GiB": Limit(0.02, 0.05),
    "shared memory, MiB": Limit(0.1, 64),
    "/dev/shm files, MiB": Limit(0.0, 8),
    "open files": Limit(0.05, 8),
    "threads": Limit(0.05, 8),
    "processes": Limit(0.1, 2),
    "step time, s": Limit(0.5, 0.1),
    "folder, MiB": Limit(0.25, 4),
    "file, KiB": Limit(0.0, 16, per_step=True),
}
"""By the kind of a series. Memory is without what is shared, which counts once."""

_FLAT = {"groups", "checkpoints"}
"""Folders of a run whose contents come and go; the others grow with the steps."""


@dataclass(slots=True)
class Series:
    """A quantity against steps."""

    kind: str
    of: str = ""
    points: list[tuple[float, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.of}" if self.of else self.kind


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. `growth` is that of the measured steps."""

    name: str
    level: float
    per_1000: float
    growth: float
    limit: float

    @property
    def good(self) -> bool:
        return self.growth <= self.limit


def judge(series: Series) -> Row | None:
    """Fits the series after its warm-up; None while there are too few points."""
    last = max((step for step, _ in series.points), default=0.0)
    points = [(step, value) for step, value in series.points if step >= WARM_UP * last]
    points = points[:: max(1, -(-len(points) // MOST_POINTS))]
    steps, values = [step for step, _ in points], [value for _, value in points]
    if len(points) < FEWEST_POINTS or steps[-1] <= steps[0]:
        return None
    with np.errstate(invalid="ignore"):  # of a deviation that is not asked for
        slope, intercept = theilslopes(values, steps)[:2]
    num_steps = steps[-1] - steps[0]
    level = intercept + slope * steps[0]
    return Row(series.name, level, 1000 * slope, slope * num_steps, LIMITS[series.kind].of(abs(level), num_steps))


class Follower:
    """Reads a run from outside, through /proc and its folder."""

    def __init__(self, pid: int, run_dir: Path) -> None:
        self._pid, self._run_dir = pid, run_dir
        self._series: dict[tuple[str, str], Series] = {}
        self._names: dict[tuple[int, str], str] = {}  # of processes, by pid and when they started
        self._shm_before = {path.name for path in SHM.glob("*")} if SHM.exists() else set[str]()
        self._read_bytes = 0
        self._has_gpu = shutil.which("nvidia-smi") is not None
        self._at: tuple[float, float] | None = None
        self.step = 0.0

    @property
    def series(self) -> list[Series]:
        """In the order of the table. Processes that were there for less than half of the time are left out."""
        longest = max((len(series.points) for series in self._series.values() if series.kind == "processes"), default=0)
        kept = [s for s in self._series.values() if s.kind != "memory, MiB" or 2 * len(s.points) >= longest]
        return sorted(kept, key=lambda series: (list(LIMITS).index(series.kind), series.of))

    def sample(self) -> None:
        """One look at everything, if the run has come further: its start, its end and its waits are no steps."""
        folder, before = next(self._run_dir.glob("*/metrics.jsonl"), None), self.step
        if folder is None:
            return
        self._read_metrics(folder)
        if self.step == before:
            return
        self._read_processes()
        self._read_folder(folder.parent)
        if SHM.exists():
            new = (path for path in SHM.glob("*") if path.name not in self._shm_before)
            self._note("/dev/shm files, MiB", "", sum(map(_disk_bytes, new)) / 2**20)
        if self._has_gpu:
            self._read_gpus()

    def _note(self, kind: str, of: str, value: float, step: float | None = None) -> None:
        series = self._series.setdefault((kind, of), Series(kind, of))
        series.points.append((self.step if step is None else step, value))

    def _read_metrics(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._read_bytes)
            *lines, _ = file.read().split(b"\n")
        self._read_bytes += sum(len(line) + 1 for line in lines)
        before = self.step
        for line in lines:
            row = json.loads(line)
            if "reward/mean" not in row:
                continue
            self.step = float(row["version"])
            if (gib := row.get("learner/memory_gib")) is not None:
                self._note("learner/memory_gib, GiB", "", gib, self.step)
        now = time.monotonic()
        if self.step > before:
            if self._at is not None:
                self._note("step time, s", "", (now - self._at[1]) / (self.step - self._at[0]))
            self._at = self.step, now

    def _read_processes(self) -> None:
        totals, tree = Counter[str](), _tree(self._pid)
        for pid in tree:
            try:
                folder = Path(f"/proc/{pid}")
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                rollup = dict(line.split()[:2] for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
                shared = int(rollup.get("Pss_Shmem:", 0))
                totals["threads"] += int(fields[17])
                totals["open files"] += len(os.listdir(folder / "fd"))
                totals["shared memory, MiB"] += shared / 1024
                self._note("memory, MiB", self._name(pid, fields[19]), (int(rollup["Pss:"]) - shared) / 1024)
            except (OSError, KeyError, IndexError):
                continue  # it ended while it was looked at
        for kind in ("threads", "open files", "shared memory, MiB"):
            self._note(kind, "", totals[kind])
        self._note("processes", "", len(tree))

    def _name(self, pid: int, started: str) -> str:
        """A stable one: the process's title without what it does at the moment, and a number among its like."""
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
        title = next((word for word in words[1:] if word.endswith(".py")), words[0] if words else "?")
        if pid == self._pid:
            return "driver"
        title = Path(title).name.partition(".py")[0].partition(".")[0]
        name = self._names.get((pid, started), "")
        if name.rpartition(" ")[0] != title:  # a worker of Ray gets its name with its actor
            taken = set(self._names.values())
            name = next(name for number in itertools.count() if (name := f"{title} {number}") not in taken)
            self._names[pid, started] = name
        return name

    def _read_folder(self, folder: Path) -> None:
        for path in folder.iterdir():
            if path.is_dir():
                files = [Path(parent, name) for parent, _, names in os.walk(path) for name in names]
                if path.name in _FLAT:
                    self._note("folder, MiB", f"{path.name}/", sum(map(_disk_bytes, files)) / 2**20)
                else:
                    self._note("file, KiB", f"{path.name}/", sum(map(_size, files)) / 2**10)
            else:
                self._note("file, KiB", path.name, _size(path) / 2**10)

    def _read_gpus(self) -> None:
        for of, columns in (("GPU", "gpu=index,memory.used"), ("process", "compute-apps=pid,used_memory")):
            command = ["nvidia-smi", f"--query-{columns}", "--format=csv,noheader,nounits"]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            for line in answer.stdout.splitlines():
                number, _, used = line.partition(", ")
                if used.strip().isdigit():
                    self._note("GPU memory, MiB", f"{of} {number}", float(used))


def _tree(root: int) -> list[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # it was there a moment ago


def _disk_bytes(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0


def table(follower: Follower, head: str) -> tuple[str, bool]:
    """The table, in Markdown, and whether nothing grew."""
    rows = [row for series in follower.series if (row := judge(series)) is not None]
    lines = [
        head,
        "",
        "| what | level | growth per 1000 steps | growth in the run | limit | |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.level:.4g} | {row.per_1000:+.3g} | {row.growth:+.3g} | {row.limit:.3g} | "
        f"{'ok' if row.good else 'FAIL'} |"
        for row in rows
    ]
    if not rows:
        lines.append("| too few steps to tell | | | | | FAIL |")
    return "\n".join(lines) + "\n", bool(rows) and all(row.good for row in rows)


def follow(command: Sequence[str], run_dir: Path, *, every_s: float, minutes: float, out: Path) -> bool:
    """Runs the command, whose run makes its folder in `run_dir`, and follows it. True if it ended well and nothing
    grew; the table is in `out`."""
    began = time.monotonic()
    with (run_dir / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    follower, written, stopped = Follower(process.pid, run_dir), began, False
    try:
        while process.poll() is None:
            follower.sample()
            now = time.monotonic()
            if not stopped and now - began > 60 * minutes:
                stopped = True
                process.send_signal(signal.SIGINT)
            if now - began > 60 * minutes + STOP_S:
                break
            if now - written > WRITE_S:
                written = now
                out.write_text(table(follower, f"In progress, step {follower.step:.0f}.")[0])
            time.sleep(every_s)
    finally:
        if process.poll() is None:
            for pid in reversed(_tree(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        code = process.wait()
    ended = code == 0 or (stopped and code == os.EX_TEMPFAIL)
    took = time.monotonic() - began
    head = f"{follower.step:.0f} steps in {took:.0f} s; the run {'ended well' if ended else f'failed with {code}'}."
    text, flat = table(follower, head)
    out.write_text(text)
    print(text)
    if not ended:
        print("\n".join((run_dir / "output.txt").read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
    return ended and flat


def main(arguments: list[str] | None = None) -> int:
    parser: Any = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG.toml | section.key=value")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="stop the run after so long")
    parser.add_argument("--every", type=float, default=3.0, metavar="SECONDS", help="between two looks")
    parser.add_argument("--run-dir", type=Path, help="a folder that is kept, with the run and its output")
    parser.add_argument("--out", type=Path, help="the file of the table; by default soak.md in the run-dir")
    options = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        run_dir = options.run_dir or Path(temporary)
        run_dir.mkdir(parents=True, exist_ok=True)
        words = [*options.words, f"num_steps={options.steps}", f"run_dir={run_dir}"]
        out = options.out or run_dir / "soak.md"
        command = [sys.executable, str(RUN), *words]
        return 0 if follow(command, run_dir, every_s=options.every, minutes=options.minutes, out=out) else 1


if __name__ == "__main__":
    sys.exit(main())
