"""What it costs to go on with a long run, and to watch it: CPU seconds and memory after many thousands of steps.

    python bench/long_run.py [--steps 100000] [--groups 4] [--out FOLDER]

Needs no GPU. Makes two steps of a small run and then a folder that such a run would leave after so many: journal,
metrics and the newest checkpoint. Each measurement has a process of its own; memory is its peak above that of the same
measurement after two steps. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console

from asyncrl.config import loading as configuration
from asyncrl.driver import run as job
from asyncrl.envs.base import load_env
from asyncrl.models.loading import load_tokenizer
from asyncrl.monitor.view import View
from asyncrl.recovery import checkpoint, journal
from asyncrl.recovery.journal import Journal
from asyncrl.recovery.prompt_states import Admitted, Batch, Generated, Saved, Synced, checksum_of

WORDS = [
    "num_steps=2",
    "runtime=local",
    "device=cpu",
    "warmup.num_steps=0",
    "rollout.max_new_tokens=4",
    "rollout.group_size=2",
    "eval.every=0",
    "eval.num_prompts=4",
    "checkpoint.every=1",
    "algorithm.drop_zero_variance=false",
]
SAVE_EVERY = 100


def make_short(root: Path, groups: int) -> Path:
    """The folder of a run of two steps."""
    words = [*WORDS, f"learner.groups_per_step={groups}", f"run_dir={root}"]
    return asyncio.run(job.train(configuration.load(None, words), quiet=True)).folder


def make_long(short: Path, steps: int, groups: int) -> Path:
    """The folder of such a run after many steps: its journal, its metrics, and the newest checkpoint."""
    long = short.with_name(f"{short.name}-{steps}")
    shutil.copytree(short, long, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "groups", "timeline*"))
    write_journal(long, steps, groups)
    write_metrics(long, steps)
    saved = long / "checkpoints" / f"step-{steps:06d}"
    shutil.copytree(checkpoint.latest(short / "checkpoints"), saved)
    num_bytes = (long / "journal.bin").stat().st_size
    cursor = checkpoint.Cursor(steps, (steps + 1) * groups, [], num_bytes)
    (saved / "learner" / "cursor.json").write_bytes(msgspec.json.encode(cursor))
    (saved / "manifest.json").write_text('{"files": {}}')  # nothing is checked: it is not what is measured
    return long


def write_journal(folder: Path, steps: int, groups: int) -> None:
    path = folder / "journal.bin"
    digest = [record.digest for record in journal.read(path)[0] if isinstance(record, Synced)][-1]
    path.unlink()
    config = configuration.load(folder / "config.json", [])
    tokenizer = load_tokenizer(str(next(folder.parent.glob("cache/*"))))
    source = load_env(config.env.path, tokenizer, config.env.args).prompts("train", config.seed)
    book = Journal(path)
    for step in range(1, steps + 1):
        prompts = list(islice(source, groups))
        ids = tuple(prompt.id for prompt in prompts)
        book.append(*(Admitted(id=prompt.id, checksum=checksum_of(prompt)) for prompt in prompts))
        book.append(*(Generated(id=i, oldest=step - 1, newest=step - 1, stored="0" * 32, passed=0.5) for i in ids))
        book.append(Batch(step=step, ids=ids), Synced(version=step, digest=digest))
        if step % SAVE_EVERY == 0 or step == steps:
            book.append(Saved(version=step, kept=(step - 2, step - 1, step)))
            book.accounts.forget_settled()
    book.append(*(Admitted(id=prompt.id, checksum=checksum_of(prompt)) for prompt in islice(source, groups)))
    book.close()


def write_metrics(folder: Path, steps: int) -> None:
    path = folder / "metrics.jsonl"
    *_, row = (row for row in map(json.loads, path.read_text().splitlines()) if "reward/mean" in row)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(row | {"version": step, "time": round(0.7 * step, 3)}) + "\n")


def resumed(folder: Path) -> None:
    config = configuration.load(folder / "config.json", [])
    words = [f"num_steps={1 + checkpoint.version_of(checkpoint.latest(folder / 'checkpoints'))}"]
    config = configuration.load(folder / "config.json", words)
    asyncio.run(job.train(config, folder, quiet=True))


def watched(folder: Path) -> float:
    """CPU seconds of a frame after the first one."""
    view, console = View(folder), Console(file=io.StringIO(), width=100)
    console.print(view.render())
    begin = time.process_time()
    for _ in range(10):
        console.print(view.render())
        view.finished()
    return (time.process_time() - begin) / 10


def measured(work: Callable[[Path], float | None], folder: Path) -> tuple[float, float]:
    """CPU seconds, and MB at the peak, in a process of its own. `work` may say which seconds count."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            begin = time.process_time()
            seconds = work(folder)
            seconds = time.process_time() - begin if seconds is None else seconds
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            os.write(writer, json.dumps([seconds, peak]).encode())
            code = 0
        finally:
            os._exit(code)
    _, status = os.wait()
    if status:
        raise RuntimeError(f"{work.__name__} of {folder} failed")
    seconds, peak = json.loads(os.read(reader, 1000))
    return seconds, peak


def first_frame(folder: Path) -> None:
    Console(file=io.StringIO(), width=100).print(View(folder).render())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=4, help="groups a step")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    options = parser.parse_args()
    root = options.out or Path(tempfile.mkdtemp(prefix="asyncrl-long-"))
    folders = root / "short.txt", root / "long.txt"
    if os.fork() == 0:  # the process that forks the measurements must not have run torch itself
        short = make_short(root, options.groups)
        folders[0].write_text(str(short))
        folders[1].write_text(str(make_long(short, options.steps, options.groups)))
        os._exit(0)
    os.wait()
    short, long = (Path(file.read_text()) for file in folders)
    rows = {}
    print(f"| {options.steps} steps of {options.groups} groups | CPU seconds | after 2 steps | MB more |")
    print("|---|---|---|---|")
    for name, work in {"first frame": first_frame, "next frame": watched, "resume": resumed}.items():
        (base_s, base_mb), (seconds, peak) = measured(work, short), measured(work, long)
        rows[name] = {"seconds": round(seconds, 3), "base_s": round(base_s, 3), "more_mb": round(peak - base_mb)}
        print(f"| {name} | {seconds:.3f} | {base_s:.3f} | {peak - base_mb:.0f} |", flush=True)
    sizes = {file: (long / file).stat().st_size / 1e6 for file in ("journal.bin", "metrics.jsonl")}
    print(json.dumps({"steps": options.steps, "groups": options.groups, **rows, "file_mb": sizes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
