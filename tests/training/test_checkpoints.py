"""Which checkpoint a run goes on from, and whether it is the same run."""

import json

import pytest
import torch
from safetensors.torch import save_file

from granulon_hf.errors import GranulonError
from granulon_hf.training.checkpoints import check_settings, find_resume, last_checkpoint, remove_unfinished, settings_of


def checkpoint(folder, step, whole=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"x": torch.zeros(50)}, path / "adapter.safetensors")
    (path / "trainer_state.json").write_text("{}" if whole else "{")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, path / name)
    return path


def test_the_latest_whole_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (5, 90, 100):
        checkpoint(tmp_path, step, whole=step != 100)
    (tmp_path / "checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-90"
    optimizer = tmp_path / "checkpoint-90" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-40])
    assert last_checkpoint(tmp_path).name == "checkpoint-5"
    (tmp_path / "checkpoint-5" / "rng_state.pth").unlink()
    assert last_checkpoint(tmp_path) is None


def test_what_to_go_on_from(tmp_path):
    assert find_resume(None, str(tmp_path)) is None
    assert find_resume("last", str(tmp_path)) is None
    path = checkpoint(tmp_path, 3)
    assert find_resume("last", str(tmp_path)) == find_resume(str(path), str(tmp_path)) == str(path)
    with pytest.raises(GranulonError, match="--resume_from_checkpoint last"):
        find_resume(None, str(tmp_path))
    with pytest.raises(GranulonError, match="none"):
        find_resume(str(tmp_path / "none"), str(tmp_path))


@pytest.mark.parametrize("resume", ["last", "True"])
def test_damaged_checkpoints_are_not_the_same_as_none(tmp_path, resume):
    assert find_resume(resume, str(tmp_path / "new")) is None
    for step in (2, 4):
        checkpoint(tmp_path, step, whole=False)
    with pytest.raises(GranulonError, match="checkpoint-4, checkpoint-2"):
        find_resume(resume, str(tmp_path))


@pytest.mark.parametrize("name", ["adapter.safetensors", "model.safetensors", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("resume", [None, "last"])
def test_weights_without_a_checkpoint_are_not_overwritten(tmp_path, name, resume):
    (tmp_path / name).touch()
    with pytest.raises(GranulonError, match=name):
        find_resume(resume, str(tmp_path))


def test_places_that_are_no_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "run", file / "a" / "b"):
        with pytest.raises(GranulonError, match="file"):
            find_resume(None, str(place))


def test_unfinished_checkpoints_are_removed(tmp_path):
    checkpoint(tmp_path / ".unfinished", 4)
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_changed_settings_are_named(tmp_path):
    class Group:
        def __init__(self, **values):
            self.__dict__.update(values)

    path = tmp_path / "run.json"
    settings = settings_of(
        Group(learning_rate=1e-4, logging_steps=5, save_full=False, output_dir="a", callback=print), world_size=2
    )
    assert "callback" not in settings and "output_dir" not in settings
    check_settings(path, settings)  # nothing to compare with
    path.write_text(json.dumps({"settings": settings}))
    check_settings(path, {**settings, "logging_steps": 50, "save_full": True})
    path.write_text(json.dumps({"settings": settings, "data": {"rows": [1, 2]}}))
    check_settings(path, settings, {"rows": (1, 2)})
    with pytest.raises(GranulonError, match="rows"):
        check_settings(path, settings, {"rows": [2, 1]})
    with pytest.raises(GranulonError, match=r"learning_rate .*0.0001.* 0.1.* world_size .*2.* 4"):
        check_settings(path, {**settings, "learning_rate": 0.1, "world_size": 4})
