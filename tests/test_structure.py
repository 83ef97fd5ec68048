"""What keeps the tree readable: few homes for each heavy import, one direction of imports, docs that match the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.monitor import metrics

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "asyncrl").rglob("*.py"))

HOMES = {
    "ray": {"runtime/actors.py", "runtime/cluster.py", "runtime/remotes.py"},
    "transformers": {"model.py", "pretrained.py", "tiny.py"},
    "tensorboard": {"monitor/sinks.py"},
    "peft": {"training/lora.py"},
}

# Each layer may import itself and the ones before it.
LAYERS = [
    {"types", "algo.method", "algo.own", "algo.presets", "tables", "config", "origin", "rules", "cautions", "transport"}
    | {"sandbox.calls", "sandbox.places", "memory", "cores"}
    | {"receipts", "ipc", "monitor.rows", "monitor.course"}
    | {"durable", "monitor.events", "monitor.plain", "monitor.timeline", "sandbox.confine", "sandbox"}
    | {"envs.swe_runner", "garbage", "loop_watch", "threads", "imports", "quote"},
    {
        "evaluation",
        "algo.advantage",
        "algo.gae",
        "algo.loss",
        "algo.diagnostics",
        "buffer",
        "training.sharding",
        "weights",
        "model",
        "pretrained",
        "tiny",
        "envs.base",
        "monitor.blame",
        "monitor.samples",
        "monitor.sinks",
        "monitor.news",
        "monitor.view",
        "run_folder",
        "staleness",
        "recovery.accounts",
        "recovery.journal",
        "recovery.curriculum",
        "recovery.groups",
        "recovery.watchdog",
    },
    {
        "monitor.terminal",
        "monitor.metrics",
        "recovery.checkpoint",
        "recovery.prompts",
        "training.packing",
        "training.lora",
        "training.critic",
        "training.shaping",
        "training.head",
        "training.scoring",
        "training.forward",
        "engine.base",
    }
    | {"envs.digits", "envs.numbers"}
    | {
        "envs.data",
        "envs.examples",
        "envs.chat",
        "envs.reward_worker",
        "envs.rewards",
        "envs.dataset",
        "envs.gsm8k",
        "envs.mixture",
    }
    | {"envs.reasoning_gym", "envs.multi_turn", "envs.faults"},
    {
        "engine.kv_cache",
        "engine.sampler",
        "engine.stops",
        "engine.embedded",
        "engine.sglang",
        "engine.sglang_calls",
        "engine.draw_kernel",
        "engine.sglang_launch",
        "engine.sglang_loading",
        "engine.sglang_memory",
        "engine.sglang_results",
        "engine.sglang_sampling",
        "engine.sglang_scheduler",
        "engine.sglang_weights",
        "envs.tools",
        "envs.sql",
        "envs.code",
        "envs.swe",
        "envs.gym",
        "rollout",
        "handles",
        "heartbeat",
        "presence",
        "step_row",
        "update_group",
        "pool",
        "training.learner",
        "training.utilization",
        "training.step_metrics",
        "training.warmup",
    },
    {"recovery.guard", "recovery.supervisor"},
    {"system"},
    {"loop"},
    {"runtime.exchange", "runtime.placement", "runtime.stacks", "runtime.parts", "runtime.local"}
    | {"runtime.actors", "runtime.remotes", "runtime.cluster"},
    {"assembly", "runtime.preflight", "runtime.machine", "runtime.preconditions"},
    {"job"},
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_at_home_in_few_files(library):
    users = {
        str(path.relative_to(ROOT / "asyncrl"))
        for path in FILES
        if any(library in name.split(".") for name in imports(path))
    }
    assert users == HOMES[library]


def test_imports_go_one_way():
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for path in FILES:
        name = ".".join(path.relative_to(ROOT / "asyncrl").with_suffix("").parts)
        if name.endswith("__init__"):
            continue
        assert name in level, f"give {name} a layer"
        for imported in imports(path):
            target = imported.removeprefix("asyncrl.")
            if imported.startswith("asyncrl.") and target in level:
                assert level[target] <= level[name], f"{name} imports {target}"


def test_the_configuration_imports_nothing_heavy():
    code = "import sys, asyncrl.config; print({'torch', 'ray', 'transformers'} & set(sys.modules) or 'light')"
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
    assert not shared, "use asyncrl.threads.in_thread"
