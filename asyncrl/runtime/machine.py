"""The preflight's facts: what this machine has, and what can be reached from it. The rules are in `preflight.py`.

Nothing heavy is imported here, so that a package that is missing is a finding and not a traceback.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import re
import socket
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from asyncrl.runtime.preflight import Gpu


def installed(name: str) -> str | None:
    """The version of an installed package."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def find_gpus() -> tuple[list[Gpu], str | None]:
    """The GPUs that torch sees, and the CUDA version that it was built for."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        gpus.append(Gpu(name, capability, free / 1e9, total / 1e9))
    return gpus, torch.version.cuda


def find_driver() -> str | None:
    """The version of NVIDIA's driver, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def available_gb(meminfo: Path) -> float | None:
    """Memory that can still be taken; None where the system does not tell."""
    found = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 / 1e9 if found else None


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def write(folder: Path) -> str:
    """Writes a file to the nearest existing folder and locks it, as a run does its journal; nothing is left behind."""
    from asyncrl.recovery.journal import lock

    with tempfile.TemporaryFile(dir=nearest(folder)) as file:
        file.write(b"x")
        lock(file.fileno(), folder)
    return f"{folder} can be written, and files in it locked"


def count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_wandb_key() -> bool:
    """Whether a key is where the package looks for one: in the environment, or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
    return False


def show_token(address: str | None) -> None:
    """Has Ray show the cluster that it joins the token of `~/.ray/auth_token`, unless RAY_AUTH_MODE is set. To be
    called before Ray is imported, which reads that variable then.

    With an address Ray shows none of its own accord, and a head that was started where there is a token refuses it; a
    cluster that asks for no token takes no notice of one.
    """
    if address is not None and (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def reach(address: str) -> str:
    """Connects to the Ray cluster's head; "auto" is the one that was started on this machine."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _started_here()
    head = urlsplit(address if "://" in address else f"ray://{address}")
    if head.hostname is None or head.port is None:
        raise ValueError(f"cluster.address {address!r} has no host and port: write HOST:6379")
    socket.create_connection((head.hostname, head.port), timeout=5).close()
    return f"{address} answers"


def _started_here() -> str:
    """The address that `ray start` left on this machine, in the folder that Ray takes."""
    usual = os.environ.get("TMPDIR", "/tmp") if sys.platform == "linux" else "/tmp"
    file = Path(os.environ.get("RAY_TMPDIR", usual)) / "ray" / "ray_current_cluster"
    if not file.exists():
        raise ValueError(
            "cluster.address is 'auto' and no Ray was started on this machine: run `ray start --head`, or give the "
            "address of a cluster"
        )
    return file.read_text().strip()


def bind_loopback(wanted: int) -> int:
    """Binds up to `wanted` free ports at once and lets go of them. Returns how many it got."""
    with contextlib.ExitStack() as stack:
        bound: list[socket.socket] = []
        with contextlib.suppress(OSError):
            while len(bound) < wanted:
                bound.append(stack.enter_context(socket.create_server(("127.0.0.1", 0))))
        return len(bound)


def listen(host: str, port: int) -> str:
    """Opens the port and lets go of it."""
    socket.create_server((host, port)).close()
    return f"{port} of {host} is free"
