"""How the command starts: nothing heavy for a help text, and no traceback where Ctrl-C comes early."""

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.cli.serve import Serve

from granulon_hf.cli import serve
from tests.conftest import make_picture

HEAVY = ("torch", "transformers", "datasets")
WALK = f"""
import contextlib, io, json, runpy, sys
import typer
from granulon_hf.cli import app

def paths(command, path=()):
    yield path
    for name, inner in getattr(command, "commands", {{}}).items():
        yield from paths(inner, (*path, name))

found = {{}}
for path in [("--version",), *((*path, "--help") for path in paths(typer.main.get_command(app)))]:
    sys.argv, text = ["granulon", *path], io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_module("granulon_hf", run_name="__main__")
    text.seek(0)
    found[" ".join(path)] = [text.read(), [name for name in {HEAVY} if name in sys.modules]]
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
def test_no_help_imports_what_takes_long():
    done = subprocess.run([sys.executable, "-c", WALK], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) > 20
    for command, (text, imported) in found.items():
        assert imported == [], command
        assert "granulon" in text, command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("typer", ["--help"]),
        ("torch", ["ask", "photo.png", "What is it?"]),
        ("torch", ["data", "check", "folder"]),
        ("torch", ["eval", "run", "--model", "tiny:clip-qwen2.5"]),
        ("transformers", ["serve", "folder"]),
    ],
)
def test_an_early_interrupt_leaves_no_traceback(module, arguments, tmp_path):
    make_picture(0).save(tmp_path / "photo.png")
    (tmp_path / "first").mkdir()
    # Stands for a long import: it says that it has begun, and waits.
    (tmp_path / "first" / f"{module}.py").write_text("import signal\nprint('importing', flush=True)\nsignal.pause()\n")
    path = os.pathsep.join([str(tmp_path / "first"), str(Path(__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, "-m", "granulon_hf", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_serve_takes_the_options_of_transformers():
    def described(signature):
        return [
            (one.name, str(one.default), [getattr(part, "help", None) for part in one.annotation.__metadata__])
            for one in signature.parameters.values()
        ]

    theirs, own = described(inspect.signature(Serve)), described(inspect.signature(serve))
    assert own[: len(theirs)] == theirs
    assert [name for name, *_ in own[len(theirs) :]] == ["allow_remote_images", "max_requests", "max_batch"]


def test_serve_of_another_transformers_takes_a_model(monkeypatch):
    work = sys.modules["granulon_hf.cli.serve"]
    monkeypatch.setattr(work, "find_spec", lambda name: None)
    assert list(work.serve_options().parameters) == ["force_model"]
