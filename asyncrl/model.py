"""Hugging Face models and tokenizers: the only file that imports `transformers`.

It loads what a folder holds, and it makes the tiny model that runs everywhere: a Qwen2 architecture with random
weights and a tokenizer of 25 single characters, saved as an ordinary folder that any other loader can read too.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TINY = "tiny"
"""The model name that stands for `build_tiny`."""

_PAD, _EOS = "<pad>", "<eos>"
_VOCABULARY = (_PAD, _EOS, *"0123456789", *"=+-*,:", " ", *"msarcg")


def build_tiny(
    folder: str | Path,
    *,
    num_layers: int = 2,
    hidden_size: int = 128,
    intermediate_size: int = 384,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    init_std: float = 0.05,
    seed: int,
) -> None:
    """Writes a random float32 model and its character tokenizer to `folder`; 0.40 M parameters with the defaults.

    The same arguments give the same weights. The caller's random state is left as it was.
    """
    _quiet()
    tokenizer = _character_tokenizer()
    config = Qwen2Config(
        vocab_size=len(_VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        initializer_range=init_std,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
    # Only the generation settings name the pad token: in the model's own it would pin that embedding to zero.
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(
    path: str | Path, dtype: torch.dtype, device: str | torch.device, attention: str = "sdpa"
) -> PreTrainedModel:
    """The causal language model at `path`, in eval mode and without dropout.

    `attention` is a Hugging Face attention implementation. Raises `ValueError` when no model can be read from `path`.
    """
    _quiet()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model could be loaded from {str(path)!r}: {error}") from error
    _remove_dropout(model)
    nn.Module.to(model, torch.device(device))  # Its own `to` only adds checks for quantised weights, and has no types.
    return model.eval()


def empty_model(path: str | Path, attention: str = "sdpa") -> PreTrainedModel:
    """A float32 model like that of `load_model` on the CPU, whose weights and buffers have no values yet.

    Nothing is read or written, so it takes no memory until someone does. Raises `ValueError` as `load_model` does.
    """
    _quiet()
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model could be loaded from {str(path)!r}: {error}") from error
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


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`. Raises `ValueError` when none can be read from there.

    A folder's own `tokenizer.json` is read as it stands: `AutoTokenizer` picks a class by the model's architecture, and
    some of those rebuild the file as byte pairs without bytes, which drop the characters that they do not know.
    """
    _quiet()
    reader = PreTrainedTokenizerFast if (Path(path) / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return reader.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {str(path)!r}: {error}") from error


def import_gguf(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes the model and tokenizer of a GGUF file as an ordinary folder, dequantised to `dtype`.

    Raises `ValueError` when the file cannot be read, `ImportError` where `gguf` or `accelerate` is missing.
    """
    _quiet()
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
    """The tokens that end a completion: those of the generation settings at `path` and the tokenizer's own, sorted."""
    try:
        settings = GenerationConfig.from_pretrained(path)
    except OSError:  # a model without generation settings
        settings = GenerationConfig()
    found: set[int] = set()
    for ids in (settings.eos_token_id, tokenizer.eos_token_id):
        found.update([ids] if isinstance(ids, int) else ids or ())
    return tuple(sorted(found))


def _character_tokenizer() -> PreTrainedTokenizerFast:
    # A word-level vocabulary without an unknown token refuses characters that it lacks; others would drop them.
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(_VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        # Never used, but other readers of the folder would add one of their own as token 25.
        unk_token=_PAD,
        clean_up_tokenization_spaces=False,
    )


def _remove_dropout(model: nn.Module) -> None:
    """Dropout in training would make the learner's log-probs differ from the engine's."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            vars(module)["attention_dropout"] = 0.0


def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
