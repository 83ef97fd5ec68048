"""Power cuts in the first half minute of a run: what had not reached the disk is lost, and the rest is resumed.

    python bench/power_cut.py [--cuts 6] [--seed 0]

Needs root, for a small ext4 file system in a file (a loop device). A cut is a copy of that file while the run goes on:
what the kernel still holds of the file system is not in it. The copy is mounted and its run goes on with --resume;
where it had no folder yet, a new run starts beside what is left. Prints a line a cut; exits with 1 if any was not
recovered.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from asyncrl.recovery.checkpoint import version_of  # noqa: E402

WORDS = ["runtime=local", "device=cpu", "warmup.num_steps=0", "eval.every=0", "eval.num_prompts=4", "num_steps=4000"]
WORDS += ["checkpoint.every=100", "rollout.max_new_tokens=4"]
LATEST_S = 30.0
"""After the folder appeared. What is older than about that the kernel writes back by itself."""
ENOUGH = 3
"""Steps that a recovered run takes beyond the cut, to show that it goes on."""


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def run(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "launch" / "run.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def recovered(folder: Path, log: Path) -> str:
    """Empty if the run in the folder goes on, or a new one does where there is none; else what was said."""
    found = [path.parent for path in (folder / "runs").glob("*/config.json")]
    first = ["--resume", str(found[0])] if found else [f"run_dir={folder / 'runs'}", *WORDS]
    steps = max(map(version_of, found[0].glob("checkpoints/step-*")), default=0) if found else 0
    process = run([*first, f"num_steps={steps + ENOUGH}"], log)
    try:
        code = process.wait(timeout=240)
    finally:
        end(process)
    return "" if code == 0 else f"exit {code}: {log.read_text(errors='replace')[-300:]!r}"


def cut(number: int, after_s: float, root: Path) -> str:
    """One run, cut so many seconds after its folder appeared."""
    image, copy, log = root / "disk.img", root / "cut.img", root / f"log-{number}.txt"
    with image.open("wb") as file:
        file.truncate(2**28)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    with mounted(image, root / "disk") as disk:
        process = run([f"run_dir={disk / 'runs'}", *WORDS], log)
        try:
            while not list((disk / "runs").glob("*/config.json")) and process.poll() is None:
                time.sleep(0.02)
            time.sleep(after_s)
            if process.poll() is not None:
                return f"the run ended by itself: {log.read_text(errors='replace')[-300:]!r}"
            shutil.copyfile(image, copy)
        finally:
            end(process)
    log.write_text("")
    with mounted(copy, root / "after") as folder:
        return recovered(folder, log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, bad = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="asyncrl-power-") as root:
        for number in range(options.cuts):
            after_s = rng.uniform(0, LATEST_S)
            problem = cut(number, after_s, Path(root))
            bad += bool(problem)
            print(f"cut {number}, {after_s:.1f} s after the folder: {problem or 'recovered'}", flush=True)
    print(f"{options.cuts - bad} of {options.cuts} recovered")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
