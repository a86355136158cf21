"""What all subcommands share. Nothing here takes long to import."""

import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from granulon_hf.errors import GranulonError, one_line
from granulon_hf.io import existing

DATA_WARNINGS = r".* rows were asked for"
# Options of `granulon data prepare` that other commands may have to send people to.
PREPARING = {"source", "holdout", "column", "revision", "max_files"}

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def reports_bad_input(command: Callable | None = None, *, extra: str | None = None, resumes: bool = False) -> Callable:
    """Turn any failure into one sentence on stderr and exit code 2; with `--debug` the traceback is shown instead.

    Args:
        command (`callable`): takes `debug`.
        extra (`str`, *optional*): the package's extra that installs what the command imports.
        resumes (`bool`): whether the same command goes on where Ctrl-C stopped it.
    """
    if command is None:
        return functools.partial(reports_bad_input, extra=extra, resumes=resumes)
    names = inspect.signature(command).parameters

    @functools.wraps(command)
    def wrapper(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            if resumes:
                typer.echo("Interrupted; what is done is kept: run the same command again to go on.", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if kwargs.get("debug"):
                raise
            typer.echo(f"Error: {in_options(explain(error, extra), names)}", err=True)
            raise typer.Exit(2) from None

    return wrapper


def explain(error: Exception, extra: str | None) -> str:
    """Say in one sentence what went wrong."""
    if isinstance(error, GranulonError):
        return " ".join(str(error).split("\n"))
    if isinstance(error, ModuleNotFoundError) and error.name and extra:
        return f'This needs the package {error.name.partition(".")[0]}; run: pip install "granulon-hf[{extra}]"'
    if isinstance(error, OSError):
        place = f"{os.fspath(error.filename)!r} cannot be used: " if error.filename else ""
        return f"{place}{one_line(error).rstrip('.')}."
    # What modeling/ says of values is a sentence, and so is what the package says of packages that it misses.
    kind = "" if type(error) in (ValueError, ImportError) else f"{type(error).__name__}: "
    reason = " ".join(str(error).split()) or "no further explanation"
    return f"{kind}{reason} (--debug shows where)"


def in_options(message: str, names: Collection[str]) -> str:
    """Put the options of a command, whose parameters are `names`, in the place of Python's arguments in a message.

    An argument stands in backticks, before `=`, begins a sentence or has an underscore: "`limit`", "source=…", "holdout=20",
    "rpm must be", "max_cost".
    """

    said = {form: name for name in {*PREPARING, *names} for form in (name, f"{name}s")}

    def option(match: re.Match) -> str:
        bare = match["first"] or match["bare"]
        written = match["marked"] or match["given"] or bare
        name = said.get(written)
        if name is None or (bare and name not in names):  # also what somebody else called something, in quotes
            return match[0]
        if name == "source" and "data" in names and name not in names:  # `granulon eval run` says it with the set
            return "--data NAME=FOLDER"
        option = f"--{name.replace('_', '-')}{' ' if match['value'] else ''}{match['value'] or ''}"
        return option if name in names else f"{option} of granulon data prepare"

    quoted, marked = r"(?<!\w)(?:'[^']*'|\"[^\"]*\")(?!\w)", r"`(?P<marked>\w+)`"
    given = r"(?<![\w-])(?P<given>[a-z_]+)=(?:…|\{[^}]*\}|(?P<value>\w+|'[^']*')|(?=[\s.,;]))"
    bare = r"(?:^(?P<first>[a-z]+)(?= (?:is|must) )|(?<![\w/.-])(?P<bare>[a-z]+(?:_[a-z]+)+)(?![\w/=]|\.\w))"
    return re.sub(f"{quoted}|{marked}|{given}|{bare}", option, message)


def pairs(options: list[str] | None, name: str, form: str = "FIELD=COLUMN, as --column prediction=answer") -> dict[str, str]:
    """Read `["a=b"]` as `{"a": "b"}`."""
    found: dict[str, str] = {}
    for option in options or []:
        key, _, value = option.partition("=")
        if key in found:
            raise GranulonError(f"{name} takes {form}; {key!r} is there twice.")
        if not (key and value):
            raise GranulonError(f"{name} takes {form}; got {option!r}.")
        found[key] = value
    return found


def check_out(out: Path) -> None:
    """Raise GranulonError where this folder cannot be made or written, before anything is computed for it."""
    nearest = existing(out)
    if not nearest.is_dir():
        raise GranulonError(f"--out {str(out)!r} takes a folder, and {str(nearest)!r} is a file; name another one.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise GranulonError(f"--out {str(out)!r} cannot be written: {str(nearest)!r} does not allow it; name another folder.")


def note(line: str) -> None:
    typer.echo(f"Note: {line}", err=True)


@contextmanager
def plain_warnings(show: Callable[[str], None] = note) -> Iterator[None]:
    """Show what the data's readers warn of as a line without the place in the source; other warnings stay as they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=DATA_WARNINGS)
        shown = warnings.showwarning

        def showwarning(message: Any, *args: Any, **kwargs: Any) -> None:
            if re.match(DATA_WARNINGS, str(message)):
                show(" ".join(str(message).split()))
            else:
                shown(message, *args, **kwargs)

        warnings.showwarning = showwarning
        yield


def quiet(debug: bool = False) -> None:
    """Keep the bars of transformers off the screen and, without `debug`, its notes and those of the Hub."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    if not debug:
        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Callable[..., Any]]:
    """Show a bar on stderr, if that is a terminal; yields what takes the fields of `rich.progress.Progress.update`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield functools.partial(bar.update, bar.add_task(escape(what), total=total))
