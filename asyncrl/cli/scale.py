"""Changes the number of rollout actors of a run in progress.

python launch/scale.py RUN_DIR 6

A run that is resumed starts with the number of its configuration again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from asyncrl.driver.supervisor import request


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument("num_rollout_actors", type=int, metavar="N")
    options = parser.parse_args(arguments)
    try:
        request(options.folder, options.num_rollout_actors)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"asked for {options.num_rollout_actors} rollout actors; the run says when they join or leave")
    return 0


if __name__ == "__main__":
    sys.exit(main())
