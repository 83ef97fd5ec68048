"""Damaged and foreign files of a run folder: named with a remedy, or left out and told."""

import pytest

from asyncrl.monitor import samples
from asyncrl.recovery import checkpoint, run_folder


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_a_json_file_that_is_damaged_is_named_with_a_remedy(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged .*restore it from a copy, or remove it"):
        run_folder.known_baselines(tmp_path, [])
    path.unlink()
    assert run_folder.known_baselines(tmp_path, []) == {}
    run_folder.keep_baselines(tmp_path, {"nothing": 0.5})
    assert run_folder.known_baselines(tmp_path, []) == {"nothing": 0.5}


def test_a_folder_in_place_of_a_json_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read .*restore it"):
        run_folder.read_json(tmp_path / "config.json")


def test_foreign_names_are_no_configurations_of_before(tmp_path):
    for name in ("abc", "000003", "000003.2", "000003.old", "", "1.2.3"):
        (tmp_path / f"config.step-{name}.json").write_text("{}")
    found = [(step, path.name) for step, path in run_folder.stretches(tmp_path)]
    assert found == [(0, "config.step-000003.json"), (3, "config.step-000003.2.json"), (3, "config.json")]


def test_a_damaged_file_of_samples_is_left_out_and_named(tmp_path):
    folder = tmp_path / samples.FOLDER
    folder.mkdir()
    for name, content in {"empty": b"", "hole": b"PAR1" + b"\0" * 99}.items():
        (folder / f"{name}.parquet").write_bytes(content)
    with pytest.warns(UserWarning, match="cannot be read and is left out") as told:
        assert samples.read(tmp_path) == []
    assert len(told) == 2


@pytest.mark.parametrize("read", [checkpoint.load_cursor, checkpoint.load_optimizer, checkpoint.load_random_state])
def test_a_file_of_a_checkpoint_that_cannot_be_read_is_named(tmp_path, read):
    (tmp_path / "learner").mkdir()
    with pytest.raises(ValueError, match=r"learner/.* cannot be read .*restore it"):
        read(tmp_path)
    for name in ("cursor.json", "optimizer.safetensors", "random.safetensors"):
        (tmp_path / "learner" / name).write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match=r"learner/.* cannot be read .*restore it"):
        read(tmp_path)
