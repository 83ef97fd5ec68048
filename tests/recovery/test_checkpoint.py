"""Checkpoints: whole or not there, damage found by checksum, the one before used, the random state kept."""

import itertools
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from helpers import run
from safetensors import SafetensorError
from test_loop import small
from tokenizers import Tokenizer
from tokenizers.models import BPE

from asyncrl.driver import run as job
from asyncrl.driver import system
from asyncrl.monitor import metrics, rows
from asyncrl.recovery import checkpoint
from asyncrl.recovery import group_files as groups
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.recovery.journal import Journal
from asyncrl.runtime.local import LocalLearner
from asyncrl.utils import durable


def fill(folder):
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)


def unreadable(monkeypatch, path):
    """The disk answers with an error."""
    real = Path.open

    def failing(self, *arguments, **words):
        if self == path:
            raise OSError(5, "Input/output error", str(self))
        return real(self, *arguments, **words)

    monkeypatch.setattr(Path, "open", failing)


def saved(root, *versions, keep=5):
    return [checkpoint.write(root, Cursor(version, 0, []), fill, keep=keep) for version in versions]


def test_the_newest_are_kept_by_number_and_not_by_name(tmp_path):
    saved(tmp_path, 8, 999_999, 1_000_000, keep=2)
    assert [checkpoint.version_of(folder) for folder in checkpoint.folders(tmp_path)] == [999_999, 1_000_000]
    assert checkpoint.load_cursor(checkpoint.latest(tmp_path)).version == 1_000_000


@pytest.mark.parametrize(
    "name", ["model.safetensors", "learner/cursor.json", "learner/random.safetensors", "manifest.json"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "delete", "unreadable"])
def test_a_damaged_one_is_set_aside_with_a_warning_and_the_one_before_is_used(tmp_path, monkeypatch, name, harm):
    first, second = saved(tmp_path, 1, 2)
    path = second / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "unreadable":
        unreadable(monkeypatch, path)
    elif harm == "delete":
        path.unlink()
    else:
        path.write_bytes(content if harm == "flip" else content[:-1])
    told = pytest.warns(UserWarning, match=f"damaged .*{'' if harm == 'flip' else name}")
    with told:
        assert checkpoint.latest(tmp_path) == first
    assert [folder.name for folder in sorted(tmp_path.iterdir())] == ["step-000001", "step-000002"], "only read"
    with told:
        assert checkpoint.newest(tmp_path) == first
    assert [folder.name for folder in sorted(tmp_path.iterdir())] == ["damaged-step-000002", "step-000001"]


def test_with_every_one_damaged_the_run_is_not_started_from_nothing(tmp_path):
    (folder,) = saved(tmp_path, 1)
    (folder / "learner" / "cursor.json").unlink()
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"every checkpoint .* is damaged: damaged-step-000001"),
    ):
        checkpoint.newest(tmp_path)
    for read in (checkpoint.newest, checkpoint.latest):  # nor when it is asked for again, with none of that name left
        with pytest.raises(ValueError, match=r"every checkpoint .* is damaged: damaged-step-000001; restore one"):
            read(tmp_path)
    (whole,) = saved(tmp_path, 1)
    assert checkpoint.newest(tmp_path) == whole, "restored"


def test_one_that_a_run_in_progress_takes_away_while_it_is_read_gives_way_to_a_newer_one(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    real = durable.damage

    def late(folder):
        if folder.name == "step-000001":
            saved(tmp_path, 2, keep=1)
        return real(folder)

    monkeypatch.setattr(durable, "damage", late)
    assert checkpoint.latest(tmp_path).name == "step-000002"


def test_a_save_that_fails_leaves_nothing_and_what_was_there_stays(tmp_path):
    saved(tmp_path, 1)

    def full_disk(folder):
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, Cursor(2, 0, []), full_disk, keep=1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000001"]


def fail_like_safetensors(_folder):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "cut",
    [
        fail_like_safetensors,
        pytest.param(
            lambda _folder: Tokenizer(BPE()).save("/dev/full"),
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has such a device"),
        ),
    ],
)
def test_a_file_that_is_cut_short_by_the_disk_is_an_error_of_the_disk(tmp_path, cut):
    """Libraries have errors of their own for it, which would end a run that can go on without this checkpoint."""
    with pytest.raises(OSError, match=r"could not be written: .*No space left"):
        checkpoint.write(tmp_path, Cursor(1, 0, []), cut, keep=1)
    assert not list(tmp_path.iterdir())


def test_an_old_one_that_cannot_be_deleted_fails_no_save_is_not_taken_for_a_whole_one_and_goes_with_the_next(
    tmp_path, monkeypatch
):
    saved(tmp_path, 1)

    def half(folder, ignore_errors=False):
        (folder / "model.safetensors").unlink(missing_ok=True)
        if not ignore_errors:
            raise OSError(39, "Directory not empty", ".nfs0001")

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.warns(UserWarning, match=r"step-000001.* goes with the next save: .*Directory not empty"):
        (second,) = saved(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert checkpoint.folders(tmp_path) == [second]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000001.old", "step-000002"]
    saved(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_one_of_the_same_version_gives_way_whatever_keeps_its_files(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    (again,) = saved(tmp_path, 1)
    assert checkpoint.latest(tmp_path) == again


def test_the_weights_of_the_folder_are_the_models_alone(tmp_path):
    """Engines load every *.safetensors that lies beside the model's."""
    (folder,) = saved(tmp_path, 1)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]


def test_the_random_state_comes_back(tmp_path):
    torch.manual_seed(5)
    torch.rand(3)
    (folder,) = saved(tmp_path, 1)
    expected = torch.rand(4)
    torch.manual_seed(6)
    checkpoint.load_random_state(folder)
    assert torch.equal(torch.rand(4), expected)


def test_a_run_goes_on_without_a_checkpoint_that_the_disk_refused_and_from_one_before_a_damaged_one(
    tmp_path, monkeypatch
):
    real, refused = checkpoint.write, [2]

    def write(root, cursor, *arguments, **words):
        if cursor.version in refused:
            raise OSError(28, "No space left on device")
        return real(root, cursor, *arguments, **words)

    monkeypatch.setattr(checkpoint, "write", write)
    config = small(tmp_path, "checkpoint.every=1", "checkpoint.keep=3")
    result = run(job.train(config, quiet=True))
    folders = checkpoint.folders(result.folder / "checkpoints")
    assert [checkpoint.version_of(folder) for folder in folders] == [1, 3, 4]
    (folders[-1] / "learner" / "optimizer.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="optimizer.safetensors has another checksum"):
        again = run(job.train(config, result.folder, quiet=True))
    assert again.version == 4
    rows = [row["version"] for row in metrics.read(result.folder) if "reward/mean" in row]
    assert rows == [1, 2, 3, 4]


@pytest.mark.parametrize("shown", [True, False])
def test_a_checkpoint_that_the_driver_does_not_see_is_not_booked_and_ends_the_run_unless_it_shows_later(
    tmp_path, monkeypatch, shown
):
    """A learner on another node writes to a disk of its own, or to a network file system that shows it late."""
    real_save, real_folders = LocalLearner.save, checkpoint.folders
    elsewhere, looks = tmp_path / "own", itertools.count()

    async def save(self, _root, cursor):
        await real_save(self, elsewhere, cursor)

    def look(root):
        if root != elsewhere and shown and next(looks) == 2:
            root.symlink_to(elsewhere)
        return real_folders(root)

    monkeypatch.setattr(LocalLearner, "save", save)
    monkeypatch.setattr(checkpoint, "folders", look)
    monkeypatch.setattr(system, "_LOOK_S", 0)
    train = job.train(small(tmp_path, "checkpoint.every=1"), quiet=True)
    if shown:
        assert run(train).version == 4
    else:
        with pytest.raises(ValueError, match=r"version 1 and the driver does not see .*checkpoints: .*; set run_dir"):
            run(train)
    (folder,) = tmp_path.glob("*-sevens")
    with closing(Journal(folder / "journal.bin")) as journal:
        assert journal.accounts.kept == ((3, 4) if shown else (0,))


def test_what_a_killed_save_left_is_deleted_and_told_of_once_no_other_process_holds_the_run(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(metrics.Metrics, "_show", lambda _self, event: said.append(event.line))
    folder = run(job.train(small(tmp_path, "num_steps=1"), quiet=True)).folder
    partial = folder / "checkpoints" / ".step-000002.partial"
    (partial / "learner").mkdir(parents=True)
    (partial / "learner" / "optimizer.safetensors").write_bytes(bytes(2_500_000))
    config = small(tmp_path, "num_steps=3", "checkpoint.every=1")
    with closing(Journal(folder / "journal.bin")), pytest.raises(ValueError, match="another process"):
        run(job.train(config, folder, quiet=True))
    assert partial.exists()
    assert run(job.train(config, folder, quiet=True)).version == 3
    assert not partial.exists()
    told = "unfinished folders in checkpoints/, left by a kill, are deleted: 1, 2.5 MB"
    assert [line for line in said if "unfinished" in line] == [told]


def test_a_run_goes_on_when_groups_cannot_be_written_and_says_so(tmp_path, monkeypatch, capsys):
    def full_disk(_folder, _group):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(groups, "write", full_disk)
    result = run(job.train(small(tmp_path)))
    rows = [row["journal/unstored"] for row in metrics.read(result.folder) if "journal/unstored" in row]
    assert len(rows) == 4
    assert rows == sorted(rows)
    assert rows[0] >= 4
    assert capsys.readouterr().out.count("could not be written to groups/") == 1


def test_rows_of_steps_that_are_made_again_and_a_torn_line_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"version": 1}\n{"version": 3}\n{"version": 2, "eval/accuracy": null}\n{"versi')
    rows.cut(tmp_path / "metrics.jsonl", 2)
    assert path.read_text() == '{"version": 1}\n{"version": 2, "eval/accuracy": null}\n'
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["step-000018.bak", "step-last", "step-00000²"])
def test_a_foreign_name_among_the_checkpoints_is_told_and_left_alone(tmp_path, name):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-000001", tmp_path / name)
    (tmp_path / "step-000099").write_text("no folder")
    (tmp_path / ".step-mine").mkdir()
    assert checkpoint.clear(tmp_path / "missing") == (0, 0), "a run that has none yet"
    with pytest.warns(UserWarning, match=name):
        (second,) = saved(tmp_path, 2, keep=1)
    with pytest.warns(UserWarning, match="step-000099"):
        assert checkpoint.newest(tmp_path) == checkpoint.latest(tmp_path) == second
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [name, second.name, "step-000099", ".step-mine"]
    ), "nothing foreign is deleted"
