"""Where metrics go besides the run folder's JSON lines: TensorBoard, Weights & Biases, a Prometheus endpoint."""

from __future__ import annotations

import importlib
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from asyncrl.config.loading import to_tree
from asyncrl.config.schema import Config
from asyncrl.monitor.plain import inert
from asyncrl.monitor.samples import Row


class Sink(Protocol):
    """One more place for the metrics of a run."""

    def write(self, version: int, row: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/`: scalars in sections by area, an overview, hyper-parameters and text samples."""

    def __init__(
        self,
        folder: Path,
        config: Config | None,
        overview: Mapping[str, Mapping[str, Sequence[str]]],
        first_step: int = 0,
    ) -> None:
        """What an earlier life of the run logged after `first_step` is no longer shown."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._summary: Any = Summary
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._writer.add_custom_scalars(
            {section: {title: ["Multiline", names] for title, names in charts.items()}
             for section, charts in overview.items()}
        )  # fmt: skip
        if config is not None:
            tree = to_tree(config)
            self._writer.add_text("config", f"```json\n{json.dumps(tree, indent=2)}\n```")
            for summary in hparams(flat(tree), {"eval/accuracy": 0.0, "reward/mean": 0.0}):
                self._writer._get_file_writer().add_summary(summary)  # `add_hparams` would open a second run

    def write(self, version: int, row: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        # One event a step: `add_scalar` would make one of every metric, each through the writer's queue.
        self._writer._get_file_writer().add_summary(self._summary(value=values), version)

    def samples(self, version: int, rows: Sequence[Row]) -> None:
        """The texts of some trajectories, as Markdown."""
        parts = [
            f"reward {_told(row['reward'])}, advantage {row['advantage']:+.3f}, {row['finish']}\n\n{inert(row['text'])}"
            for row in rows
        ]
        self._writer.add_text("samples", "\n\n".join(parts), version)

    def close(self) -> None:
        self._writer.close()


def _told(reward: float | None) -> str:
    return "none" if reward is None else f"{reward:.3f}"


def import_wandb(config: Config) -> Any:
    """The package of Weights & Biases, None where none is asked for. Raises `ValueError` if it is not installed."""
    if not config.metrics.wandb:
        return None
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"metrics.wandb is {config.metrics.wandb!r} and the package wandb is not installed: pip install wandb, or "
            "leave metrics.wandb empty"
        ) from error


class WeightsAndBiases:
    """A run in the Weights & Biases project `metrics.wandb`, imported only when asked for."""

    def __init__(self, folder: Path, config: Config) -> None:
        wandb = import_wandb(config)
        self._run = wandb.init(
            project=config.metrics.wandb,
            name=folder.name,
            id=folder.name,
            dir=str(folder),
            config=to_tree(config),
            resume="allow",
        )
        self._run.define_metric("*", step_metric="version")

    def write(self, version: int, row: Mapping[str, float]) -> None:
        # The version is a column and not wandb's own step, which may not go back: an evaluation may arrive after later
        # steps.
        self._run.log({"version": version, **row})

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """The newest value of every metric as text, at http://HOST:PORT/metrics. It has no password, hence loopback."""

    def __init__(self, host: str, port: int, meanings: Mapping[str, str]) -> None:
        """Port 0 takes a free one; `port` tells which. Raises `ValueError` if the address cannot be had."""
        self._values: dict[str, float] = {}
        self.gauges: Callable[[], Mapping[str, float | Mapping[str, float]]] = dict
        """Asked at every scrape, from the server's thread: what is true then, whatever the last step said."""
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == "/metrics"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.end_headers()
                self.wfile.write((sink.page(meanings) if found else "see /metrics\n").encode())

            def log_message(self, format: str, *args: Any) -> None:
                """Scrapes are not news."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ValueError(
                f"metrics.prometheus_port {port} of {host} cannot be opened ({error.strerror}): choose another"
            ) from error
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def write(self, version: int, row: Mapping[str, float]) -> None:
        self._values = {**self._values, **row, "version": float(version)}  # replaced whole: the server reads it

    def page(self, meanings: Mapping[str, str]) -> str:
        """Prometheus text format 0.0.4. Names may have letters, digits and underscores only."""
        lines = []
        for name, value in {**self._values, **self.gauges()}.items():
            metric = "asyncrl_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            lines += [f"# HELP {metric} {_escaped(meanings.get(name, name))}", f"# TYPE {metric} gauge"]
            if isinstance(value, Mapping):
                of_kind = {_escaped(kind).replace('"', '\\"'): count for kind, count in value.items()}
                lines += [f'{metric}{{kind="{kind}"}} {_number(count)}' for kind, count in of_kind.items()]
            else:
                lines.append(f"{metric} {_number(value)}")
        return "".join(f"{line}\n" for line in lines)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    return f"{value:.9g}" if math.isfinite(value) else {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as `section.key`: plain values as they are, others as text."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return values
