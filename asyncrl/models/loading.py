"""Hugging Face models and tokenizers: what a folder holds, loaded and made ready for packed rows."""

from __future__ import annotations

import difflib
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from asyncrl.config.origin import dated_template, template_text
from asyncrl.config.schema import BUILT_IN, Config, ModelConfig
from asyncrl.models import pretrained
from asyncrl.models.pretrained import quiet
from asyncrl.utils.importing import check_folder

try:
    from torch.nn.attention import varlen
except ImportError:  # before torch 2.10
    varlen = None  # type: ignore[assignment]

_VARLEN_OPTIONS = inspect.signature(varlen.varlen_attn).parameters if varlen else {}
_FEWER_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _VARLEN_OPTIONS else {}
"""For fewer key heads than query heads: torch 2.11 takes them as they are, later releases want to be told."""

_VARLEN = "segments"
"""The name under which the library knows `_varlen_attention`."""

_MADE_BY = ("launch/prepare_model.py", "model.path")


def check_model(path: str | Path) -> None:
    """Raises `ValueError` for a path that holds no model, or is nearly the name of a built-in one, before the hub is
    asked, which takes a minute where there is no network."""
    check_folder(path, *_MADE_BY)
    if Path(path).exists():
        if str(path) not in BUILT_IN and not holds_model(Path(path)):
            raise ValueError(
                f"{str(path)!r} holds no model, which is a folder whose config.json has a model_type"
                f"{_contents(path)}: name one that does"
            )
        return
    near = difflib.get_close_matches(str(path).lower(), BUILT_IN, n=1, cutoff=0.85)
    if near and near != [str(path)] and "/" not in str(path):
        raise ValueError(f"there is no model {str(path)!r}: did you mean model.path={near[0]}, which is built in?")


def holds_model(folder: Path) -> bool:
    """Whether this is the folder of a model, or of adapters to one."""
    settings = folder / "config.json"
    described = settings.is_file() and '"model_type"' in settings.read_text()
    return described or (folder / "adapter_config.json").is_file()


def _contents(path: str | Path) -> str:
    """What a folder holds, as part of a sentence; nothing for a name of the hub."""
    if not Path(path).is_dir():
        return ""
    names = sorted(file.name for file in Path(path).iterdir())
    return f" (it has {', '.join(names[:10]) or 'no files'}{', ...' if len(names) > 10 else ''})"


def load_model(
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device,
    attention: str = "sdpa",
    *,
    headless: bool = False,
) -> PreTrainedModel:
    """The causal language model at `path`, in eval mode and without dropout.

    `attention` is a Hugging Face attention implementation; of a `headless` one the output embeddings may be missing.
    Raises `ValueError` when no model can be read from `path`, or not all of it.
    """
    with pretrained.told(path):
        check_model(path)
        model = pretrained.read(path, headless=headless, dtype=dtype, attn_implementation=attention)
        nn.Module.to(model, torch.device(device))  # Its own `to` only adds checks for quantised ones, without types.
        pretrained.check_values(model)
    _remove_dropout(model)
    return model.eval()


def described_model(path: str | Path, attention: str = "sdpa") -> PreTrainedModel:
    """A float32 model with the shapes of that at `path`, on the device "meta": without memory. Raises `ValueError` as
    `load_model` does."""
    quiet()
    try:
        check_model(path)
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model could be loaded from {str(path)!r}: {error}") from error


def empty_model(path: str | Path, attention: str = "sdpa") -> PreTrainedModel:
    """A float32 model like that of `load_model` on the CPU, whose weights and buffers have no values yet.

    Nothing is read or written, so it takes no memory until someone does. Raises `ValueError` as `load_model` does.
    """
    model = described_model(path, attention)
    model.to_empty(device="cpu")
    model.tie_weights()
    _remove_dropout(model)
    return model.eval()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, in order: those that its class says to keep together on one device.

    Raises `ValueError` for a model that names none.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} does not name its decoder layers (_no_split_modules): set learner.num_gpus=1 and "
            "learner.activation_checkpointing=false"
        )
    return layers


def attention_of(config: Any) -> tuple[list[str], int | None]:
    """What a plain causal mask is wrong for: kinds of layers, if one is no attention, all of them; and the length from
    which on attention is windowed, None if it never is."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window: int | None = getattr(config, "sliding_window", None)
    others = kinds - {"full_attention", "sliding_attention"}
    return sorted(kinds) if others else [], window if kinds != {"full_attention"} else None


def rope_limit(model: nn.Module) -> int | None:
    """The longest trajectory whose rotary frequencies are its own; None if they are fixed.

    Beyond it "dynamic" and "longrope" frequencies are chosen by the last position of a whole forward pass: one long
    trajectory moves those of every other that goes through the model with it.
    """
    limits: list[int] = []
    rotary: list[Any] = [module for module in model.modules() if hasattr(module, "rope_type")]
    for module in rotary:
        kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
        for layer, kind in kinds.items():  # by name, where kinds of layers have their own
            if kind == "longrope":
                parameters = module.config.rope_parameters
                limits.append((parameters[layer] if layer else parameters)["original_max_position_embeddings"])
            elif "dynamic" in kind:
                limits.append(module.original_max_seq_len)
    return min(limits, default=None)


def longest_context(config: Any) -> int | None:
    """Positions that the model was made for, rotary scaling of its settings included; None where it names none."""
    settings = getattr(config, "text_config", config)
    most: int | None = getattr(settings, "max_position_embeddings", None)
    rope = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None) or {}
    for part in rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]:
        kind = part.get("rope_type", "default")
        if most is not None and kind not in ("default", "longrope", "llama3"):  # of these it is the scaled number
            most = max(most, int((part.get("original_max_position_embeddings") or most) * (part.get("factor") or 1)))
    return most


def use_attention(model: nn.Module, wanted: str, device: str, *, bfloat16: bool) -> str:
    """Readies a model for packed rows with `wanted` attention: "sdpa" (a dense mask), "varlen" (segments end to end,
    no mask), or "auto", which is varlen where it can be. Returns which of the two it is.

    Raises `ValueError` if "varlen" is wanted and cannot be.
    """
    reason = _no_varlen(model, device, bfloat16)
    _refuse_varlen(wanted, reason)
    if wanted == "sdpa" or reason:
        return "sdpa"
    ALL_ATTENTION_FUNCTIONS.register(_VARLEN, _varlen_attention)
    model.set_attn_implementation(_VARLEN)  # type: ignore[operator]
    return "varlen"


def check_attention(config: Config) -> None:
    """Raises `ValueError` as `use_attention` does, for what shows without a model, before a run has anything. Of the
    GPUs of a cluster that is joined nothing is known here."""
    joins = config.runtime == "cluster" and config.cluster.address is not None
    if config.device == "cpu" or not joins:
        on_gpu = config.device != "cpu" and torch.cuda.device_count() > 0
        reason = _no_kernel("cuda" if on_gpu else "cpu", config.learner.dtype != "float32")
        _refuse_varlen(config.learner.attention, reason)


def _refuse_varlen(wanted: str, reason: str) -> None:
    if wanted == "varlen" and reason:
        raise ValueError(f"learner.attention is 'varlen', which {reason}: set learner.attention=auto")


def _no_varlen(model: nn.Module, device: str, bfloat16: bool) -> str:
    """Why attention over segments cannot be used, or nothing."""
    if reason := _no_kernel(device, bfloat16):
        return reason
    if getattr(model.config, "attn_logit_softcapping", None):
        return "has no cap on attention scores, and the model needs one (attn_logit_softcapping)"
    return ""


def _no_kernel(device: str, bfloat16: bool) -> str:
    """The same, for any model."""
    if device != "cuda":
        return f"needs a GPU, and the learner is on {device!r}"
    if not bfloat16:
        return "needs bfloat16, and learner.dtype is float32"
    if "window_size" not in _VARLEN_OPTIONS:
        return f"needs torch 2.11 or later, and this is {torch.__version__}"
    return ""


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each of the segments that lie end to end in the rows.

    `query` [R, H, L, D], `key` and `value` [R, K, L, D]; `cu_seq_lens_q` int32[s + 1]: where segments start in the
    R * L places, and the end; `max_length_q`: length of the longest. Returns [R, L, H, D].
    """
    del module, attention_mask
    rows, heads, length, size = query.shape
    flat = [x.transpose(1, 2).reshape(rows * length, -1, size).to(torch.bfloat16) for x in (query, key, value)]
    starts, longest = cu_seq_lens_q, max_length_q
    window = (sliding_window - 1 if sliding_window else -1, 0)
    attend: Any = varlen.varlen_attn
    seen = attend(*flat, starts, starts, longest, longest, scale=scaling, window_size=window, **_FEWER_KEYS)
    return seen.view(rows, length, heads, size), None


def load_tokenizer(path: str | Path, settings: ModelConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, with the chat template, its arguments and the date of `settings`. Raises `ValueError`
    when none can be read from there.

    A folder's own `tokenizer.json` is read as it stands: `AutoTokenizer` picks a class by the model's architecture, and
    some of those rebuild the file as byte pairs without bytes, which drop the characters that they do not know.
    """
    quiet()
    reader = PreTrainedTokenizerFast if (Path(path) / "tokenizer.json").is_file() else AutoTokenizer
    try:
        check_folder(path, *_MADE_BY)
        tokenizer = reader.from_pretrained(path)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what some classes make of no files at all
            raise ValueError("no file has a vocabulary")
    except (OSError, ValueError) as error:
        held = _contents(path)
        belongs = f"{held}, where the files of the model's tokenizer belong, too" if held else ""
        raise ValueError(f"no tokenizer could be loaded from {str(path)!r}{belongs}: {error}") from error
    if settings is not None:
        _set_template(tokenizer, settings)
    return tokenizer


def _set_template(tokenizer: Any, settings: ModelConfig) -> None:
    """One place for whoever renders conversations. Arguments of a call win over those that are set here."""
    if settings.chat_template:
        tokenizer.chat_template = template_text(settings.chat_template)
    options = dict(settings.template_args)
    if settings.date and "strftime_now" in str(template := tokenizer.chat_template) and isinstance(template, str):
        options["chat_template"] = dated_template(template, settings.date)  # what is saved has the clock
    if options:
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **options)


def import_gguf(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes the model and tokenizer of a GGUF file as an ordinary folder, dequantised to `dtype`.

    Raises `ValueError` when the file cannot be read, `ImportError` where `gguf` or `accelerate` is missing.
    """
    quiet()
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r}")
    extra = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told otherwise
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **extra)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=dtype)
    dense.load_state_dict(packed.state_dict(), assign=True)
    dense.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _restore_tokenizer(tokenizer)
    dense.config.eos_token_id = dense.generation_config.eos_token_id = tokenizer.eos_token_id
    pretrained.mend_generation(dense)
    dense.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """What reading from GGUF loses: the split into single digits, and which token ends a turn."""
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if "<|im_end|>" in tokenizer.get_vocab():
        tokenizer.eos_token = "<|im_end|>"


def stop_token_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a completion, sorted: the tokenizer's own, those of the generation settings at `path`, and
    the chat template's end of turn, which base models' settings often lack.

    Without such settings they are those of the model's configuration, as where the library generates.
    """
    end = end_of_turn(tokenizer)
    return tuple(sorted(_own_stops(path, tokenizer) | ({end} if end is not None else set())))


def added_stop(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's end of turn, where nothing else makes it a stop token; else empty."""
    end = end_of_turn(tokenizer)
    return "" if end is None or end in _own_stops(path, tokenizer) else str(tokenizer.convert_ids_to_tokens(end))


def _own_stops(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    try:
        settings = GenerationConfig.from_pretrained(path)
    except OSError:  # a model without generation settings
        settings = _settings_of_model(path)
    found: set[int] = set()
    for ids in (settings.eos_token_id, tokenizer.eos_token_id):
        found.update([ids] if isinstance(ids, int) else ids or ())
    return found


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after a reply; None where there is no such one token."""
    if not tokenizer.chat_template:
        return None
    reply = "(the reply of the model)"
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}, {"role": "user", "content": "!"}]
    try:
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    except Exception:  # templates may raise anything, and one that takes other conversations says so with the prompts
        return None
    after = str(text).partition(reply)[2].lstrip()
    first = tokenizer.encode(after, add_special_tokens=False)[:1]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return first[0] if first and first[0] in special else None


def _settings_of_model(path: str | Path) -> GenerationConfig:
    """The generation settings that a model's configuration stands for; empty where there is none."""
    try:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path))
    except (OSError, ValueError):  # a tokenizer alone
        return GenerationConfig()


def _remove_dropout(model: nn.Module) -> None:
    """Dropout in training would make the learner's log-probs differ from the engine's."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            vars(module)["attention_dropout"] = 0.0
