"""`granulon serve`: `transformers serve` for Granulon models."""

import functools

from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from granulon_hf.cli.ask import read_config
from granulon_hf.cli.common import reports_bad_input
from granulon_hf.errors import GranulonError


@reports_bad_input
def check(model: str | None) -> None:
    """Raises GranulonError where no server could be started, before weights are read."""
    if not is_serve_available():
        raise GranulonError("The server needs more packages; run: pip install 'granulon-hf[serve]'")
    if model is not None:
        read_config(model.partition("@")[0], model)


@functools.wraps(Serve, assigned=())  # its options, our help
def serve(**options) -> None:
    """Serve a Granulon model with an OpenAI-compatible API; the options are those of `transformers serve`."""
    check(options["force_model"])
    Serve(**options)  # importing this package has made Granulon known to it
