"""`asyncrl doctor`, from a clone: the same words."""

import sys

try:
    from asyncrl.cli.doctor import main
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error} for {sys.executable}: run `make .venv/installed` and take .venv/bin/python, or "
        f"`{sys.executable} -m pip install -e .`"
    )

if __name__ == "__main__":
    sys.exit(main())
