"""A run's recorded batches give its weights again, bit by bit; where they do not, the step and the tensor are named."""

import shutil
from dataclasses import replace

import pytest
from helpers import run
from test_loop import small

from asyncrl.cli import replay as tool
from asyncrl.driver import run as job
from asyncrl.recovery import group_files as groups
from asyncrl.recovery import journal
from asyncrl.recovery.prompt_states import Batch

WORDS = [
    "journal.keep_groups=true",
    "learner.learning_rate=1e-3",
    "rollout.max_running=6",
    "checkpoint.every=1",
    "checkpoint.keep=9",
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """An asynchronous run that stopped after three steps, lost the last one, and went on to step 6."""
    root = tmp_path_factory.mktemp("recorded")
    first = run(job.train(small(root, *WORDS, "num_steps=3"), quiet=True))
    shutil.rmtree(first.folder / "checkpoints" / "step-000003")
    result = run(job.train(small(root, *WORDS, "num_steps=6"), first.folder, quiet=True))
    return result.folder


@pytest.fixture
def folder(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "run")


def test_an_asynchronous_run_is_reproduced_exactly(folder, capsys):
    records, _, _ = journal.read(folder / "journal.bin")
    assert len([record for record in records if isinstance(record, Batch)]) == 7, "one step was lost and made again"
    assert tool.main([str(folder)]) == 0
    assert "exact: 6 steps on 24 groups" in capsys.readouterr().out


def test_a_replay_ends_where_a_resume_trained_with_other_settings(recorded, tmp_path, capsys):
    folder = shutil.copytree(recorded, tmp_path / "run")
    config = small(tmp_path, *WORDS, "num_steps=7", "learner.learning_rate=1e-4")
    run(job.train(config, folder, quiet=True))
    assert tool.main([str(folder)]) == 0
    told = capsys.readouterr().out
    assert "up to step 6, where the run went on with learner.learning_rate 0.001 -> 0.0001" in told
    assert "exact: 6 steps on 24 groups" in told


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_a_run_of_adapters_is_reproduced_exactly(tmp_path, capsys, sync):
    config = small(tmp_path, *WORDS, "lora.rank=4", f"lora.sync={sync}", "num_steps=2")
    result = run(job.train(config, quiet=True))
    assert tool.main([str(result.folder)]) == 0
    assert "exact: 2 steps" in capsys.readouterr().out
    assert tool.main([str(result.folder), "lora.alpha=33"]) == 1


def test_a_changed_group_is_named_with_its_step_and_what_it_does_to_the_weights(folder, capsys):
    number, digest = tool.read_schedule(folder / "journal.bin").batches[4][1]
    group = groups.read(folder / "groups", number, digest)
    first, *others = group.trajectories
    groups.write(folder / "groups", replace(group, trajectories=[replace(first, reward=first.reward + 5), *others]))
    assert tool.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"step 4: {number:09d}.msgpack is not the file that was written in the run"
    assert lines[1] == "step 4: the weights have another digest than in the run"
    assert lines[2].startswith("step 4: against step-000004, ")
    assert "first lm_head.weight" in lines[2] or "first model." in lines[2]


def test_another_learning_rate_differs_from_the_first_step_and_its_tensor_by_the_next_checkpoint(folder, capsys):
    for version in (1, 2):
        shutil.rmtree(folder / "checkpoints" / f"step-{version:06d}")
    assert tool.main([str(folder), "learner.learning_rate=2e-3"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 1: the weights have another digest than in the run"
    assert second.startswith("step 3: against step-000003, ")


def test_without_checkpoints_the_step_is_named_all_the_same(folder, capsys):
    shutil.rmtree(folder / "checkpoints")
    assert tool.main([str(folder), "learner.warmup_steps=1"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 1: the weights have another digest than in the run"
    assert "no checkpoint of a later step is left" in second


def test_a_run_that_did_not_keep_its_groups_is_refused(folder, capsys):
    number, _ = tool.read_schedule(folder / "journal.bin").batches[1][0]
    groups.delete(folder / "groups", number)
    assert tool.main([str(folder)]) == 2
    assert "only a run with journal.keep_groups=true can be replayed" in capsys.readouterr().err
