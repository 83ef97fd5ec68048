"""The supervised warm-up: what its loss sees, parts of a batch, and its cache."""

import msgspec
import pytest
import torch

from asyncrl.config import loading as configuration
from asyncrl.config.origin import fixed
from asyncrl.envs.base import load_env
from asyncrl.models.loading import load_model, load_tokenizer
from asyncrl.models.tiny import build_tiny
from asyncrl.training.warmup import _key, prepare, warm_up

WORDS = ["env.path=asyncrl.envs.digits:SortDigits", "warmup.batch_size=12", "warmup.learning_rate=1e-3"]


class Fixed:
    """A teacher whose pairs are given."""

    def __init__(self, pairs):
        self.pairs = pairs

    def demonstrations(self, seed):
        del seed
        while True:
            yield from self.pairs


@pytest.fixture
def folder(tmp_path):
    build_tiny(tmp_path / "tiny", seed=0)
    return tmp_path / "tiny"


def warmed(folder, env, *words):
    config = configuration.load(None, [*WORDS, *words])
    model = load_model(folder, dtype=torch.float32, device="cpu")
    warm_up(model, env or load_env(config.env.path, load_tokenizer(folder), {}), config, quiet=True)
    return model


def test_parts_of_a_batch_give_the_step_of_the_whole(folder):
    whole = warmed(folder, None, "warmup.num_steps=3")
    parts = warmed(folder, None, "warmup.num_steps=3", "warmup.micro_batch_size=5")
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_it_teaches_the_replies_and_their_end(folder):
    pairs = [([2, 3, 4], [5, 6, 1]), ([7], [8, 1])]
    model = warmed(folder, Fixed(pairs), "warmup.num_steps=40")
    for prompt, reply in pairs:
        logits = model(input_ids=torch.tensor([prompt + reply])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == reply
        assert logits[: len(prompt) - 1].argmax(-1).tolist() != prompt[1:] or len(prompt) == 1, "prompts carry no loss"


def test_an_environment_that_cannot_show_is_refused(folder):
    with pytest.raises(ValueError, match=r"LargestDigit has no demonstrations\(\); set warmup.num_steps=0"):
        prepare(configuration.load(None, ["warmup.num_steps=1", f"run_dir={folder.parent}"]), quiet=True)
    assert list((folder.parent / "cache").iterdir()) == []


def test_demonstrations_that_fail_or_end_are_told_of(folder):
    class Failing(Fixed):
        def demonstrations(self, _seed):
            yield from self.pairs
            raise KeyError("question")

    class Ending(Fixed):
        def demonstrations(self, _seed):
            return iter(self.pairs)

    pairs = [([2, 3, 4], [5, 6, 1])]
    with pytest.raises(ValueError, match=r"Failing.demonstrations\(\) raised KeyError.*test_warmup.py line \d+"):
        warmed(folder, Failing(pairs), "warmup.num_steps=1")
    with pytest.raises(ValueError, match=r"Ending.demonstrations\(\) ended, and the warm-up wants more"):
        warmed(folder, Ending(pairs), "warmup.num_steps=1")


def test_the_result_is_made_once_for_each_combination_of_settings(tmp_path):
    words = [*WORDS, "warmup.num_steps=1", f"run_dir={tmp_path}"]
    first = prepare(configuration.load(None, words), quiet=True)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert prepare(configuration.load(None, words), quiet=True) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert prepare(configuration.load(None, [*words, "warmup.num_steps=2"]), quiet=True) != first
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_model_that_changed_under_its_path_is_warmed_up_anew(folder, tmp_path):
    config = configuration.load(None, [*WORDS, "warmup.num_steps=1", f"model.path={folder}", f"run_dir={tmp_path}"])
    first = prepare(config, quiet=True)
    assert prepare(config, quiet=True) == first
    build_tiny(folder, seed=1)  # files of the same names and sizes
    again = prepare(config, quiet=True)
    assert again != first
    assert (again / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_the_cache_knows_the_contents_of_data_files(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1+2=", "reply": "3"}\n{"prompt": "2+2=", "reply": "4"}\n')
    words = [
        "env.path=asyncrl.envs.dataset:DatasetEnv",
        f"env.args={{source={str(data)!r}, reward='tests.reward_functions:right', reply='reply'}}",
    ]
    config = configuration.load(None, [*words, "warmup.num_steps=1", f"run_dir={tmp_path}", f"model.path={folder}"])
    assert _key(config) == _key(config)
    before = _key(config)
    data.write_text(data.read_text().replace('"4"', '"5"'))
    assert _key(config) != before


def test_the_date_counts_where_the_template_asks_for_it(folder, tmp_path):
    config = configuration.load(None, [*WORDS, "warmup.num_steps=1", f"model.path={folder}", f"run_dir={tmp_path}"])
    assert _key(fixed(config)) == _key(config)
    dated = [msgspec.structs.replace(config, model=dated_model(config, day)) for day in ("2026-12-01", "2026-12-02")]
    assert len({*map(_key, dated)}) == 2


def dated_model(config, day):
    return msgspec.structs.replace(config.model, date=day, chat_template="{{ strftime_now('%d %b') }}")
