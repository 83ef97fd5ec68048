"""The tree stays readable: imports go one way between the folders, heavy libraries have few homes, pages match code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.monitor import metrics

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asyncrl"
FILES = sorted(PACKAGE.rglob("*.py"))

ORDER = [
    {"utils"},
    {"types"},
    {"algo"},
    {"config", "weights"},
    {"models", "envs"},
    {"training", "engines", "recovery"},
    {"runtime", "monitor"},
    {"driver"},
    {"cli"},
]
"""A folder imports itself and those of the sets before its own. The package itself (`__init__`) may import any."""

HOMES = {
    "ray": {"cli/doctor.py", "runtime/ray_actors.py", "runtime/ray_cluster.py", "runtime/ray_handles.py"},
    "transformers": {"models/loading.py", "models/pretrained.py", "models/tiny.py"},
    "tensorboard": {"monitor/sinks.py"},
    "peft": {"training/lora.py"},
}


def imports(path: Path) -> set[str]:
    """Every imported name, dotted: of `from a import b` both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_package_has_two_files_at_its_top():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "types.py"}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders | {"types"} == set().union(*ORDER)


def test_imports_go_one_way_between_folders():
    level = {folder: number for number, folders in enumerate(ORDER) for folder in folders}
    wrong = set()
    for path in FILES:
        folder = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports(path):
            target = name.removeprefix("asyncrl.").partition(".")[0]
            inside = name.startswith("asyncrl.") and target in level
            if folder in level and inside and target != folder and level[target] >= level[folder]:
                wrong.add(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_no_circle_between_modules():
    """Imports at the top of modules, functions aside: those may wait for an optional package."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph = {}
    for name, path in names.items():
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for full in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    found |= {full} & set(names)
        graph[name] = found - {name, "asyncrl"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_at_home_in_few_files(library):
    users = {
        str(path.relative_to(PACKAGE)) for path in FILES if any(library in name.split(".") for name in imports(path))
    }
    assert users == HOMES[library]


def test_the_configuration_imports_nothing_heavy():
    code = "import sys, asyncrl.config.loading; print({'torch', 'ray', 'transformers'} & set(sys.modules) or 'light')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "light\n"


def test_the_metrics_page_is_the_table():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == metrics.page(), "run `make docs`"


def test_work_of_our_own_runs_in_threads_of_our_own():
    """An environment may fill or shut down those that asyncio shares out."""
    shared = [
        str(path.relative_to(ROOT))
        for path in FILES
        if "await asyncio.to_thread" in (text := path.read_text()) or "run_in_executor(None" in text
    ]
    assert not shared, "use asyncrl.utils.threads.in_thread"
