"""TRL's `GRPOTrainer` beside asyncrl: same model, task, batch, samples, optimizer and number of steps, same machine.

    python -m venv .venv-trl && .venv-trl/bin/pip install -r bench/peers/requirements-trl.txt
    python bench/peers/trl_grpo.py [CONFIG.toml] --trl-python .venv-trl/bin/python [--model PATH] [--seeds 2]

Runs take turns, a pair a seed, each in processes of its own. TRL is set to asyncrl's objective where it has one: token
mean, no division by the standard deviation, no KL, the same entropy bonus, Adam and learning rate. It gets the same
prompts in the same order and the same reward function; what remains is that its data are never stale. It runs in one
process with `--trl-threads` threads and generates with transformers; asyncrl runs its actors and its learner with the
threads of the configuration. Start-up is left out on both sides. TRL's clock also stops for its evaluations, asyncrl's
goes on beside them. The first `--skip` steps do not count for the rates. Prints a table, appends to `trl_grpo.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml | section.key=value")
    parser.add_argument("--trl-python", help="interpreter of the environment that holds TRL")
    parser.add_argument("--trl-threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", help="short for model.path=MODEL")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    files = [word for word in options.words if "=" not in word]
    options.config = files[0] if files else str(ROOT / "configs" / "largest_digit.toml")
    options.words = [word for word in options.words if "=" in word]
    if options.worker:
        options.worker.with_suffix(".out.json").write_text(
            json.dumps(train_trl(json.loads(options.worker.read_text())))
        )
        return
    if not options.trl_python:
        parser.error("--trl-python is needed: the interpreter of the environment that holds TRL")
    compare(options)


def compare(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    words = [*options.words, f"num_steps={options.steps}", f"run_dir={options.out.absolute()}", "checkpoint.every=0"]
    words += [f"model.path={options.model}"] if options.model else []
    print("| | seed | s a step, median | samples/s | step to 0.9 | s to 0.9 | final held-out |")
    print("|---|---|---|---|---|---|---|")
    ratios, said = [], []
    for seed in range(options.seeds):
        results = [
            run_asyncrl(options.config, [*words, f"seed={seed}"]),
            run_trl(options.config, [*words, f"seed={seed}"], options),
        ]
        for result in results:
            result.update(summary(result, options.skip))
            with (options.out / "trl_grpo.jsonl").open("a") as file:
                file.write(json.dumps({"seed": seed, **result}) + "\n")
            print(line(seed, result), flush=True)
        said.append(f"asyncrl, seed {seed}: {results[0]['said']}")
        ratios.append(results[0]["samples_per_s"] / results[1]["samples_per_s"])
    print(*said, sep="\n")
    print(f"samples/s, asyncrl over TRL, pair by pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


def run_asyncrl(config: str, words: list[str]) -> dict[str, Any]:
    """One run of the main job; the curve's seconds are those of the steps before each evaluated version."""
    from asyncrl.monitor import metrics

    command = [sys.executable, str(ROOT / "launch" / "run.py"), config, *words]
    done = finish(command, os.environ)
    folder = Path(re.findall(r"run folder: (\S+)", done)[-1])
    rows, settings = metrics.read(folder), json.loads((folder / "config.json").read_text())
    steps = [row["time/total_s"] for row in rows if "time/total_s" in row]
    curve = [
        (int(row["version"]), row["eval/accuracy"], sum(steps[: int(row["version"])]))
        for row in rows
        if "eval/accuracy" in row
    ]
    samples = settings["learner"]["groups_per_step"] * settings["rollout"]["group_size"]
    found = metrics.verdict(folder)
    said = f"{found.sentence} {found.bound}" if found else ""
    return {"system": "asyncrl", "samples_per_step": samples, "step_s": steps, "curve": curve, "said": said}


def run_trl(path: str, words: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The same run by TRL, in its own environment, which reads its settings from a file."""
    from asyncrl.config import loading as configuration
    from asyncrl.training.warmup import prepare

    config = configuration.load(path, words)
    settings = configuration.to_tree(config) | {"initial": str(prepare(config, quiet=True))}
    file = options.out / f"trl-{config.seed}.json"
    file.write_text(json.dumps(settings))
    threads = {"OMP_NUM_THREADS": str(options.trl_threads), "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    finish([options.trl_python, __file__, "--worker", str(file)], os.environ | threads)
    result: dict[str, Any] = json.loads(file.with_suffix(".out.json").read_text())
    return result


def finish(command: list[str], environment: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def summary(result: dict[str, Any], skip: int) -> dict[str, Any]:
    steps = sorted(result["step_s"][skip:])
    reached = next(((step, seconds) for step, accuracy, seconds in result["curve"] if accuracy >= 0.9), (None, None))
    return {
        "median_step_s": steps[len(steps) // 2],
        "samples_per_s": result["samples_per_step"] * len(steps) / sum(steps),
        "step_to_0.9": reached[0],
        "s_to_0.9": reached[1],
        "final": result["curve"][-1][1],
    }


def line(seed: int, result: dict[str, Any]) -> str:
    seconds = "-" if result["s_to_0.9"] is None else f"{result['s_to_0.9']:.1f}"
    return (
        f"| {result['system']} | {seed} | {result['median_step_s']:.3f} | {result['samples_per_s']:.0f} | "
        f"{result['step_to_0.9'] or '-'} | {seconds} | {result['final']:.3f} |"
    )


def train_trl(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs in TRL's environment: `GRPOTrainer` on the prompts and rewards of the environment named in `settings`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    from asyncrl.envs.base import load_env

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer = AutoTokenizer.from_pretrained(settings["initial"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(settings["initial"], dtype=torch.float32)
    env = load_env(settings["env"]["path"], tokenizer, settings["env"]["args"])
    num_prompts = settings["num_steps"] * settings["learner"]["groups_per_step"]
    prompts = list(islice(env.prompts("train", settings["seed"]), num_prompts))
    heldout = list(islice(env.prompts("heldout", 0), settings["eval"]["num_prompts"]))

    def reward(completion_ids: Sequence[Sequence[int]], number: Sequence[int], **_: Any) -> list[float]:
        return [
            score(env, prompts[n], ids, tokenizer.eos_token_id) for n, ids in zip(number, completion_ids, strict=True)
        ]

    def evaluate() -> float:
        longest = max(len(prompt.token_ids) for prompt in heldout)
        padded = [[tokenizer.pad_token_id] * (longest - len(p.token_ids)) + list(p.token_ids) for p in heldout]
        inputs = torch.tensor(padded, device=model.device)
        mask = torch.tensor([[0] * (longest - len(p.token_ids)) + [1] * len(p.token_ids) for p in heldout])
        with torch.no_grad():
            made = model.generate(
                input_ids=inputs,
                attention_mask=mask.to(model.device),
                do_sample=False,
                max_new_tokens=settings["rollout"]["max_new_tokens"],
            )[:, longest:].tolist()
        end = tokenizer.eos_token_id
        replies = [ids[: ids.index(end) + 1] if end in ids else ids for ids in made]
        return sum(score(env, p, ids, end) for p, ids in zip(heldout, replies, strict=True)) / len(heldout)

    rows = [{"prompt": tokenizer.decode(list(p.token_ids)), "number": n} for n, p in enumerate(prompts)]
    clock = step_clock(evaluate, settings["eval"]["every"])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl_arguments(settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    samples = settings["learner"]["groups_per_step"] * settings["rollout"]["group_size"]
    return {"system": "TRL", "samples_per_step": samples, "step_s": clock.step_s, "curve": clock.curve}


def trl_arguments(settings: dict[str, Any]) -> Any:
    """asyncrl's settings in TRL's names."""
    import torch
    from trl import GRPOConfig

    rollout, learner = settings["rollout"], settings["learner"]
    return GRPOConfig(
        output_dir=str(Path(settings["run_dir"]) / "trl-output"),
        seed=settings["seed"],
        max_steps=settings["num_steps"],
        per_device_train_batch_size=learner["groups_per_step"] * rollout["group_size"],
        num_generations=rollout["group_size"],
        max_completion_length=rollout["max_new_tokens"],
        temperature=rollout["temperature"],
        loss_type="dapo",  # the token mean
        scale_rewards="none",
        beta=0.0,
        entropy_coef=settings["algorithm"]["loss"].get("entropy_bonus", 0.0),
        learning_rate=learner["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=learner["warmup_steps"],
        adam_beta1=learner["betas"][0],
        adam_beta2=learner["betas"][1],
        weight_decay=learner["weight_decay"],
        max_grad_norm=learner["max_grad_norm"],
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        logging_steps=settings["num_steps"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def step_clock(evaluate: Any, every: int) -> Any:
    """A callback with the seconds of every step, and the held-out accuracy every so many steps, which is not timed."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.step_s: list[float] = []
            self.curve: list[tuple[int, float, float]] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.curve.append((0, evaluate(), 0.0))
            self._last = time.monotonic()

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            self.step_s.append(time.monotonic() - self._last)
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.curve.append((state.global_step, evaluate(), sum(self.step_s)))
            self._last = time.monotonic()

    return StepClock()


def score(env: Any, prompt: Any, token_ids: Sequence[int], end: int) -> float:
    """The environment's own reward for a reply that was generated elsewhere."""
    import numpy as np

    from asyncrl.types import Completion

    zeros = np.zeros(len(token_ids))
    finish = "stop" if token_ids and token_ids[-1] == end else "length"
    reply = Completion(np.asarray(token_ids, np.int32), zeros.astype(np.float32), zeros.astype(np.int32), finish)

    async def generate(_context: Sequence[int]) -> Completion:
        return reply

    return float(asyncio.run(env.play(prompt, generate)).reward)


if __name__ == "__main__":
    main()
