"""The judge's server: the client that talks to it, what its errors mean, and the models that it serves."""

import asyncio
import contextlib
import os
from typing import Any

import openai

from .models import choices
from .options import Options

NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
FATAL = {
    401: "The API key is not accepted; set OPENAI_API_KEY to one that is",
    402: "The account has no quota left; check plan and billing, then run again to go on",
    403: "The API key may not use this model or server; check its project and region",
    404: "The server does not know the model or address; check model= and base_url=",
}


class JudgeError(RuntimeError):
    """The run cannot go on: one sentence says why and what to do. What was paid for is in the store."""


def connect(options: Options) -> openai.AsyncOpenAI:
    """Return the client for OpenAI, Azure or a server of the user's own, as the options and OpenAI's variables say."""
    keyed = options.api_key or os.environ.get("OPENAI_API_KEY")
    api_key = "none" if options.address and not (keyed or options.is_azure) else options.api_key  # a server of one's own
    if options.known.base_url:  # a server of this judge alone, which nobody's other key is for
        api_key = os.environ.get(options.known.api_key_env or "", "none")
    common: dict[str, Any] = {
        "api_key": api_key,
        "organization": options.organization,
        # Of chat completions the run repeats what failed itself, within its budgets.
        "max_retries": options.max_retries if options.backend == "batch" else 0,
        "timeout": options.timeout,
    }
    try:
        if options.is_azure:
            common |= {"azure_endpoint": options.azure_endpoint, "api_version": options.api_version}
            return openai.AsyncAzureOpenAI(**common)
        return openai.AsyncOpenAI(base_url=options.known.base_url or options.base_url, **common)
    except (openai.OpenAIError, ValueError) as error:
        azure = "AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_KEY and OPENAI_API_VERSION"
        known = azure if options.is_azure else "OPENAI_API_KEY"
        raise JudgeError(f"No judge to talk to: set {known}, or base_url= for a server of your own.") from error


async def served(client: openai.AsyncOpenAI, options: Options) -> str:
    """Say which judges there are: those that the server lists or, at OpenAI's, those of the table."""
    names = choices(options.judge_models) if options.is_openai else []
    if not options.is_openai:
        with contextlib.suppress(Exception):  # whatever a server that has no such list answers
            page = await client.with_options(max_retries=0, timeout=10).models.list()
            names = [model.id for model in page.data if isinstance(model.id, str)]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"choose one of {', '.join(names[:20])}{more}" if names else "see which models it serves"


def triage(error: Exception) -> tuple[str, str]:
    """Return an error's kind, "fatal" (stop the run), "limit" (wait), "retry" or "bad" (give this unit up), and its message."""
    if isinstance(error, openai.APITimeoutError | asyncio.TimeoutError):
        return "retry", "timeout: the server did not answer in time"
    if isinstance(error, openai.APIConnectionError):
        return "retry", f"connection: {error.__cause__ or error}"
    if not isinstance(error, openai.APIStatusError):
        return "retry", f"reply: {error}"
    status, said = error.status_code, str(error.message).lower()
    text = f"{status}: {' '.join(str(error.message).split())[:300]}"
    no_quota = "exceeded your current quota" in said and status == 429 and not error.code
    if {str(error.code), str(error.type)} & NO_QUOTA or no_quota:
        status = 402
    if status in FATAL:
        return "fatal", f"{FATAL[status]} ({text})."
    if status == 429:
        return ("bad" if said.startswith("request too large") else "limit"), text
    return ("retry" if status in (408, 409) or status >= 500 else "bad"), text


def headers_of(error: Exception) -> Any:
    """Return the headers of the reply that an error is about, if there is one."""
    return getattr(getattr(error, "response", None), "headers", None)
