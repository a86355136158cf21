"""Files that are whole or not there, and journals that survive a kill."""

import json
import os
import signal
import subprocess
import sys

import pytest

from granulon_hf.io import Journal, batches, replacing, write_text

ROW = {"id": "a", "text": "漢字 \u2028 \n"}


def test_what_is_replaced_stays_until_the_end(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(TypeError), replacing(path) as part:
        part.write_text(len(part.name))
    assert path.read_text() == "before"
    with replacing(path) as part:
        part.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_journal_gives_what_was_added(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    assert list(journal) == []
    journal.append([ROW, {"id": "b"}])
    journal.append([{"id": "c"}])
    assert list(journal) == [ROW, {"id": "b"}, {"id": "c"}]


@pytest.mark.parametrize("torn", [b'{"id": "b", "te', b'{"id": "b"}\n{"id"', b"\xff\xfe", b"null\n7\n[]\n", b'{"no": "id"}\n'])
def test_torn_and_damaged_lines_are_no_rows(tmp_path, torn):
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append([ROW])
    with open(journal.path, "ab") as file:
        file.write(torn)
    journal.append([{"id": "c"}])
    rows = list(journal)
    assert rows[0] == ROW
    assert rows[-1] == {"id": "c"}
    assert [row["id"] for row in rows] in (["a", "c"], ["a", "b", "c"])


@pytest.mark.slow
def test_a_killed_writer_loses_no_row_that_it_told_of(tmp_path):
    script = (
        "import sys; from granulon_hf.io import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for i in range(10**6):\n    journal.append([{'id': str(i)}]); print(i, flush=True)"
    )
    path = tmp_path / "rows.jsonl"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        told = [process.stdout.readline().strip() for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        told += process.stdout.read().split()
    rows = [row["id"] for row in Journal(path)]
    assert rows[: len(told)] == told
    assert all(json.loads(line) for line in path.read_bytes().split(b"\n")[: len(told)])


def test_batches():
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
