"""A live view of a run in the terminal, from the files in its folder: attach and detach (Ctrl-C) as you like.

python launch/watch.py RUN_DIR [--once]

`launch/run.py --watch` shows the same view of the run that it starts.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from asyncrl.monitor.terminal import undisturbed_by_keys
from asyncrl.monitor.view import View

_REFRESH_S = 0.5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--once", action="store_true", help="print the view once and stop")
    options = parser.parse_args(arguments)
    try:
        view = View(options.run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.once:
        Console().print(view.render())
        return 0
    with undisturbed_by_keys(), suppress(KeyboardInterrupt):  # detached: the run does not notice
        watch(view)
    return 0


def watch(view: View) -> None:
    """Shows the run until its last step is done."""
    with Live(auto_refresh=False) as live:
        while True:
            live.update(view.render(), refresh=True)
            if view.finished():
                return
            time.sleep(_REFRESH_S)


if __name__ == "__main__":
    sys.exit(main())
