"""The curriculum by pass rate: off it changes nothing, its mix moves with a policy, resumed it knows what it knew."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import Sevens, run, trajectory

from asyncrl.config import loading as configuration
from asyncrl.config.schema import CurriculumConfig
from asyncrl.driver import build as assembly
from asyncrl.driver import run as job
from asyncrl.monitor import metrics
from asyncrl.recovery import checkpoint
from asyncrl.recovery.curriculum import REASONS, Curriculum
from asyncrl.recovery.journal import Journal, read
from asyncrl.recovery.prompt_queue import PromptQueue
from asyncrl.recovery.prompt_states import Admitted, Dropped, Generated, Resumed, Saved, Synced
from asyncrl.runtime.rollout_worker import make_group
from asyncrl.types import Prompt


def prompts(num_tasks=4, sources=("",)):
    """The same few tasks again and again."""
    for number in itertools.count():
        task = number % num_tasks
        yield Prompt(number, (1, task), str(task), sources[task % len(sources)])


def finish(queue, prompt, rewards, version=0):
    played = [trajectory(2, 2, seed=n, reward=reward, version=version) for n, reward in enumerate(rewards)]
    group = make_group(prompt, played)
    queue.generated(group)
    queue.training([group], version + 1)


def make(path, **settings):
    return PromptQueue(
        prompts(),
        Journal(path),
        curriculum=Curriculum(CurriculumConfig(by="prompt", **settings), seed=0),
        pass_reward=1.0,
    )


RATES = {"0": [1, 1], "1": [0, 0], "2": [1, 0], "3": [0, 1]}


def play(queue, count, rates=RATES):
    """Issues and finishes so many prompts at version 0; the tasks that were played."""
    tasks = Counter()
    for _ in range(count):
        prompt, _ = queue.issue()
        tasks[prompt.target] += 1
        finish(queue, prompt, rates[prompt.target])
    return tasks


def test_off_every_draw_is_issued(tmp_path):
    queue = PromptQueue(prompts(), Journal(tmp_path / "journal.bin"))
    for expected in itertools.islice(prompts(), 200):
        issued, _ = queue.issue()
        assert issued == expected
        finish(queue, issued, RATES[issued.target])
    assert queue.metrics() == {"journal/unstored": 0.0}


def test_what_is_always_or_never_solved_comes_less_often(tmp_path):
    queue = make(tmp_path / "journal.bin", skip=0.75)
    assert play(queue, 8) == {"0": 2, "1": 2, "2": 2, "3": 2}, "two visits each before anything is left out"
    played = play(queue, 1000)
    # Of four draws, one of each task, 0.25 of tasks 0 and 1 are kept: 1 in 10 each of what is played.
    assert 70 < played["0"] < 130
    assert 70 < played["1"] < 130
    assert abs(played["2"] - played["3"]) <= 1
    totals = queue.journal.accounts.totals()
    drawn = queue.journal.accounts.next_id
    assert totals["trained"] == 1008
    assert totals["trained"] + totals[REASONS["easy"]] + totals[REASONS["hard"]] == drawn
    row = queue.metrics()
    assert (row["curriculum/easy"], row["curriculum/hard"], row["curriculum/between"]) == (0.25, 0.25, 0.5)
    assert row["curriculum/skipped_easy"] == totals[REASONS["easy"]] > 300
    assert row["curriculum/skipped_hard"] == totals[REASONS["hard"]] > 300


def test_the_mix_moves_with_the_policy(tmp_path):
    queue = make(tmp_path / "journal.bin", skip=0.75)
    play(queue, 200)
    learnt = RATES | {"1": [1, 0], "2": [1, 1]}  # the hard task is solved now and then, another one always
    play(queue, 100, learnt)
    after = play(queue, 1000, learnt)
    assert after["1"] > 2.5 * after["2"]
    assert after["1"] > 2.5 * after["0"]
    assert queue.metrics()["curriculum/hard"] == 0


class Watched(dict):
    """Notes which keys are looked at, and refuses to be gone through."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def values(self):
        raise AssertionError("every prompt that was ever met is looked at")


def test_neither_a_step_nor_a_save_looks_at_every_prompt(tmp_path):
    journal = Journal(tmp_path / "journal.bin")
    curriculum = Curriculum(CurriculumConfig(by="prompt"), seed=0)
    queue = PromptQueue(prompts(50), journal, curriculum=curriculum, pass_reward=1.0)
    for _ in range(50):
        finish(queue, queue.issue()[0], [1, 1])
    curriculum.apply(Saved(version=0, kept=(0,)))
    for _ in range(3):
        finish(queue, queue.issue()[0], [1, 1])
    curriculum._visits = watched = Watched(curriculum._visits)
    curriculum.apply(Saved(version=0, kept=(0,)))
    assert len(watched.seen) == 3
    row = queue.metrics()
    assert (row["curriculum/easy"], row["curriculum/new"]) == (3 / 50, 47 / 50)


def test_sources_share_a_pass_rate(tmp_path):
    settings = CurriculumConfig(by="source", visits=10, bounds=(0.1, 0.9), skip=0.5)
    journal = Journal(tmp_path / "journal.bin")
    queue = PromptQueue(prompts(100, ("a", "b")), journal, curriculum=Curriculum(settings, seed=0), pass_reward=1.0)
    played = Counter()
    for _ in range(600):
        prompt, _ = queue.issue()
        played[prompt.source] += 1
        finish(queue, prompt, [1, 1] if prompt.source == "a" else [1, 0])
    assert 0.28 < played["a"] / 600 < 0.40
    row = queue.metrics()
    assert (row["curriculum/easy"], row["curriculum/between"]) == (0.5, 0.5)
    bare = PromptQueue(prompts(), Journal(None), curriculum=Curriculum(settings, seed=0))
    refused = r"curriculum\.by is 'source', and the prompts of this environment have none"
    with pytest.raises(ValueError, match=refused):
        bare.issue()
    config = configuration.load(None, ["runtime=local", "curriculum.by=source", f"run_dir={tmp_path / 'runs'}"])
    with pytest.raises(ValueError, match=refused):
        run(job.train(config, quiet=True))
    assert not (tmp_path / "runs").exists(), "before a run has a folder"


def test_a_curriculum_wants_a_pass_mark():
    config = configuration.load(None, ["curriculum.by=prompt"])
    env = SimpleNamespace(prompts=lambda _split, _seed: prompts(), max_prompt_tokens=2)
    refused = r"curriculum\.by is 'prompt' .* SimpleNamespace has no pass_reward .* set eval\.pass_reward to the reward"
    with pytest.raises(ValueError, match=refused):
        assembly.try_prompts(config, env)
    assembly.try_prompts(configuration.load(None, ["curriculum.by=prompt", "eval.pass_reward=0.5"]), env)
    env.pass_reward = 0.5
    assembly.try_prompts(config, env)


def test_without_a_pass_mark_the_journal_knows_no_pass_rate(tmp_path):
    queue = PromptQueue(prompts(), Journal(tmp_path / "journal.bin"))
    finish(queue, queue.issue()[0], [1, 0])
    (generated,) = [record for record in queue.journal.records() if isinstance(record, Generated)]
    assert generated.passed is None


def test_a_queue_that_is_opened_again_decides_as_the_first_would_have(tmp_path):
    queue = make(tmp_path / "journal.bin")
    play(queue, 50)
    open_prompt, _ = queue.issue()
    queue.synced(1, "")
    queue.journal.close()
    shutil.copy(tmp_path / "journal.bin", tmp_path / "copy.bin")

    def go_on(path):
        journal = Journal(path)
        journal.append(Resumed(version=1))
        again = PromptQueue(
            prompts(), journal, curriculum=Curriculum(CurriculumConfig(by="prompt"), seed=0), pass_reward=1.0
        )
        return again, play(again, 200)

    first, played = go_on(tmp_path / "journal.bin")
    second, played_again = go_on(tmp_path / "copy.bin")
    assert played == played_again
    straight = make(tmp_path / "straight.bin")
    play(straight, 250)
    assert open_prompt.id in {record.id for record in first.journal.records() if isinstance(record, Generated)}
    assert first.journal.accounts.totals() == straight.journal.accounts.totals()
    assert second.metrics() == straight.metrics()


def test_what_lost_weights_had_a_part_in_is_unknown_again():
    curriculum = Curriculum(CurriculumConfig(by="prompt", skip=0.99), seed=0)
    task = [Prompt(number, (1, 2), "") for number in range(6)]
    for prompt in task:
        curriculum.meet(prompt)

    def visit(number, version):
        return [
            Admitted(id=number, checksum=0),
            Generated(id=number, oldest=version, newest=version, stored="", passed=1),
        ]

    records = [Synced(version=0, digest=""), *visit(0, 0), Synced(version=1, digest=""), *visit(1, 1)]
    dropped = []
    for number in (2, 4):
        dropped += [Admitted(id=number, checksum=0), Dropped(ids=(number,), reason=REASONS["easy"], version=1)]
    curriculum.replay([*records, *dropped, Saved(version=1, kept=(0, 1)), Resumed(version=0)])
    curriculum.meet(task[2])
    assert curriculum.metrics(Counter())["curriculum/new"] == 1
    assert curriculum.reason(task[2], again=True) == ""
    for number in (1, 2):
        curriculum.meet(task[number])
        for record in visit(number, 0):
            curriculum.apply(record)
    curriculum.meet(task[3])
    curriculum.meet(task[4])
    assert curriculum.reason(task[4], again=True) == REASONS["easy"], "decided by a life that is lost: decided anew"
    assert curriculum.reason(task[3], again=True) == "", "drawn before and decided: it stands"
    assert curriculum.reason(task[3], again=False) == REASONS["easy"]


class FewSevens(Sevens):
    """Six prompts that come again and again: two that every reply solves, two that none does."""

    def prompts(self, split, seed):
        few = list(itertools.islice(super().prompts(split, seed), 6))
        for number in itertools.count():
            yield replace(few[number % 6], id=number)

    async def play(self, prompt, generate):
        attempt = await super().play(prompt, generate)
        last = int(attempt.token_ids[-1])
        return replace(attempt, reward=[1.0, 1.0, 0.0, 0.0, float(last % 2), float(last % 3 == 0)][prompt.id % 6])


def test_a_resumed_run_trains_what_the_unbroken_one_trained(tmp_path):
    words = ["runtime=local", "num_steps=9", "env.path=test_curriculum:FewSevens", "learner.groups_per_step=6"]
    words += [
        "rollout.max_new_tokens=2",
        "buffer.max_staleness=0",
        "curriculum.by=prompt",
        "checkpoint.every=3",
        "checkpoint.keep=9",
        "eval.every=0",
    ]
    config = configuration.load(None, [*words, "eval.num_prompts=2", f"run_dir={tmp_path}"])
    folder = run(job.train(config, quiet=True)).folder

    def schedule(records):
        return {record.version: record.digest for record in records if isinstance(record, Synced)}

    def batches(records):
        return {record.step: set(record.ids) for record in records if hasattr(record, "step")}

    before, _, _ = read(folder / "journal.bin")
    row = metrics.read(folder)[-2]
    assert row["curriculum/skipped_easy"] > 0
    assert row["curriculum/skipped_hard"] > 0
    for saved in checkpoint.folders(folder / "checkpoints"):
        if checkpoint.version_of(saved) > 3:
            shutil.rmtree(saved)
    run(job.train(config, resume=folder, quiet=True))
    after, _, _ = read(folder / "journal.bin")
    again = after[len(before) :]
    assert set(schedule(again)) == set(range(3, 10))
    assert schedule(again).items() <= schedule(before).items(), "the same weights, bit by bit"
    assert batches(again).items() <= batches(before).items()
    last = [row for row in metrics.read(folder) if "reward/mean" in row][-1]
    names = [name for name in last if name.startswith("curriculum/")]
    assert json.dumps([last[name] for name in names]) == json.dumps([row[name] for name in names])


def test_an_attempt_whose_parts_add_up_to_the_pass_mark_is_solved(tmp_path):
    queue = make(tmp_path / "journal.bin")
    prompt, _ = queue.issue()
    finish(queue, prompt, [0.7 + 0.2 + 0.1, 0.7 + 0.2])
    assert [record.passed for record in queue.journal.records() if isinstance(record, Generated)] == [0.5]
