"""The command `asyncrl`: one word chooses a module, which is imported only then, so that help is instant."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "run a training job, or resume one",
    "doctor": "check beforehand what a run will need",
    "evaluate": "score a model, a checkpoint or a run on held-out prompts",
    "watch": "show a run in the terminal while it goes on",
    "report": "make one HTML page of a run",
    "scale": "change the number of rollout actors of a run in progress",
    "replay": "train a recorded run again and compare every version",
    "prepare-model": "turn a GGUF file into a model folder",
    "prepare-gsm8k": "turn GSM8K into the data set of the configurations",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names. Returns its exit code; 2 for a word that is no command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from asyncrl import __version__

        print(f"asyncrl {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: {name!r} is no command of asyncrl\n\n{usage()}", file=sys.stderr)
        return 2
    sys.argv[0] = f"asyncrl {name}"  # argparse prints it as the program's name
    command = importlib.import_module(f"asyncrl.cli.{name.replace('-', '_')}")
    code: int = command.main(words[1:])
    return code


def usage() -> str:
    """The help text: every command with its purpose."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        ["usage: asyncrl COMMAND ...", "", *rows, "", "`asyncrl COMMAND --help` says what a command takes."]
    )
