"""The command: its words, its help, and what it imports before it knows which command is asked for."""

import subprocess
import sys

import pytest

from asyncrl import __version__, cli


def test_every_command_has_a_module_and_its_own_name_in_its_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["asyncrl"])
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            cli.main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: asyncrl {name} ")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_help_names_every_command(words, capsys):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"asyncrl {__version__}\n"


def test_another_word_is_refused_with_the_commands(capsys):
    assert cli.main(["trian"]) == 2
    told = capsys.readouterr().err
    assert "'trian'" in told
    assert "  train " in told


def test_the_help_imports_nothing_heavy():
    heavy = "{'torch', 'ray', 'msgspec'} & set(sys.modules)"
    code = f"import sys; from asyncrl.cli import main; main(['--help']); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
