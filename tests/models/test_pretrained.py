"""Folders of models as people have them: weights missing, damaged or renamed, settings that cannot be saved."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncrl.envs.chat import ChatFormat
from asyncrl.models import pretrained
from asyncrl.models.loading import added_stop, end_of_turn, load_model, load_tokenizer, stop_token_ids
from asyncrl.models.tiny import build_tiny
from asyncrl.recovery import checkpoint
from asyncrl.recovery.checkpoint import Cursor


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "whole"
    build_tiny(path, name="tiny-bytes", hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, seed=0)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def load(path, **options):
    return load_model(path, torch.float32, "cpu", **options)


def change(folder, how):
    file = folder / "model.safetensors"
    save_file({name: weight.contiguous() for name, weight in how(load_file(file)).items()}, file, {"format": "pt"})


def write(folder, name, **values):
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def refused_by_both(folder, text, tmp_path):
    """By the check that reads no values and by loading."""
    with pytest.raises(ValueError, match=re.escape(text)):
        pretrained.check(folder, load_tokenizer(folder), tmp_path / "scratch")
    with pytest.raises(ValueError, match=re.escape(text)):
        load(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_weights_under_names_of_a_wrapper_are_refused(folder, tmp_path, prefix):
    change(folder, lambda weights: {prefix + name: weight for name, weight in weights.items()})
    refused_by_both(folder, f"save them again without '{prefix}'", tmp_path)


def test_a_wrapper_inside_of_names_is_found_too(folder, tmp_path):
    change(folder, lambda weights: {re.sub(r"(layers\.\d\.)", r"\1_orig_mod.", n): w for n, w in weights.items()})
    refused_by_both(folder, "save them again without '_orig_mod.'", tmp_path)


def test_missing_weights_are_refused_by_name(folder, tmp_path):
    change(folder, lambda weights: {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name})
    refused_by_both(folder, "3 weights are in no file of it, such as model.layers.1.mlp.down_proj.weight", tmp_path)


def test_weights_of_another_shape_are_refused(folder, tmp_path):
    write(folder, "config.json", intermediate_size=48)
    refused_by_both(folder, "another shape than config.json says: 6, such as model.layers.0.mlp.down_proj", tmp_path)


def test_tied_heads_and_unused_weights_are_no_fault(folder, tmp_path):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    change(folder, lambda weights: weights | {"mtp.weight": torch.zeros(3)})
    pretrained.check(folder, load_tokenizer(folder), tmp_path / "scratch")
    load(folder)


def test_a_backbone_needs_no_head_where_it_is_not_used(folder):
    write(folder, "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"1 weights are in no file of it, such as lm_head\.weight"):
        load(folder)
    load(folder, headless=True)


def test_a_cut_file_and_a_pointer_are_named(folder, tmp_path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    refused_by_both(folder, "model.safetensors is damaged or incomplete (5,000 bytes)", tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused_by_both(folder, "model.safetensors is a pointer of git-lfs", tmp_path)


def test_weights_that_are_not_finite_are_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda weights: weights | {name: weights[name] * float("nan")})
    with pytest.raises(ValueError, match=f"the weight {re.escape(name)} has values that are not finite"):
        load(folder)


def test_quantised_weights_are_refused(folder, tmp_path):
    write(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused_by_both(folder, "its weights are quantised (gptq)", tmp_path)


def test_sampling_settings_without_do_sample_are_saved_as_what_they_mean(folder, tmp_path):
    """transformers up to 5.12 reads them and refuses to save them, at the first checkpoint."""
    write(folder, "generation_config.json", temperature=0.6, top_p=0.9, do_sample=None)
    tokenizer = load_tokenizer(folder)
    pretrained.check(folder, tokenizer, tmp_path / "scratch")
    model = load(folder)
    saved = checkpoint.save(
        tmp_path / "checkpoints", Cursor(0, 0, []), model, tokenizer, weights=model.state_dict(), optimizer={}, keep=1
    )
    settings = json.loads((saved / "generation_config.json").read_text())
    assert (settings["do_sample"], settings["temperature"], settings["top_p"]) == (True, 0.6, 0.9)
    load(saved)


def test_what_cannot_be_saved_is_told_before_the_run(folder, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda _: 1 / 0)
    with pytest.raises(ValueError, match=r"cannot be saved with transformers .*mend them in the model's folder"):
        pretrained.check(folder, tokenizer, tmp_path / "scratch")


def test_the_end_of_turn_of_the_template_stops(folder):
    """A base model's only end token is another one: replies ran past the end of their turn."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    assert end_of_turn(tokenizer) == end
    assert stop_token_ids(folder, tokenizer) == (tokenizer.eos_token_id, end)
    assert added_stop(folder, tokenizer) == "<|im_end|>"
    chat = ChatFormat(tokenizer)
    assert chat.encode_reply("yes")[-1] == end, "a warm-up teaches the end that stops"
    assert chat.text_of([*tokenizer.encode("yes"), end]) == "yes"
    write(folder, "generation_config.json", eos_token_id=[tokenizer.eos_token_id, end])
    assert added_stop(folder, tokenizer) == ""


def test_a_template_without_an_end_of_turn_adds_no_stop(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    assert end_of_turn(tokenizer) is None
    assert ChatFormat(tokenizer).encode_reply("yes")[-1] == tokenizer.eos_token_id
    assert added_stop(folder, tokenizer) == ""
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    assert end_of_turn(tokenizer) is None


def test_a_raw_text_begins_as_texts_do_once(folder):
    """Texts that a chat template made, which data sets have, may begin so already."""

    class Begins:
        eos_token_id, chat_template = 0, None

        def encode(self, text, *, add_special_tokens):
            return [7] * add_special_tokens + [7 if character == "^" else ord(character) for character in text]

    assert ChatFormat(Begins(), "raw").encode("ab") == ChatFormat(Begins(), "raw").encode("^ab") == [7, 97, 98]
    assert ChatFormat(Begins(), "raw").encode("") == [], "an empty prompt stays one, and is refused"
    assert ChatFormat(load_tokenizer(folder), "raw").encode("ab") == load_tokenizer(folder).encode("ab")
