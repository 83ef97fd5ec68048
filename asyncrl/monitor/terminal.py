"""What the person who started a run sees of it: lines above a progress bar, or, with --watch, the view of the run.

    lines of the run ----------------------------------------------.
    all else that this process writes ---> RUN_DIR/output.log -----+---> above the view, on the terminal
    metrics.jsonl ---> the view -----------------------------------'

A thread draws the view once a second. Nothing waits for it, nor it for anything but the files.
"""

from __future__ import annotations

import errno
import os
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from asyncrl.monitor.view import View
from asyncrl.utils.importing import interpreter

_REFRESH_S = 1.0


class Terminal(Protocol):
    """Where the lines of a run go."""

    def start(self) -> None: ...

    def stop(self) -> None:
        """What is said from here on goes below the bar or the view, which stay as they are. May be called again."""

    def say(self, text: str) -> None: ...
    def step(self, version: int, text: str) -> None: ...


def open_terminal(folder: Path, num_steps: int, first_step: int, *, quiet: bool, watch: bool) -> BestEffort:
    """The view where it is asked for and a terminal can show it, else lines."""
    console = _Console(quiet=quiet, highlight=False, soft_wrap=True)
    if watch and not quiet and console.is_terminal and not console.is_dumb_terminal:
        return BestEffort(LiveView(folder))
    lines = BestEffort(Lines(console, num_steps, first_step))
    if watch:
        lines.say(
            "--watch needs a terminal, and the output is none: one line a step follows instead; for the view run "
            f"{interpreter()} launch/watch.py {folder} in a terminal"
        )
    return lines


@contextmanager
def undisturbed_by_keys() -> Iterator[None]:
    """Keys that are pressed, Ctrl-C among them, act as ever, but are not written across what is drawn, nor cut it.

    On Ctrl-C and Ctrl-Z a terminal drops what it was given and has not shown yet, in the middle of a character too,
    unless NOFLSH is set (termios(3)); over a slow connection that would be a part of a drawing.
    """
    if not (sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()):  # not ours to change
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    changed = [*before[:3], before[3] & ~termios.ECHO | termios.NOFLSH, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class BestEffort:
    """A terminal that may be lost, as a closed pipe or a window that is gone: that ends no run."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self.lost: Callable[[str], object] = lambda _why: None
        """Told once why nothing is shown any more."""
        self._gone = False

    def start(self) -> None:
        self._try(self._terminal.start)

    def stop(self) -> None:
        self._try(self._terminal.stop)

    def say(self, text: str) -> None:
        self._try(lambda: self._terminal.say(text))

    def step(self, version: int, text: str) -> None:
        self._try(lambda: self._terminal.step(version, text))

    def _try(self, show: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            show()
        except (OSError, ValueError, termios.error) as error:  # a ValueError tells of a file that is closed
            self._gone = True
            self._discard_output()
            self.lost(f"the console is gone ({error}): the run goes on without it")

    def _discard_output(self) -> None:
        """What is still to be flushed at the exit goes nowhere, instead of failing there."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Lines:
    """One line a step and for all news, above a progress bar where there is a terminal."""

    def __init__(self, console: Console, num_steps: int, first_step: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self._bar = self._progress.add_task("training", total=num_steps, completed=first_step)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def step(self, version: int, text: str) -> None:
        self._progress.update(self._bar, completed=version)
        self.say(text)


class LiveView:
    """The view of the run at the bottom of the terminal, news above it; lines of steps are left to the view.

    Between `start` and `stop` what goes to standard output or error by any other way (warnings, Ray, libraries in C)
    is written to output.log in the run folder and shown from there, so that nothing is drawn across the view and
    nothing is lost if the process dies.
    """

    def __init__(self, folder: Path) -> None:
        self._view = View(folder)
        self._log = folder / "output.log"
        self._console = Console(highlight=False)
        self._stopping = threading.Event()
        self._keys = ExitStack()
        self._thread = threading.Thread(target=self._draw, name="view", daemon=True)

    def start(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        terminal = os.dup(1)
        self._saved = {number: os.dup(number) for number in (1, 2) if os.isatty(number)}
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._shown = os.lseek(log, 0, os.SEEK_END)
        for number in self._saved:
            os.dup2(log, number)
        os.close(log)
        self._console = Console(file=os.fdopen(terminal, "w"), force_terminal=True, highlight=False)
        self._fit()
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._keys.enter_context(undisturbed_by_keys())
        self._live.start()
        self._thread.start()

    def stop(self) -> None:
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        try:
            self._refresh()
        finally:
            self._live.stop()
            self._keys.close()
            for number, saved in self._saved.items():
                os.dup2(saved, number)
                os.close(saved)
            self._console.file.close()
            self._console = Console(highlight=False)

    def say(self, text: str) -> None:
        self._print(Text(text))

    def step(self, version: int, text: str) -> None:
        """The view tells it."""

    def _draw(self) -> None:
        while not self._stopping.wait(_REFRESH_S):
            self._refresh()

    def _refresh(self) -> None:
        self._fit()
        for line in self._others():
            self._print(Text.from_ansi(line))
        self._live.update(self._view.render(), refresh=True)

    def _print(self, line: Text) -> None:
        """One line of any length, which the terminal may break. `soft_wrap` would hold for the view, too."""
        line.no_wrap, line.overflow = True, "ignore"
        self._console.print(Group(line), crop=False)  # `print` would make another text of a bare one

    def _fit(self) -> None:
        """The terminal's size; rich would ask the standard streams, which may all be something else."""
        self._console.size = os.get_terminal_size(self._console.file.fileno())

    def _others(self) -> Sequence[str]:
        """Whole lines in output.log that have not been shown yet."""
        with self._log.open("rb") as file:
            file.seek(self._shown)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._shown += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()
