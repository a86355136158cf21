"""The judge's server: the client that talks to it, what its errors mean, and the models that it serves."""

import asyncio
import contextlib
import os
from typing import Any

import openai

from .models import choices
from .options import Options

NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
# Errors of openai's transport (httpx, or httpx2 in later versions) that come before a request is sent.
UNCONNECTED = {"ConnectError", "ConnectTimeout", "PoolTimeout"}
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
    if options.known.base_url or options.known.api_key_env:  # a server of this judge alone, which nobody's other key is for
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


async def unusable(client: openai.AsyncOpenAI, options: Options) -> str | None:
    """Return why this judge cannot be asked, as far as its server says so for nothing; None where nobody knows."""
    if options.is_azure:  # lists models, not the deployments that stand for them
        return None
    try:
        await client.with_options(max_retries=0, timeout=10).models.retrieve(options.model)
    except openai.AuthenticationError as error:
        # A key may be good for completions and not for looking at models.
        return None if "scope" in message_of(error) else triage(error)[1]
    except openai.NotFoundError as error:
        said = message_of(error)
        names_it = options.model in said and f"models/{options.model}" not in said
        # A server that has no such address answers 404 too.
        return await unserved(client, options, error) if error.code == "model_not_found" or names_it else None
    except (openai.OpenAIError, ValueError):
        return None
    return None


async def unserved(client: openai.AsyncOpenAI, options: Options, error: Exception) -> str | None:
    """Return that the server does not have this judge, with those that it has; None where the error is about something else.

    Most servers answer 404 then; others answer 400, name the model, and do not list it.
    """
    if not isinstance(error, openai.APIStatusError):
        return None
    missing = error.status_code == 404
    if not missing and not (error.status_code in (400, 422) and options.model in message_of(error)):
        return None
    names = choices(options.judge_models) if options.is_openai else []
    if not options.is_openai:
        with contextlib.suppress(Exception):  # whatever a server that has no such list answers
            page = await client.with_options(max_retries=0, timeout=10).models.list()
            names = [model.id for model in page.data if isinstance(model.id, str)]
    if not missing and (not names or options.model in names):
        return None
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    told = f"choose one of {', '.join(names[:20])}{more}; " if names else ""
    said = f"{error.status_code}: {message_of(error)[:300].rstrip('.')}"
    return f"The server does not know the model or address; {told}check model= and base_url= ({said})."


def message_of(error: openai.APIStatusError) -> str:
    """Return what the server says; many local ones say it as "detail", which the client does not look for."""
    detail = error.body.get("detail") if isinstance(error.body, dict) else None
    return " ".join((detail if isinstance(detail, str) else str(error.message)).split())


def said_by(error: BaseException) -> str:
    """Return what an error says, or what it is: one that breaks a connection off says nothing."""
    return " ".join(str(error).split()) or f"broken off ({type(error).__name__})"


def may_be_paid(error: Exception) -> bool:
    """Return whether the server may have done the work of a request that failed.

    It may have where it had the request, and its answer was late, cut off or unreadable. An error that it tells itself is none
    that anybody pays for, but a gateway's that it waited in vain.
    """
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (504, 524)
    return type(error.__cause__).__name__ not in UNCONNECTED


def has_answered(error: Exception) -> bool:
    """Return whether an error is a whole answer, which a server that remembers requests would give once more."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code >= 500 and not may_be_paid(error)
    return not isinstance(error, openai.APIConnectionError | asyncio.TimeoutError)


def triage(error: Exception) -> tuple[str, str]:
    """Return an error's kind, "fatal" (stop the run), "limit" (wait), "retry" or "bad" (give this unit up), and its message."""
    if isinstance(error, openai.APITimeoutError | asyncio.TimeoutError):
        return "retry", "timeout: the server did not answer in time"
    if isinstance(error, openai.APIConnectionError):
        return "retry", f"connection: {said_by(error.__cause__ or error)}"
    if not isinstance(error, openai.APIStatusError):
        return "retry", f"reply: {said_by(error)}"
    status, said = error.status_code, message_of(error).lower()
    text = f"{status}: {message_of(error)[:300]}"
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
