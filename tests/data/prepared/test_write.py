"""Writing a prepared folder: one process at a time, and nothing left of the lock."""

from contextlib import suppress

import pytest
from filelock import FileLock

from granulon_hf.data import load, prepare
from granulon_hf.data.prepared.write import LOCK, locked
from granulon_hf.errors import GranulonError
from tests.data import tables


@pytest.fixture
def source(tmp_path):
    records = [{"id": str(i), "image": "a.jpg", "conversations": tables.turn("<image>", f"A{i}")} for i in range(3)]
    return tables.chat(tmp_path / "chat", records)


def test_a_folder_that_another_process_writes(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / LOCK), pytest.raises(GranulonError):
        prepare("llava", out, source=source)
    assert not (out / "manifest.json").exists()
    prepare("llava", out, source=source)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "data", "manifest.json"]
    assert len(load(out)) == 3


def test_a_lock_that_a_killed_process_left(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).touch()
    assert prepare("llava", tmp_path / "out", source=source)["prepared"]["samples"] == 3


def test_a_folder_made_for_nothing_is_taken_away(tmp_path):
    for folder, stays in ((tmp_path / "new" / "out", False), (tmp_path, True)):
        with suppress(ZeroDivisionError), locked(folder):
            assert (folder / LOCK).exists()
            raise ZeroDivisionError
        assert folder.exists() == stays and not (folder / LOCK).exists()
