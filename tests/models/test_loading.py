"""The tiny model and its tokenizer, and what loading says when it cannot."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.config import loading as configuration
from asyncrl.config.schema import Config, ModelConfig
from asyncrl.models.loading import check_attention, empty_model, load_model, load_tokenizer, stop_token_ids
from asyncrl.models.tiny import build_tiny
from asyncrl.training.warmup import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    build_tiny(path, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def load(folder, dtype=torch.float32):
    return load_model(folder, dtype=dtype, device="cpu")


def test_the_tiny_model_is_what_it_says(folder, tokenizer):
    model = load(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 397_568
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer) == 25
    assert model.config.rope_parameters["rope_theta"] == 1e4
    assert not model.training
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert stop_token_ids(folder, tokenizer) == (tokenizer.eos_token_id,)


def test_the_seed_decides_the_weights_and_nothing_else_is_touched(folder, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_tiny(tmp_path / "same", seed=0)
    build_tiny(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (load(path).state_dict() for path in (folder, tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_sizes_can_be_chosen(tmp_path):
    build_tiny(tmp_path, num_layers=1, hidden_size=32, intermediate_size=64, num_heads=2, num_kv_heads=1, seed=0)
    model = load(tmp_path, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (1, 32)


def test_encoding_keeps_every_character_and_adds_none(tokenizer):
    text = "m4071=s12, 3:a+-*rcg"
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode("12"), tokenizer.eos_token_id], skip_special_tokens=True) == "12"


def test_an_unknown_character_is_an_error(tokenizer):
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("q1z")


def test_other_readers_load_the_folder(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert len(tokenizer) == 25
    assert tokenizer.decode(tokenizer.encode("m4071=")) == "m4071="


def test_stop_tokens_are_those_of_the_folder_and_of_the_tokenizer(folder, tokenizer, tmp_path):
    settings = json.loads((folder / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [7, 3]}))
    assert stop_token_ids(tmp_path, tokenizer) == (1, 3, 7)
    (tmp_path / "generation_config.json").unlink()
    assert stop_token_ids(tmp_path, tokenizer) == (1,)


@pytest.mark.parametrize(("ids", "expected"), [([7, 3], (1, 3, 7)), (5, (1, 5)), (None, (1,))])
def test_without_generation_settings_stop_tokens_are_those_of_the_model(folder, tokenizer, tmp_path, ids, expected):
    model = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(model | {"eos_token_id": ids}))
    assert stop_token_ids(tmp_path, tokenizer) == expected


@pytest.mark.parametrize("read", [load, load_tokenizer], ids=["model", "tokenizer"])
def test_an_unreadable_path_is_named(tmp_path, read):
    with pytest.raises(ValueError, match=f"could be loaded from '{tmp_path}'"):
        read(tmp_path)


def test_a_folder_without_a_tokenizer_is_told_with_what_it_has(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # of which a tokenizer without words is made
    with pytest.raises(ValueError, match=r"it has config\.json\), where the files .* tokenizer belong.*no file has"):
        load_tokenizer(tmp_path)


@pytest.mark.timeout(10)  # the hub is not asked
@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("tinyy", "no model 'tinyy': did you mean model.path=tiny,"),
        ("Tiny_Bytes", "no model 'Tiny_Bytes': did you mean model.path=tiny-bytes,"),
        (
            "here",
            r"'here' holds no model, .* config\.json has a model_type \(it has config.json, run.json\): name",
        ),
    ],
)
def test_what_is_no_model_is_told_before_the_hub_is_asked(path, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("config.json", "run.json"):  # as of a run
        (tmp_path / "here" / name).write_text('{"seed": 0}')
    with pytest.raises(ValueError, match=told):
        prepare(Config(model=ModelConfig(path=path)))


@pytest.mark.timeout(10)  # the hub is not asked
@pytest.mark.parametrize("read", [load, empty_model, load_tokenizer])
@pytest.mark.parametrize("path", ["models/missing", "../missing", "/missing"])
def test_a_folder_that_is_not_there_is_told_with_what_makes_one(read, path):
    told = rf"there is no folder '{path}', seen from .* launch/prepare_model\.py`, or name another in model\.path"
    with pytest.raises(ValueError, match=told):
        read(path)


def test_loading_removes_dropout(folder, tmp_path):
    model = load(folder)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    training = load(tmp_path).train()
    assert torch.equal(training(ids).logits, load(folder)(ids).logits)


@pytest.mark.parametrize(
    ("words", "num_gpus", "reason"),
    [
        (["device=auto"], 0, "needs a GPU, and the learner is on 'cpu'"),
        (["device=cpu", "cluster.address=auto"], 1, "needs a GPU, and the learner is on 'cpu'"),
        (["learner.dtype=float32"], 1, "needs bfloat16, and learner.dtype is float32"),
    ],
)
def test_attention_over_segments_is_refused_without_a_model(monkeypatch, words, num_gpus, reason):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ValueError, match=f"learner.attention is 'varlen', which {reason}: set learner.attention=auto"):
        check_attention(configuration.load(None, ["learner.attention=varlen", *words]))
    check_attention(configuration.load(None, words))
    check_attention(configuration.load(None, ["learner.attention=varlen", "cluster.address=auto"]))
