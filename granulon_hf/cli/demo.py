"""`granulon demo`: the embedded demo model, and the page that asks it or any other model."""

from typing import Annotated

import typer

from granulon_hf.cli.common import Debug, Device, quiet, reports_bad_input
from granulon_hf.errors import GranulonError


@reports_bad_input(extra="demo")
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
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Serve a page that answers questions about pictures; without --serve, print the folder of the embedded demo model.

    The folder is assembled at first use, and is good for every --model: granulon ask photo.jpg "…?" --model $(granulon demo).
    """
    if not serve:
        if model is not None or port is not None or share or host != "127.0.0.1":
            raise GranulonError("--model, --host, --port and --share are of the page; add --serve.")
        from granulon_hf.loading import find_source

        typer.echo(find_source("demo"))
        return
    from granulon_hf.demo import app

    quiet(debug=True)
    app.main(model, host, port, share, device)
