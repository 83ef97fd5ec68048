"""What a resume depends on beside settings: the day, the folder it starts in, and what files have in them."""

import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest

from asyncrl.config import loading as configuration
from asyncrl.config.origin import fixed, weights_digest
from asyncrl.config.schema import ModelConfig
from asyncrl.driver.preconditions import Look
from asyncrl.models.loading import load_tokenizer
from asyncrl.models.tiny import build_tiny
from asyncrl.recovery import run_folder

pytestmark = pytest.mark.usefixtures("place")

TEMPLATE = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}{{ '<t>' if thinks }}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "whole"
    build_tiny(path, name="tiny-bytes", hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, seed=0)
    return path


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """The current folder, with a model and data in it."""
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+2=", "target": "3"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(*words):
    return configuration.load(None, ["env.path=asyncrl.envs.dataset:DatasetEnv", "model.path=model", *words])


def rendered(tokenizer, **options):
    said = [{"role": "user", "content": "hi"}]
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False, **options)


def test_a_template_with_a_clock_sees_the_day_that_the_run_began(place, tmp_path):
    config = configuration.load(None, ["model.path=model", "model.date='2024-02-29'", f"run_dir={tmp_path}/runs"])
    folder = run_folder.create(config, {})
    later = configuration.from_words([], Path(), resume=folder)
    assert run_folder.differences(folder, later) == []
    with_date = [Look(later, folder, str(tmp_path)).tokenizer, load_tokenizer("model", fixed(later, folder).model)]
    assert [*map(rendered, with_date)] == ["29 Feb 2024|hi"] * 2
    saved = place / "saved"  # a checkpoint keeps the template, not a day
    with_date[0].save_pretrained(saved)
    assert rendered(load_tokenizer(saved, ModelConfig(date="2024-03-01"))) == "01 Mar 2024|hi"


def test_a_new_run_has_today_and_a_run_of_an_earlier_version_has_the_clock():
    today = {time.strftime("%Y-%m-%d")}
    folder = run_folder.create(config_of("run_dir=runs"), {})
    today.add(time.strftime("%Y-%m-%d"))  # around midnight
    assert configuration.load(folder / "config.json").model.date in today
    tree = configuration.stored(folder / "config.json")
    del tree["model"]["date"]
    (folder / "config.json").write_bytes(msgspec.json.encode(tree))
    config = configuration.from_words([], Path(), resume=folder)
    assert run_folder.differences(folder, config) == []
    assert fixed(config, folder).model.date == ""
    set_by_hand = configuration.from_words(["model.date='2024-02-29'"], Path(), resume=folder)
    assert run_folder.differences(folder, set_by_hand) == ['model.date "" -> "2024-02-29"']


def test_the_day_of_a_run_cannot_change():
    folder = run_folder.create(config_of("run_dir=runs", "model.date='2024-02-29'"), {})
    with pytest.raises(ValueError, match=r"model\.date .*checkpoints of .* are of the old value"):
        run_folder.differences(folder, configuration.from_words(["model.date='2024-03-01'"], Path(), resume=folder))
    with pytest.raises(ValueError, match="write a day as YYYY-MM-DD"):
        config_of("model.date='29 Feb'")


def test_paths_are_those_of_the_folder_that_the_run_began_in(place, monkeypatch):
    words = ["run_dir=runs", "env.args={source='rows.jsonl', prompt='prompt', reward='x:y'}", "critic.path=model"]
    (place / "prompt").mkdir()  # an argument that is no path is left alone
    folder = run_folder.create(config_of(*words), {}).absolute()
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = configuration.from_words([], Path(), resume=folder)
    assert config.model.path == config.critic.path == str(place / "model")
    assert config.env.args == {"source": str(place / "rows.jsonl"), "prompt": "prompt", "reward": "x:y"}
    assert run_folder.differences(folder, config) == []


def test_relative_paths_of_an_earlier_version_are_no_difference():
    folder = run_folder.create(config_of("run_dir=runs"), {})
    tree = configuration.stored(folder / "config.json")
    tree["model"]["path"] = "model"
    (folder / "config.json").write_bytes(msgspec.json.encode(tree))
    assert run_folder.differences(folder, configuration.from_words([], Path(), resume=folder)) == []


@pytest.mark.parametrize("knob", ["algorithm.loss.reference_kl=0.1", "lora.rank=2"])
def test_a_base_that_changed_under_its_name_is_refused(place, knob):
    folder = run_folder.create(config_of("run_dir=runs", knob), {})
    config = configuration.from_words([], Path(), resume=folder)
    moved = configuration.from_words([f"model.path={shutil.copytree('model', 'moved')}"], Path(), resume=folder)
    assert len(run_folder.differences(folder, moved)) == 1
    build_tiny(
        place / "model", name="tiny-bytes", hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, seed=1
    )
    with pytest.raises(ValueError, match=r"the weights in .*model have changed since the run in"):
        run_folder.differences(folder, config)


def test_a_base_that_changed_is_no_matter_where_nothing_uses_it():
    folder = run_folder.create(config_of("run_dir=runs"), {})
    os.truncate("model/model.safetensors", 5000)
    assert run_folder.differences(folder, configuration.from_words([], Path(), resume=folder)) == []


def test_data_of_a_warmed_up_base_that_changed_are_refused():
    words = ["run_dir=runs", "lora.rank=2", "warmup.num_steps=1", "env.args={source='rows.jsonl', reward='x:y'}"]
    folder = run_folder.create(config_of(*words), {})
    Path("rows.jsonl").write_text('{"prompt": "1+2=", "target": "4"}\n')
    with pytest.raises(ValueError, match=r"the data files that env\.args names have changed since"):
        run_folder.differences(folder, configuration.from_words([], Path(), resume=folder))


def test_the_digest_sees_a_change_of_all_weights_and_of_none(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1_000_000))
    before = weights_digest(tmp_path)
    file.touch()
    assert weights_digest(tmp_path) == before
    file.write_bytes(bytes(900_000) + b"1" * 100_000)
    assert weights_digest(tmp_path) != before


def test_a_template_of_ones_own_and_its_arguments():
    Path("mine.jinja").write_text(TEMPLATE + "!")
    config = config_of("model.chat_template=mine.jinja", "model.template_args.thinks=true", "model.date='2024-02-29'")
    assert rendered(load_tokenizer("model", config.model)) == "29 Feb 2024|hi<t>!"
    assert rendered(load_tokenizer("model", config.model), thinks=False) == "29 Feb 2024|hi!"
    folder = run_folder.create(msgspec.structs.replace(config, run_dir="runs"), {})
    Path("mine.jinja").write_text("another")
    stored = configuration.load(folder / "config.json").model
    assert rendered(load_tokenizer("model", stored)) == "29 Feb 2024|hi<t>!"
    with pytest.raises(ValueError, match="is no template, as it has no braces, and no file"):
        fixed(config_of("model.chat_template=none.jinja"))
    with pytest.raises(ValueError, match="which the run itself gives the template"):
        config_of("model.template_args.tokenize=true")
