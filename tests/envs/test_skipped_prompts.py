"""A resumed run skips the prompts that it needs no more; those that follow are the same as if it had drawn them all."""

import random
from itertools import islice
from types import SimpleNamespace

import pytest
from helpers import TextTokenizer

from asyncrl.config import loading as configuration
from asyncrl.driver.build import make_prompts
from asyncrl.envs.base import can_skip, checked_prompts, load_env, prompts_from
from asyncrl.recovery.journal import Journal
from asyncrl.recovery.prompt_states import Admitted, Batch, Dropped, Saved, Synced, checksum_of
from bench import graders

LARGEST = {"path": "asyncrl.envs.digits:LargestDigit", "weight": 2.5}
SORT = {"path": "asyncrl.envs.digits:SortDigits"}
OLD_WAY = {"path": "test_skipped_prompts:OldWay"}
MIXTURES = {"skips": {"a": LARGEST, "b": SORT}, "draws": {"a": LARGEST, "b": OLD_WAY}}


class OldWay:
    """Six prompts and then, against the protocol, no more; nothing is skipped."""

    max_prompt_tokens = 9

    def __init__(self, tokenizer):
        self._env = load_env(SORT["path"], tokenizer, {})
        self.play, self.baselines = self._env.play, self._env.baselines

    def prompts(self, split, seed):
        return islice(self._env.prompts(split, seed), 6)


def environments(folder):
    found = {
        name: load_env(path, graders.Characters(), args)
        for name, (path, args, _) in graders.environments(folder).items()
    }
    mixture = "asyncrl.envs.mixture:Mixture"
    return found | {name: load_env(mixture, TextTokenizer(), {"envs": envs}) for name, envs in MIXTURES.items()}


def test_what_follows_the_skipped_prompts_is_the_same_in_every_environment(tmp_path):
    rng = random.Random(0)
    for name, env in environments(tmp_path).items():
        assert can_skip(env), name
        for split in ("train", "heldout"):
            whole = list(islice(checked_prompts(env, split, 7), 400))
            for first_id in (0, 1, len(whole) - 1, len(whole), *(rng.randrange(len(whole)) for _ in range(6))):
                rest = list(islice(checked_prompts(env, split, 7, (), first_id), len(whole) - first_id))
                assert rest == whole[first_id:], (name, split, first_id)


def test_a_mixture_skips_more_draws_than_it_holds_at_once():
    env = load_env("asyncrl.envs.mixture:Mixture", TextTokenizer(), {"envs": MIXTURES["skips"]})
    (late,) = islice(env.prompts("train", 0), 20_500, 20_501)
    assert next(env.prompts("train", 0, first_id=20_500)) == late


def test_an_environment_without_the_parameter_is_drawn_as_before():
    env = OldWay(TextTokenizer())
    assert not can_skip(env)
    assert list(prompts_from(env, "train", 0, 4)) == list(env.prompts("train", 0))[4:]
    assert list(prompts_from(env, "train", 0, 9)) == []


@pytest.mark.parametrize(("words", "first"), [((), 20), (("curriculum.by=prompt", "eval.pass_reward=1.0"), 0)])
def test_a_resume_begins_at_the_first_prompt_that_it_needs(tmp_path, words, first):
    config = configuration.load(None, ["rollout.max_new_tokens=4", *words])
    env = load_env(LARGEST["path"], TextTokenizer(), {})
    whole = list(islice(env.prompts("train", config.seed), 40))
    journal = Journal(tmp_path / "journal.bin")
    journal.append(*(Admitted(id=one.id, checksum=checksum_of(one)) for one in whole[:25]))
    journal.append(Batch(step=1, ids=tuple(range(20))), Dropped(ids=(21,), reason="stale", version=1))
    journal.append(Synced(version=1, digest="d"), Saved(version=1, kept=(1,)))
    asked = []

    def prompts(split, seed, first_id=0):
        asked.append(first_id)
        return env.prompts(split, seed, first_id)

    (tmp_path / "groups").mkdir()
    given = SimpleNamespace(prompts=prompts, max_prompt_tokens=env.max_prompt_tokens)
    queue = make_prompts(config, given, [], journal, tmp_path)
    issued = [queue.issue()[0] for _ in range(14)]
    assert issued == [whole[20], *whole[22:35]]
    assert asked == [first]
