"""Evaluates a model or a run on its own: mean reward, pass@k and intervals on held-out prompts.

    python launch/evaluate.py MODEL_OR_RUN [CONFIG.toml] [--env MODULE:CLASS] [--n 4] [section.key=value ...]

MODEL_OR_RUN is a Hugging Face id or folder, or a run folder: then its configuration and newest checkpoint are taken.
--n 4 is four attempts at each prompt, sampled at temperature 1, or at eval.temperature=T; --n 1 is one greedy attempt;
--n 1,4 is both, one after the other on one engine; without --n it is as the configuration says, by default one, greedy.
The engine is the embedded one, on a GPU or a CPU, or SGLang with rollout.engine=sglang.
Without a configuration a completion has 512 tokens; rollout.max_new_tokens=N is another budget. --output FILE also
writes the result as JSON, with every prompt's rewards; of several, a list.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from asyncrl.config import loading as configuration
from asyncrl.config.schema import BUILT_IN, Config
from asyncrl.envs.attempt import EnvFault
from asyncrl.monitor.plain import plain
from asyncrl.utils import settings_text as tables
from asyncrl.utils.importing import LOCAL, runs_near
from asyncrl.utils.quote import LONGEST, cut

if TYPE_CHECKING:
    from asyncrl.runtime.rollout_worker import Attempts, Rollout
    from asyncrl.types import Prompt

_MAX_NEW_TOKENS = 512
_OFF = ["warmup.num_steps=0", "rollout.top_p=1", "rollout.top_k=0"]
"""Settings of training alone, whose rules an evaluation need not keep; `eval.top_p` is its own."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        check_output(options.output)
        results = evaluate_newest(options)
    except (ValueError, EnvFault) as error:
        print(f"error: {plain(cut(str(error), LONGEST))}", file=sys.stderr)
        return 2
    print(plain("\n\n".join(map(report, results))))
    if options.output:  # after the results were printed: they are not lost if it cannot be written
        options.output.write_text(json.dumps(results if len(results) > 1 else results[0], indent=2) + "\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = tables.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_OR_RUN")
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | section.key=value")
    parser.add_argument("--env", metavar="MODULE:CLASS", help="short for env.path=MODULE:CLASS")
    parser.add_argument(
        "--n",
        type=counts,
        default=[],
        metavar="N[,N]",
        help="attempts at each prompt: 1 is greedy, more are sampled at temperature 1, or at eval.temperature=T",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON, too")
    return parser.parse_intermixed_args(arguments)


def counts(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"at least 1 attempt at each prompt, got {text}")
    return numbers


def check_output(file: Path | None) -> None:
    """Raises `ValueError` for a file that could not be written, before the evaluation, which takes long."""
    if file and file.is_dir():
        raise ValueError(f"--output {file} is a folder: name a file, such as {file / 'result.json'}")
    if file and not file.absolute().parent.is_dir():
        raise ValueError(f"--output {file}: there is no folder {file.absolute().parent}; make it")


def evaluate_newest(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What `evaluate` gives for the command line; of a run in progress, whose checkpoints come and go, once more with
    the newest if the one that was chosen is gone before it is read."""
    config = resolve(options)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(evaluate(config, options.n))
        except ValueError:
            chosen = Path(config.model.path)
            if chosen.exists() or Path(options.model) not in chosen.parents:
                raise
        newer = resolve(options)
        print(f"the run took {chosen} away meanwhile: {newer.model.path} is evaluated", file=sys.stderr)
        return runner.run(evaluate(newer, options.n))


def resolve(options: argparse.Namespace) -> Config:
    """The configuration that the command line asks for, with the weights to evaluate as `model.path`."""
    from asyncrl.recovery import checkpoint

    file: str | Path | None
    file, words = tables.split(options.words)
    run, model = Path(options.model), options.model
    if (run / "metrics.jsonl").exists():
        if file:
            raise ValueError(f"{run} is a run, which brings its own configuration, and {file} is given: leave one out")
        file, model = run / "config.json", str(checkpoint.latest(run / "checkpoints"))
    else:
        check_named(model)
    if options.env:
        words = tables.agreed(words, f"--env {options.env}", f"env.path={options.env}")
    asked = []
    if options.n:
        most = max(options.n)
        flag = f"--n {','.join(map(str, options.n))}"
        words = tables.agreed(words, flag, f"eval.num_samples={most}")
        if most > 1:
            asked.append("eval.temperature=1")
        else:
            words = tables.agreed(words, flag, "eval.temperature=0")
    if file is None:
        asked.append(f"rollout.max_new_tokens={_MAX_NEW_TOKENS}")
    return configuration.load(file, [f"model.path={model}", *_OFF, *asked, *words])


def check_named(name: str) -> None:
    """Raises `ValueError` for a path that holds no model, before the hub is asked for a model of that name."""
    from asyncrl.models import loading as model

    path = Path(name)
    if name in BUILT_IN:
        return
    if path.exists() and not model.holds_model(path):
        raise ValueError(
            f"{name} is neither a model (its config.json has model_type) nor a run (it has metrics.jsonl): name the "
            "folder of one, or an id of the hub"
        )
    if not path.exists() and (name.startswith(LOCAL) or name.count(os.sep) > 1):
        raise ValueError(
            f"there is no folder {name}, seen from {Path.cwd()}: name that of a model or of a run, or an id of the "
            f"hub; {runs_near(path)}"
        )
    model.check_model(name)


async def evaluate(config: Config, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Plays held-out prompts, eval.num_prompts at most, on one engine in this process: metrics, each prompt's rewards.

    Once for each of the `numbers` of attempts; with none, as the configuration says.
    """
    from asyncrl.envs.base import heldout_prompts, load_env, no_skill, pass_mark
    from asyncrl.models.loading import load_tokenizer
    from asyncrl.runtime.build import build_rollout
    from asyncrl.training.warmup import prepare

    folder = str(prepare(config))
    env = load_env(config.env.path, load_tokenizer(folder, config.model), config.env.args)
    mark = pass_mark(env, config.eval.pass_reward)
    prompts = heldout_prompts(env, config.eval.num_prompts)
    baselines = no_skill(env, prompts) if config.eval.baseline else {}
    facts = {"no_skill": baselines, "skipped_rows": dict(getattr(env, "skipped", {}))}
    rollout = await build_rollout(config, folder, placement_here(config))
    usual = rollout.attempts
    greedy = replace(usual, num_samples=1, sampling=replace(usual.sampling, temperature=0.0))
    asked = [greedy if n == 1 else replace(usual, num_samples=n) for n in numbers] or [usual]
    try:
        return [facts | await _play(config, rollout, prompts, attempts, mark) for attempts in asked]
    finally:
        await rollout.close()


async def _play(
    config: Config, rollout: Rollout, prompts: list[Prompt], attempts: Attempts, mark: float | None
) -> dict[str, Any]:
    from asyncrl.monitor.scores import summarize
    from asyncrl.runtime.rollout_worker import scored

    begin = time.monotonic()
    groups, faults = scored(await rollout.evaluate(prompts, attempts))
    seconds = time.monotonic() - begin
    return {
        "model": config.model.path,
        "env": config.env.path,
        "env_args": config.env.args,
        "num_prompts": len(prompts),
        "num_samples": attempts.num_samples,
        "temperature": attempts.sampling.temperature,
        "tokens_per_s": sum(length for group in groups for length in group.lengths) / seconds,
        "total_s": seconds,
        "metrics": summarize(groups, 0, mark, [fault.failures for fault in faults]),
        "first_fault": str(faults[0]) if faults else None,
        "prompts": [{"id": group.prompt.id, "rewards": [*map(none_or, group.rewards)]} for group in groups],
    }


def none_or(reward: float) -> float | None:
    """JSON has no nan, which is the reward of an attempt that cannot be scored."""
    return None if math.isnan(reward) else reward


def placement_here(config: Config) -> Any:
    """The GPUs that this process sees, or the CPU."""
    import torch

    from asyncrl.runtime.placement import Placement

    gpus = config.rollout.tensor_parallel_size if config.device != "cpu" and torch.cuda.is_available() else 0
    return Placement("cuda" if gpus else "cpu", 0, gpus, "gloo")


def report(result: dict[str, Any]) -> str:
    """The result as a few lines."""
    metrics = result["metrics"]
    lines = [
        f"{result['model']} on {result['env']}: {result['num_prompts']} prompts x {result['num_samples']}, "
        f"temperature {result['temperature']:g}",
        f"mean reward  {metrics['eval/accuracy']:.4f}  ({metrics['eval/low']:.4f} to {metrics['eval/high']:.4f}, 95 %)",
    ]
    for name, value in metrics.items():
        if name.startswith("eval/pass@"):
            lines.append(f"{name.removeprefix('eval/'):<12} {value:.4f}")
    if "eval/pass@1" not in metrics:
        lines.append("pass@k       none: no reward counts as passed; eval.pass_reward=R names one")
    lines += [f"no skill     {score:.4f}  ({name})" for name, score in result["no_skill"].items()]
    lines += [f"skipped rows of the data: {count}, {reason}" for reason, count in result["skipped_rows"].items()]
    if failures := metrics["eval/failures"]:
        lines.append(f"failures     {failures:.0f} attempts were spoilt by the environment and made again")
    if unscored := metrics["eval/unscored"]:
        lines.append(f"left out     {unscored:.0f} prompts without a score; the first: {result['first_fault']}")
    lines.append(f"truncated    {metrics['eval/truncated']:.4f}")
    if metrics["eval/truncated"] == 1:
        lines[-1] += "  every attempt ran out of tokens: raise rollout.max_new_tokens"
    lines.append(f"mean length  {metrics['eval/mean_length']:.1f} tokens, {result['tokens_per_s']:.0f} tokens/s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
