"""What a power cut leaves: the order of write, fsync and rename, and damaged things that are made again."""

import os
import re

import pytest

from asyncrl.config import loading as configuration
from asyncrl.recovery import checkpoint, run_folder
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.recovery.journal import Journal
from asyncrl.training.warmup import prepare
from asyncrl.utils import durable

BUILT_IN = ["model.path=tiny", "warmup.num_steps=0"]


class Disk:
    """Records what reaches the disk, in order, as a layer beneath `os`."""

    def __init__(self, monkeypatch):
        self.deeds = []
        fsync, rename = os.fsync, os.rename

        def recorded_fsync(descriptor):
            fsync(descriptor)
            self.deeds.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

        def recorded_rename(source, target):
            rename(source, target)
            self.deeds.append(("rename", os.fspath(source), os.fspath(target)))

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "rename", recorded_rename)

    def assert_survives(self, path):
        """The content was synced before it got its name, and the name after."""
        named = [(n, deed) for n, deed in enumerate(self.deeds) if deed[0] == "rename" and deed[2] == str(path)]
        at, (_, source, _) = named[-1]
        assert ("fsync", source) in self.deeds[:at], f"{path} gets its name before its content is on the disk"
        assert ("fsync", str(path.parent)) in self.deeds[at:], f"the name of {path} is not on the disk"

    def assert_folder_survives(self, path):
        assert ("fsync", str(path.parent)) in self.deeds, f"the name of {path} is not on the disk"


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def config(tmp_path):
    return configuration.load(None, [*BUILT_IN, f"run_dir={tmp_path / 'runs'}"])


def test_the_files_of_a_new_run_survive_a_power_cut_as_soon_as_it_has_its_folder(disk, config, tmp_path):
    folder = run_folder.create(config, {"nothing": 0.0})
    for name in ("config.json", "run.json"):
        disk.assert_survives(folder / name)
    disk.assert_folder_survives(folder)
    disk.assert_folder_survives(tmp_path / "runs")
    Journal(folder / "journal.bin").close()
    assert disk.deeds[-1] == ("fsync", str(folder)), "a journal without a name is none"


def test_both_configurations_of_a_changed_run_survive(disk, config):
    folder = run_folder.create(config, {"nothing": 0.0})
    disk.deeds.clear()
    run_folder.keep(folder, config, 120)
    disk.assert_survives(folder / "config.step-000120.json")
    disk.assert_survives(folder / "config.json")


def test_every_file_of_a_checkpoint_and_its_name_survive(disk, tmp_path):
    root = tmp_path / "checkpoints"
    saved = checkpoint.write(root, Cursor(1, 0, []), lambda folder: (folder / "model").write_bytes(b"1"), keep=2)
    disk.assert_survives(saved)
    disk.assert_folder_survives(root)
    partial = root / f".{saved.name}.partial"
    synced = {deed[1] for deed in disk.deeds if deed[0] == "fsync"}
    assert {str(partial / name) for name in ("model", "manifest.json", "learner", "learner/cursor.json")} <= synced


def test_every_file_of_a_cached_model_and_its_name_survive(disk, config, tmp_path):
    made = prepare(config, quiet=True)
    disk.assert_survives(made)
    disk.assert_folder_survives(tmp_path / "runs" / "cache")
    synced = {os.path.basename(deed[1]) for deed in disk.deeds if deed[0] == "fsync"}
    assert {path.name for path in made.iterdir()} <= synced


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("left", [b"", b"\0" * 300], ids=["empty", "hole"])
def test_a_damaged_cached_model_is_made_again(config, capsys, name, left):
    made = prepare(config, quiet=True)
    whole = (made / "model.safetensors").read_bytes()
    (made / name).write_bytes(left)
    assert prepare(config, quiet=True) == made
    assert re.search(rf"{made} is damaged \({name}.*made again", capsys.readouterr().err)
    assert durable.damage(made) is None
    assert (made / "model.safetensors").read_bytes() == whole
    assert prepare(config, quiet=True) == made
    assert capsys.readouterr().err == "", "and is whole from then on"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_cached_model_of_an_earlier_version_is_opened_to_see_whether_it_is_whole(config, capsys, name):
    made = prepare(config, quiet=True)
    (made / "manifest.json").unlink()
    assert prepare(config, quiet=True) == made
    assert capsys.readouterr().err == ""
    (made / name).write_bytes(b"")
    prepare(config, quiet=True)
    assert "made again" in capsys.readouterr().err
    assert durable.damage(made) is None
