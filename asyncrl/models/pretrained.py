"""Weights of a model's folder: read whole or refused, and what saving them later needs, tried before.

`transformers` fills weights that it does not find with random numbers and warns; here that is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model.")
"""What DDP, torch.compile, FSDP, activation checkpointing and PEFT put into the names of weights."""

_SHOWN = 3


def read(path: str | Path, *, headless: bool = False, **options: Any) -> PreTrainedModel:
    """The causal language model at `path`, with every weight from its files. `headless`: its output embeddings are not
    used, and may be missing.

    Raises `ValueError` for weights that are missing, damaged, quantised or of another shape.
    """
    _refuse_quantised(path)
    quiet()
    try:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"{_damaged_file(Path(path))}: {error}; copy or download it again") from error
    model, found = loaded
    mend_generation(model)
    missing, unused = set(found["missing_keys"]), found["unexpected_keys"]
    if headless:
        missing -= _of_head(model)
    if found["mismatched_keys"]:
        name, stored, needed = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"weights of another shape than config.json says: {len(found['mismatched_keys'])}, such as {name}, "
            f"{list(stored)} in the files and {list(needed)} in the model; take the config.json that was saved with "
            "these weights"
        )
    if missing:
        raise ValueError(_told_missing(missing, unused))
    whole: PreTrainedModel = model
    return whole


def check(path: str | Path, tokenizer: PreTrainedTokenizerBase, scratch: str | Path) -> None:
    """Tries what a run needs of the model at `path` without its values: the names and shapes of its weights, and saving
    everything of a checkpoint but weights to the folder `scratch`. Raises `ValueError` for weights that `read` refuses,
    and for what the library does not save, which would end a run at its first checkpoint.

    The weights of a model of the hub, which are perhaps not here yet, are looked at when they are loaded.
    """
    model = _without_values(path)
    for save in (partial(model.save_pretrained, state_dict={}), tokenizer.save_pretrained):
        try:
            save(scratch)
        except Exception as error:  # each library behind them has kinds of its own
            raise ValueError(
                f"the settings of {str(path)!r} cannot be saved with transformers {transformers.__version__}, and "
                f"every checkpoint has them ({' '.join(str(error).split()):.400}): mend them in the model's folder"
            ) from error


def _without_values(path: str | Path) -> Any:
    with told(path):
        if Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
            return read(path, device_map="meta")
        quiet()
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        with suppress(OSError):  # a model without generation settings
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    mend_generation(model)
    return model


def check_values(model: nn.Module) -> None:
    """Raises `ValueError` for weights that are no finite numbers."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and not all(map(torch.isfinite, torch.aminmax(parameter.detach()))):
            raise ValueError(
                f"the weight {name} has values that are not finite (NaN or infinity): the run that saved it diverged, "
                "or its file is damaged; take an earlier checkpoint, or download it again"
            )


def mend_generation(model: Any) -> None:
    """Settings for sampling without `do_sample` mean sampling; the library reads them and does not save them."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            settings.do_sample = True


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """Errors of reading `path` as a `ValueError` that names it."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"no model could be loaded from {str(path)!r}: {error}") from error


def _refuse_quantised(path: str | Path) -> None:
    """Raises `ValueError` for a folder of weights that were quantised."""
    file = Path(path) / "config.json"
    settings = json.loads(file.read_text()).get("quantization_config") if file.is_file() else None
    if settings:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise ValueError(
            f"its weights are quantised ({method}), and only whole ones are trained and sent: take the model that it "
            "was made from, or dequantise it (launch/prepare_model.py does so for GGUF)"
        )


def _told_missing(missing: Iterable[str], unused: Iterable[str]) -> str:
    names, others = sorted(missing), sorted(unused)
    text = f"{len(names)} weights are in no file of it, such as {', '.join(names[:_SHOWN])}"
    for wrapper in _WRAPPERS:
        if renamed := [name for name in others if wrapper in name and name.replace(wrapper, "") in names]:
            return (
                f"{text}; the files have {renamed[0]}: save them again without {wrapper!r}, as in "
                f"{{name.replace({wrapper!r}, ''): weight for name, weight in weights.items()}}"
            )
    if others:
        return (
            f"{text}; the files have {len(others)} that the model does not, such as {', '.join(others[:_SHOWN])}: "
            "save them under the names of config.json's architecture, or take the config.json that belongs to them"
        )
    return f"{text}: copy or download the missing files, or save the whole model"


def _of_head(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    return {name for name, parameter in model.named_parameters() if head is not None and parameter is head.weight}


def _damaged_file(folder: Path) -> str:
    """Which file of weights cannot be opened, as the subject of a sentence."""
    for file in sorted(folder.glob("*.safetensors")):
        if file.read_bytes()[:12] == b"version http":
            return f"{file} is a pointer of git-lfs, which `git lfs pull` replaces by the weights"
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"{file} is damaged or incomplete ({file.stat().st_size:,} bytes)"
    return f"a file of weights in {folder} is damaged or incomplete"


def quiet() -> None:
    """Nothing of the library's warnings and progress bars: what matters of them is an error here."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
