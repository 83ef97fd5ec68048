"""The tiny models that run everywhere, made in code: a Qwen2 architecture with random weights.

Their tokenizer has 25 single characters, or a token for each byte and a chat template. They are saved as an ordinary
folder that any other loader can read, too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from asyncrl.config.schema import TINY, TINY_BYTES
from asyncrl.models.pretrained import quiet

_PAD, _EOS = "<pad>", "<eos>"
_VOCABULARY = (_PAD, _EOS, *"0123456789", *"=+-*,:", " ", *"msarcg")
_CHAT = (
    "{% for message in messages %}{{ message.role + ':' + message.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def build_tiny(
    folder: str | Path,
    *,
    name: str = TINY,
    num_layers: int = 2,
    hidden_size: int = 128,
    intermediate_size: int = 384,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    init_std: float = 0.05,
    vocab_size: int | None = None,
    tied: bool = True,
    seed: int,
) -> None:
    """Writes a random float32 model and its tokenizer to `folder`; 0.40 M parameters with the defaults.

    `vocab_size` above the tokenizer's is for measurements, as are embeddings that are not `tied` to the head. The same
    arguments give the same weights. The caller's random state is left as it was.
    """
    quiet()
    tokenizer = _byte_tokenizer() if name == TINY_BYTES else _character_tokenizer()
    config = Qwen2Config(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        initializer_range=init_std,
        tie_word_embeddings=tied,
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


def _character_tokenizer() -> PreTrainedTokenizerFast:
    # A word-level vocabulary without an unknown token refuses characters that it lacks; others would drop them.
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(_VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    # The unknown token is never used, but other readers of the folder would add one of their own as token 25.
    return _fast(tokenizer, unk_token=_PAD)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, so that any text can be read and written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([_PAD, _EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, chat_template=_CHAT)


def _fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_EOS, clean_up_tokenization_spaces=False, **special
    )
