"""README, guides and docstrings: their Python runs, their commands and options exist, their links lead somewhere."""

import argparse
import ast
import doctest
import functools
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from huggingface_hub.cli.hf import app as hf
from torch.distributed.run import get_args_parser
from transformers.testing_utils import HfDocTestParser

import granulon_hf.demo
from granulon_hf import variants
from granulon_hf.cli import app
from granulon_hf.errors import GranulonError
from tests.conftest import make_picture
from tests.judge.server import Server

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").rglob("*.md"))]
GUIDES += sorted((ROOT / "granulon_hf").rglob("README.md"))
SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".yaml", ".sh"))
SOURCES = sorted(path for folder in ("granulon_hf", "modeling", "cards") for path in (ROOT / folder).rglob("*.py"))
# Guides whose Python needs more than a toy model, and the test that runs it.
RUN_ELSEWHERE = {
    "examples/hub_and_serving.md": "tests/examples/test_serving.py",
    "examples/quantization.md": "tests/modeling/test_quantization.py",
}
# Numbers and pictures in guides, and those with which they run in a second.
SMALLER = {"scenes=2000": "scenes=4", "scenes=7000": "scenes=3", "scenes=500": "scenes=4", "split, 3000,": "split, 60,"}
SMALLER |= {'folder="pictures"': "", '"pictures': '"drawn'}
SMALLER |= {"max_new_tokens=20": "max_new_tokens=3", "max_new_tokens=8": "max_new_tokens=3"}
# Programs of others, whose options are theirs.
FOREIGN = {".", "apt-get", "cd", "dpkg", "export", "for", "done", "lmms-eval", "ls", "mkdir", "tar", "transformers", "vllm"}
OURS = ("granulon ", "make ", "python ", "accelerate launch ", "torchrun ", "examples/")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> Iterator[tuple[str, bool]]:
    """The code blocks of a guide, and whether each is to be run."""
    pattern = rf"(<!-- not run: .*? -->\n+)?^```{language}\n(.*?)^```"
    for match in re.finditer(pattern, path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        yield match[2], not match[1]


# --- Python -----------------------------------------------------------------------------------------------------------


def with_examples(path: Path) -> bool:
    return re.search(r"^\s*>>> ", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


@pytest.mark.parametrize("path", filter(with_examples, SOURCES), ids=name_of)
def test_examples_in_docstrings(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = import_module(".".join(parts if parts[0] == "granulon_hf" else ("granulon_hf", *parts)))
    tests = [test for test in doctest.DocTestFinder(parser=HfDocTestParser()).find(module) if test.examples]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    output: list[str] = []
    for test in tests:
        runner.run(test, out=output.append)
    assert tests and not runner.failures, "".join(output)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    for part in variants.build("granulon-qwen2.5", tiny=True):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(toy_folder, tmp_path, monkeypatch):
    """A working folder with what the guides take for granted; yields the names that they do."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "granulon").mkdir()
    (tmp_path / "granulon/judge").symlink_to(ROOT / "granulon_hf/judge")
    make_picture(0).save(tmp_path / "cat.jpg")
    (tmp_path / "chat/images").mkdir(parents=True)
    make_picture(1).save(tmp_path / "chat/images/1.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "chat/chat.json").write_text(json.dumps([{"id": "1", "image": "1.jpg", "conversations": turns}]))
    table = datasets.Dataset.from_dict({"picture": [str(tmp_path / "cat.jpg")], "q": ["What is it?"], "a": ["A cat."]})
    monkeypatch.setattr(granulon_hf.demo, "demo_folder", lambda: toy_folder)
    with Server() as server:
        for name, value in {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        yield {"my_dataset": table.cast_column("picture", datasets.Image())}


@pytest.mark.parametrize("path", [path for path in GUIDES if any(blocks(path, "python"))], ids=name_of)
def test_the_python_of_a_guide_runs(path, workplace):
    torch.manual_seed(0)
    for code, wanted in blocks(path, "python"):
        for old, new in SMALLER.items():
            code = code.replace(old, new)
        compiled = compile(code, str(path), "exec")
        if name_of(path) in RUN_ELSEWHERE:
            assert path.name in (ROOT / RUN_ELSEWHERE[name_of(path)]).read_text()
        elif wanted:
            exec(compiled, workplace)


@pytest.mark.slow
def test_make_docs(tmp_path):
    """`make docs` in an environment that is already set up."""
    pytest.importorskip("pdoc")
    binary = tmp_path / "venv/bin/python"
    binary.parent.mkdir(parents=True)
    binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    binary.chmod(0o755)
    for stamp in (".demo", ".docs"):
        (tmp_path / "venv" / stamp).touch()
    command = ["make", "docs", f"VENV={tmp_path / 'venv'}", f"DOCS={tmp_path / 'docs'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for module in ("granulon_hf", "granulon_hf/variants", "granulon_hf/data/collator", "granulon_hf/judge/judge"):
        assert (tmp_path / f"docs/{module}.html").is_file()
    page = tmp_path / "docs/granulon_hf/modeling/configuration_granulon.html"
    assert "<strong>num_semantic_tokens (" in page.read_text()  # arguments are a list


# --- commands ---------------------------------------------------------------------------------------------------------


class Captured(BaseException):
    """Carries a script's parser out of the script."""


@functools.cache
def parser_of(path: Path) -> argparse.ArgumentParser | None:
    """The parser with which a script of ours reads its command line."""

    def capture(self, *args, **kwargs):
        raise Captured(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        patch.setattr(sys, "argv", [str(path)])
        patch.syspath_prepend(path.parent)
        package = path.parent.relative_to(ROOT) if (path.parent / "__init__.py").exists() else None
        try:
            if package:
                runpy.run_module(".".join([*package.parts, path.stem]), run_name="__main__")
            else:
                runpy.run_path(str(path), run_name="__main__")
        except Captured as captured:
            return captured.args[0]
        except (IndexError, SystemExit):  # it takes a folder, and no options
            return None
    raise AssertionError(f"{path} does something without arguments before it reads its command line.")


def check_script(path: Path, words: list[str]) -> None:
    assert path.is_file(), f"There is no {path}."
    if path.name == "train.py" and words and words[0].endswith(".yaml"):
        assert words[0] == "RECIPE.yaml" or (ROOT / words[0]).is_file(), f"There is no {words[0]}."
        words = words[1:]
    parser, words = parser_of(path), [word for word in words if word != "--help"]
    unknown = parser.parse_known_args(words)[1] if parser else [word for word in words if word.startswith("-")]
    assert not unknown, f"{path} has no {unknown}."


def check_granulon(words: list[str], whole: bool = True) -> None:
    """That the command exists, that it has these options, and that none it needs is missing."""
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="granulon")
    given, words, _ = command.make_parser(context).parse_args(words)
    while hasattr(command, "get_command") and words and not words[0].isupper():
        command = command.get_command(context, words[0])
        assert command is not None, f"There is no command {words[0]}."
        context = command.context_class(command, info_name=words[0], parent=context)
        given, words, _ = command.make_parser(context).parse_args(words[1:])
    assert not words or words[0].isupper(), f"{context.command_path} takes no {words}."
    for parameter in command.params:
        missing = whole and parameter.required and not given.get(parameter.name)
        assert not missing, f"{context.command_path} needs {parameter.name}."


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        module, *words = words[1:]
        if module == "granulon_hf":
            check_granulon(words)
        elif module.startswith("examples."):
            check_script(ROOT / f"{module.replace('.', '/')}.py", words)
        elif module.startswith("tests."):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"There is no {module}."
        else:
            foreign = ("build", "lmms_eval", "pytest", "sglang", "twine", "venv", "vllm")
            assert module.partition(".")[0] in foreign, f"{module} is not known."
    elif words[0] != "-c":
        check_script(ROOT / words[0], words[1:])


def check_launch(parser: argparse.ArgumentParser, words: list[str]) -> None:
    args = parser.parse_args(words)
    if config := getattr(args, "config_file", None):
        assert (ROOT / config).is_file(), f"There is no {config}."
    check_python([*(["-m"] if args.module else []), args.training_script, *args.training_script_args])


def check_hf(words: list[str]) -> None:
    """That the Hub's command takes these options, and that what a job runs exists."""
    command = hf
    while hasattr(command, "get_command"):
        context = command.context_class(command, info_name="hf")
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, f"hf has no command {name}."
    given = command.make_context("hf", words).params
    if command.name == "run":
        assert not given["image"].startswith("-"), f"hf jobs run has no {given['image']}."
        check_command(given["command"])


def check_command(words: list[str], whole: bool = True) -> None:
    while words and (words[0] == "do" or re.match(r"\w+=", words[0])):
        words = words[1:]
    if not words:
        return
    program, *rest = words
    match program:
        case "granulon":
            check_granulon(rest, whole)
        case "python" | "python3":
            check_python(rest)
        case "accelerate":
            check_launch(launch_command_parser(), rest[1:])
        case "torchrun":
            check_launch(get_args_parser(), rest)
        case "hf":
            check_hf(rest)
        case "bash" if rest[0] == "-c":
            check_line(" ".join(lines(rest[1])), whole)
        case "make":
            targets = [word for word in rest if "=" not in word]
            assert all(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for word in targets), targets
        case "pip":
            extras = {name for word in rest for found in re.findall(r"\[([\w,]+)\]", word) for name in found.split(",")}
            assert extras <= set(PROJECT["optional-dependencies"]), extras
        case _ if program.endswith(".sh"):
            assert (ROOT / program).is_file(), program
        case _:
            assert program in FOREIGN, f"{program} is not known."


def split(line: str) -> Iterator[list[str]]:
    """The commands of a line of the shell as words; dots that stand for a value become one, others are left out."""
    for inner in re.findall(r"\$\(([^()]+)\)", line):
        yield from split(inner)
    line = re.sub(r"<[a-z ]+>", "…", line)
    lexer = shlex.shlex(re.sub(r"\$\(([^()]+)\)", "VALUE", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();&|<>"):
            yield words
            words = []
        elif word != "…" or (words and words[-1].startswith("--")):
            words.append(word)


def check_line(line: str, whole: bool = True) -> None:
    for words in split(line):
        check_command(words, whole)


def lines(text: str) -> Iterator[str]:
    yield from text.replace("\\\n", " ").splitlines()


def commands_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Command lines of a guide, or of a script's docstring or comments, and whether each is whole."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        for code, _ in blocks(path, "bash"):
            yield from ((line, True) for line in lines(code))
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        yield from ((code, False) for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith((*OURS[:3], "pip ")))
    else:
        python = path.suffix == ".py"
        said = ast.get_docstring(ast.parse(text)) or "" if python else re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        yield from ((line.strip(), True) for line in lines(said) if line.strip().startswith(OURS))


@pytest.mark.parametrize("path", [*GUIDES, *SCRIPTS], ids=name_of)
def test_commands_and_options_exist(path):
    for line, whole in commands_of(path):
        check_line(line, whole)


@pytest.mark.parametrize(
    "line",
    [
        "granulon ask photo.jpg --modle demo",
        "granulon analyze layers --model demo",
        "granulon data prepare flux-reason",
        "granulon ask photo.jpg question | granulon judge run --dry predictions.jsonl",
        'granulon serve "$(granulon demo --folder)"',
        "python examples/train_controller.py --stepz 3",
        "accelerate launch --config_file examples/accelerate_zero3.yaml examples/train.py",
        "accelerate launch --num_procs 2 examples/train.py",
        "accelerate launch examples/train.py examples/none.yaml",
        "OMP_NUM_THREADS=1 accelerate launch examples/train.py … --max_stepz 3",
        "torchrun --nproc_per_node 2 -m granulon_hf eval run --model demo --sets shapes",
        "python -m examples.experiment.run examples/experiment/quick.yaml --armz pixel --out study",
        "pip install -e '.[trian]'",
        "make tests",
        "hf jobs run --flavour a100-large python:3.12 true",
        "hf jobs run python:3.12 bash -c 'cd /job && accelerate launch examples/train.py --max_stepz 3'",
        "hf jobs log JOB",
        "examples/fetch.sh pictures",
    ],
)
def test_a_wrong_command_is_noticed(line):
    with pytest.raises((AssertionError, GranulonError, typer.BadParameter.__base__, SystemExit)):
        check_line(line)


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*GUIDES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for file in re.findall(r"`((?:cards|examples|granulon_hf|modeling|tests)/[\w./-]+)`", text):
        assert (ROOT / file).exists(), file


def test_the_readme_is_short_and_names_every_guide():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert [path.name for path in (ROOT / "examples").glob("*.md") if f"](examples/{path.name}" not in text] == []
    assert f"version = {{{PROJECT['version']}}}" in text
