"""The initial checkpoint of a run: a model made in code or loaded, after an optional supervised warm-up. Cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from asyncrl.config import cores
from asyncrl.config import out_of_memory as memory
from asyncrl.config.origin import data_digest
from asyncrl.config.schema import BUILT_IN, Config
from asyncrl.envs.base import Env, load_env
from asyncrl.models.loading import check_model, load_model, load_tokenizer
from asyncrl.models.tiny import build_tiny
from asyncrl.utils import durable
from asyncrl.utils.importing import told


def prepare(config: Config, *, quiet: bool = False) -> Path:
    """The folder of the weights that version 0 stands for, as a path or a Hugging Face id.

    Made once for each combination of the settings that it depends on, each state of the files in the folder that
    `model.path` names, and the contents of data files that `env.args` names; one that is damaged is made again. A model
    of the hub is known by its id, an environment by its path: where its code has changed, remove `run_dir`/cache.
    """
    check_model(config.model.path)
    if config.model.path not in BUILT_IN and config.warmup.num_steps == 0:
        return Path(config.model.path)
    folder = Path(config.run_dir) / "cache" / _key(config)
    if folder.exists():
        if (problem := _damage_of(folder)) is None:
            return folder
        print(f"{folder} is damaged ({problem}): it is made again", file=sys.stderr)
    try:
        with suppress(FileExistsError):
            durable.make_folder(folder.parent)
    except OSError as error:
        raise ValueError(f"run_dir {config.run_dir!r} cannot be written to: {error}") from error
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        _make(partial, config, quiet=quiet)
        durable.seal(partial)
        if not folder.exists() or _damage_of(folder):  # or another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            durable.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _key(config: Config) -> str:
    """A name for all that a prepared model depends on. What a run does without is no part of it, so that the models of
    earlier versions are found."""
    model: dict[str, Any] = {"path": config.model.path, "num_layers": config.model.num_layers}
    parts = [config.seed, model, config.env.path, config.env.args, config.warmup, _state_of(Path(config.model.path))]
    if config.warmup.num_steps:
        if data := data_digest(config.env.args):
            parts.append(data)
        names = ["chat_template", "template_args"]
        if _asks_for_date(config):
            names.append("date")
        model |= {name: value for name in names if (value := getattr(config.model, name))}
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _asks_for_date(config: Config) -> bool:
    if config.model.path in BUILT_IN and not config.model.chat_template:
        return False
    template = config.model.chat_template or load_tokenizer(config.model.path).chat_template
    return "strftime_now" in str(template)


def _damage_of(folder: Path) -> str | None:
    """What is wrong with a cached model. One of an earlier version has no manifest and is opened instead: made again,
    it could differ in its last bits from what adapters were trained on."""
    if (folder / durable.MANIFEST).exists():
        return durable.damage(folder)
    if not (folder / "config.json").exists():
        return "it has no config.json"
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".json":
                msgspec.json.decode(file.read_bytes())
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except (OSError, msgspec.MsgspecError, SafetensorError) as error:
            return f"{file.name}: {error}"
    return None


def _make(folder: Path, config: Config, *, quiet: bool) -> None:
    source = Path(config.model.path)
    if config.model.path in BUILT_IN:
        source = folder
        build_tiny(folder, name=config.model.path, num_layers=config.model.num_layers, seed=config.seed)
    if config.warmup.num_steps:
        tokenizer = load_tokenizer(str(source), config.model)
        env = load_env(config.env.path, tokenizer, config.env.args)
        model = load_model(str(source), dtype=torch.float32, device=_device(config))
        warm_up(model, env, config, quiet=quiet)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()  # the actors need the room; nothing happens without a GPU


def _state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change of each file: to hash gigabytes may take longer than the steps."""
    if not folder.is_dir():
        return []
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def warm_up(model: nn.Module, env: Env, config: Config, *, quiet: bool) -> None:
    """Supervised steps on the environment's demonstrations, in place. The loss is on the replies only.

    Every token of a batch weighs the same, in however many parts of `warmup.micro_batch_size` it is worked off. On a
    GPU the forward pass is in bfloat16.
    """
    if not hasattr(env, "demonstrations"):
        raise ValueError(
            f"warmup.num_steps is {config.warmup.num_steps}, but {config.env.path} has no demonstrations(); "
            "set warmup.num_steps=0 or add the method (see asyncrl.envs.base.Teacher)"
        )
    torch.set_num_threads(cores.here(config).learner)
    device = next(model.parameters()).device
    demonstrations = _shown(env, config.seed)
    smaller = f"lower warmup.micro_batch_size ({config.warmup.micro_batch_size})"
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.warmup.learning_rate, betas=(0.9, 0.95), weight_decay=0)
    for _ in track(range(config.warmup.num_steps), description="warm-up", disable=quiet):
        optimizer.zero_grad(set_to_none=True)
        pairs = list(islice(demonstrations, config.warmup.batch_size))
        num_tokens = sum(len(reply) for _, reply in pairs)
        for start in range(0, len(pairs), config.warmup.micro_batch_size):
            input_ids, labels = _collate(pairs[start : start + config.warmup.micro_batch_size])
            with memory.told("the warm-up", [smaller, "take a smaller model"]):
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = model(input_ids=input_ids.to(device), use_cache=False).logits[:, :-1]
                targets = labels[:, 1:].to(device)
                total = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
                (total / num_tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _shown(env: Any, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    named = f"{type(env).__name__}.demonstrations()"
    with told(named):
        yield from env.demonstrations(seed)
    raise ValueError(f"{named} ended, and the warm-up wants more: have it begin again, without end")


def _device(config: Config) -> torch.device:
    """The first GPU, where the run may use one: the actors start only after the warm-up."""
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _collate(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Input ids and labels, int64[pairs, longest], padded on the right.

    Causal attention never sees the padding, and labels of -100 carry no loss.
    """
    count, length = len(pairs), max(len(prompt) + len(reply) for prompt, reply in pairs)
    input_ids = torch.zeros(count, length, dtype=torch.long)
    labels = torch.full((count, length), -100)
    for row, (prompt, reply) in enumerate(pairs):
        end = len(prompt) + len(reply)
        input_ids[row, :end] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : end] = torch.tensor(reply)
    return input_ids, labels
