"""`granulon serve`: `transformers serve` for Granulon models."""

import ast
import asyncio
import functools
import inspect
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from granulon_hf.cli.common import reports_bad_input
from granulon_hf.errors import GranulonError


@reports_bad_input(extra="serve")
def check(force_model: Annotated[str | None, typer.Argument()] = None) -> Any:
    """Return the config of the model; raise GranulonError where no server could be started, before weights are read."""
    from transformers.utils.import_utils import is_serve_available

    from granulon_hf.loading import read_config

    if not is_serve_available():
        raise GranulonError("The server needs more packages; run: pip install 'granulon-hf[serve]'")
    return None if force_model is None else read_config(force_model.partition("@")[0])


def serve_options() -> inspect.Signature:
    """Return the options of `transformers serve`, read from its source: importing it takes seconds, which --help must not."""
    package = find_spec("transformers")
    path = Path(str(package and package.origin)).with_name("cli") / "serve.py"
    names: dict[str, Any] = {"__name__": __name__}
    try:
        statements: list[ast.stmt] = [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ClassDef)
            or (isinstance(node, ast.ImportFrom) and not node.level and str(node.module).partition(".")[0] != "transformers")
        ]
        exec(compile(ast.Module(statements, []), str(path), "exec"), names)
        return inspect.signature(names["Serve"])
    except Exception:  # a transformers that is too old, or so new that it says its options in another way
        return inspect.signature(check)


def serve(**options: Any) -> None:
    """Serve a Granulon model with an OpenAI-compatible API; options are those of `transformers serve`, and three more."""
    own = {name: options.pop(name) for name in ("allow_remote_images", "max_requests")}
    max_batch = options.pop("max_batch")
    config = check(options["force_model"])
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server, utils

    from granulon_hf.serving import Gate
    from granulon_hf.serving_batches import BatchManager
    from granulon_hf.serving_metrics import Metrics

    build, metrics, loop = server.build_server, Metrics(), asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def build_guarded(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        app.add_route("/metrics", metrics.respond, methods=["GET"])
        app.add_middleware(Gate, config=config, metrics=metrics, loop=loop, **own)
        return app

    server.build_server = build_guarded
    utils.GenerateManager = functools.partial(BatchManager, max_batch, metrics)  # type: ignore[assignment, misc]
    Serve(**options)  # the Auto classes know Granulon by now


def own_options(
    allow_remote_images: Annotated[
        bool, typer.Option(help="Fetch pictures that a request names by http(s), from public addresses only.")
    ] = False,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests that may run or wait; further ones get 503 and come back later.")
    ] = 32,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Requests that are answered together, if they wait; 1 for one after the other.")
    ] = 8,
) -> None:
    """Carry the options that `transformers serve` does not have."""


theirs = serve_options()
parameters = [*theirs.parameters.values(), *inspect.signature(own_options).parameters.values()]
serve.__signature__ = theirs.replace(parameters=parameters)  # type: ignore[attr-defined]
