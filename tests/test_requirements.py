"""What the code imports is declared, and what is declared is pinned."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
OPTIONAL = {extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["optional-dependencies"].items()}
OF_SGLANG = {"fastapi", "triton", "zmq"}
"""Imported only where SGLang is, which brings them."""


def names(requirements):
    return {canonicalize_name(requirement.name) for requirement in requirements}


def pins(*paths):
    """By the name of a package."""
    lines = [line for path in paths for line in (ROOT / path).read_text().splitlines() if not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines), "a package is named twice"
    return {canonicalize_name(name): version for name, version in found.items()}


def imported(*folders):
    """Top-level modules of others, by whether they are imported with the module that names them or when it is used."""
    first, later = set(), set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found = {node.module.partition(".")[0]}
            else:
                continue
            (first if node in tree.body else later).update(found)
    own = {"asyncrl", "launch", "bench"} | set(sys.stdlib_module_names)
    return first - own, later - own


def test_what_is_imported_is_declared():
    first, later = imported("asyncrl", "launch")
    packages = packages_distributions()
    required, optional = names(REQUIRED), set().union(*map(names, OPTIONAL.values()))

    def packages_of(module):
        return {canonicalize_name(name) for name in packages.get(module, [module])}

    assert {module for module in first - OF_SGLANG if not packages_of(module) & required} == set()
    assert {module for module in later - OF_SGLANG if not packages_of(module) & (required | optional)} == set()


@pytest.mark.parametrize(
    ("requirements", "files"),
    [
        (REQUIRED + OPTIONAL["test"], ["constraints.txt"]),
        (REQUIRED, ["tests/sglang/requirements.txt", "tests/sglang/requirements-no-deps.txt"]),
        ([next(r for r in OPTIONAL["gpu"] if r.name == "sglang")], ["tests/sglang/requirements-no-deps.txt"]),
    ],
)
def test_what_is_declared_is_pinned(requirements, files):
    pinned = pins(*files)
    for requirement in requirements:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{', '.join(files)} lack {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} and {version}"


def test_the_files_of_the_source_archive_exist():
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    for path in [path for kind, *paths in lines if kind in ("graft", "include") for path in paths]:
        assert (ROOT / path).exists(), path
