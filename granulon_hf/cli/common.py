"""What all subcommands share."""

import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from granulon_hf.errors import GranulonError
from granulon_hf.io import existing

DATA_WARNINGS = r".* rows were asked for"
# Options of `granulon data prepare` that other commands may have to send people to.
PREPARING = {"source", "holdout", "column", "revision", "max_files"}


def reports_bad_input(command: Callable) -> Callable:
    """Turn any failure into one sentence on stderr and exit code 2; with `--debug` the traceback is shown instead."""
    names = inspect.signature(command).parameters

    @functools.wraps(command)
    def wrapper(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if kwargs.get("debug"):
                raise
            if isinstance(error, GranulonError):
                message = str(error)
            elif isinstance(error, OSError) and error.filename:
                message = f"{os.fspath(error.filename)!r} cannot be used: {error.strerror}."
            else:
                reason = " ".join(str(error).split()) or "no further explanation"
                message = f"{type(error).__name__}: {reason} (--debug shows where)"
            typer.echo(f"Error: {in_options(message, names)}", err=True)
            raise typer.Exit(2) from None

    return wrapper


def in_options(message: str, names: Collection[str]) -> str:
    """A message of the package, which names arguments as Python does, with the options of a command in their place.

    An argument stands in backticks, before `=`, begins a sentence or has an underscore: "`limit`", "source=…", "holdout=20",
    "rpm must be", "max_cost".

    Args:
        names (`Collection[str]`): the parameters of the command.
    """

    def option(match: re.Match) -> str:
        bare = match["first"] or match["bare"]
        name = match["marked"] or match["given"] or bare
        if name is None:  # what somebody else called something, in quotes
            return match[0]
        forms = (name, name.removesuffix("s"))
        known = next((form for form in forms if form in names), None)
        name = known or next((form for form in forms if form in PREPARING and not bare), "")
        if not name:
            return match[0]
        option = f"--{name.replace('_', '-')}{' ' if match['value'] else ''}{match['value'] or ''}"
        return option if known else f"{option} of granulon data prepare"

    quoted, marked = r"(?<!\w)(?:'[^']*'|\"[^\"]*\")(?!\w)", r"`(?P<marked>\w+)`"
    given = r"(?<![\w-])(?P<given>[a-z_]+)=(?:…|\{[^}]*\}|(?P<value>\w+|'[^']*')|(?=[\s.,;]))"
    bare = r"(?:^(?P<first>[a-z]+)(?= (?:is|must) )|(?<![\w/.-])(?P<bare>[a-z]+(?:_[a-z]+)+)(?![\w/=]|\.\w))"
    return re.sub(f"{quoted}|{marked}|{given}|{bare}", option, message)


def one_line(error: Exception) -> str:
    """What an error says, without Python's numbers and names for what is wrong with a file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(reason := getattr(error, "reason", None), Exception):  # of an address that cannot be opened
        return one_line(reason)
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return " ".join(str(error).split()) or type(error).__name__


def check_out(out: Path) -> None:
    """Raises GranulonError where this folder cannot be made or written, before anything is computed for it."""
    nearest = existing(out)
    if not nearest.is_dir():
        raise GranulonError(f"--out {str(out)!r} takes a folder, and {str(nearest)!r} is a file; name another one.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise GranulonError(f"--out {str(out)!r} cannot be written: {str(nearest)!r} does not allow it; name another folder.")


@contextmanager
def plain_warnings(show: Callable[[str], None]) -> Iterator[None]:
    """What the data's readers warn of, as a line without the place in the source; other warnings as they are."""
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


def check_models(sources: Sequence[str], device: str, dtype: str) -> None:
    """Raises ValueError for what can be seen to be wrong before weights are read."""
    from granulon_hf import loading as models
    from granulon_hf import variants

    if dtype not in models.DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; the choices are {', '.join(models.DTYPES)}.")
    models.pick_device(device)
    for source in sources:
        if source.startswith("tiny:"):
            variants.parse(source.removeprefix("tiny:"))
        elif source != "demo":
            models.check_config(os.path.expanduser(source))


def loader(source: str, device: str, dtype: str) -> tuple[Any, Any, str]:
    """Also the embedded demo model, by the name "demo"."""
    from transformers.utils import logging

    from granulon_hf.loading import load_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # there is one of the evaluation's own
    if source == "demo":
        from granulon_hf.demo import demo_folder

        model, processor, _ = load_model(str(demo_folder()), device, dtype)
        return model, processor, "demo"
    return load_model(source, device, dtype)
