"""What all subcommands share."""

import functools
from collections.abc import Callable

import typer


class BadInput(Exception):
    """What the user gave cannot be used; the message is one sentence that says what is wrong and what to do."""


def reports_bad_input(command: Callable) -> Callable:
    """Turn any failure into one sentence on stderr and exit code 2; with `--debug` the traceback is shown instead."""

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
            if isinstance(error, BadInput):
                message = str(error)
            else:
                reason = " ".join(str(error).split()) or "no further explanation"
                message = f"{type(error).__name__}: {reason} (--debug shows where)"
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(2) from None

    return wrapper


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
