"""The `granulon` command: one module per subcommand.

Modules here import nothing that takes long at their top, since `granulon --help` has to be there at once: what a command works
with is imported when it runs.
"""

import sys
from typing import Annotated

import psutil
import typer

import granulon_hf
from granulon_hf.cli import analyze, controller, data, judge
from granulon_hf.cli import eval as evaluation
from granulon_hf.cli.ask import ask
from granulon_hf.cli.demo import demo
from granulon_hf.cli.gallery import gallery
from granulon_hf.cli.push import push
from granulon_hf.cli.serve import serve

app = typer.Typer(
    help="Granulon: multimodal language models that choose the granularity of their visual tokens.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (ask, demo, push, serve):
    app.command()(command)
analyze.app.command()(gallery)
for name, group in {"analyze": analyze, "controller": controller, "data": data, "eval": evaluation, "judge": judge}.items():
    app.add_typer(group.app, name=name)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"granulon_hf {granulon_hf.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    # A callback keeps `ask` a command of its own however many there are.
    pass


def main() -> None:
    """Run the command line that the process was started with."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer must not be lost to a terminal that knows fewer characters
            stream.reconfigure(errors="replace")
    # Starting takes a while: `ask` counts from when the process began.
    app(prog_name="granulon", obj=psutil.Process().create_time())
