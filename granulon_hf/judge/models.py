"""Which judges are known: prices, limits, what an image costs, whether they reason, and when they retire.

The figures are in `known_models.py`; whoever runs a judge may replace or add entries, each with fields of [`JudgeModel`].
"""

import datetime
import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import pydantic

from .images import count_tokens
from .known_models import DATE, MODELS

PRICES_DATE = DATE
Amount = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


def today() -> datetime.date:
    """Return the date; tests set another one, since judges retire."""
    return datetime.date.today()


class ImageRule(pydantic.BaseModel, extra="forbid"):
    """How many prompt tokens an image is: `base`, and `tile` for every 512 pixels square; or `patch` for every 32 square."""

    base: Amount = 85
    tile: Amount = 170
    patch: Amount | None = None


class JudgeModel(pydantic.BaseModel, extra="forbid"):
    """What is known of a judge.

    Args:
        prompt, completion (`float`, *optional*): USD per million tokens; the Batch API costs half.
        context (`int`, *optional*): tokens that it takes, prompt and answer together.
        output (`int`, *optional*): tokens of an answer at most.
        reasons (`bool`): it reasons before it answers: it gets more tokens, a `reasoning_effort` and no `temperature`.
        image (`ImageRule`): what an image costs.
        retires (`date`, *optional*): the day from which its maker no longer serves it; `successor` is whom the maker names.
        base_url, api_key_env (`str`, *optional*): the server of this judge alone, and the variable that holds its key.
    """

    prompt: Amount | None = None
    completion: Amount | None = None
    context: pydantic.PositiveInt | None = None
    output: pydantic.PositiveInt | None = None
    reasons: bool = False
    image: ImageRule = ImageRule()
    retires: datetime.date | None = None
    successor: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None

    @property
    def is_retired(self) -> bool:
        return self.retires is not None and self.retires <= today()

    @pydantic.model_validator(mode="after")
    def check_prices(self) -> "JudgeModel":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion, the two prices, go together")
        return self


def family_of(name: str) -> str:
    """Return the name without the date of a snapshot: a snapshot that has no entry of its own is its family's."""
    return re.sub(r"-\d{4}-\d{2}-\d{2}$", "", name)


def given_fields(name: str, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what is given of a judge, and of its family where the table has no entry of the judge's own; None for nothing."""
    names = [name] if name in MODELS else dict.fromkeys((family_of(name), name))
    found = [given[one] or {} for one in names if given and one in given]
    for fields in found:
        if not isinstance(fields, Mapping):
            raise ValueError(f"judge_models must map names to fields, such as {name}: {{prompt: 2.5, completion: 10}}.")
    return {field: value for fields in found for field, value in fields.items()} if found else None


def validate(name: str, fields: Mapping[str, Any]) -> JudgeModel:
    """Return a judge with these fields; raise ValueError that names the first one that is wrong."""
    try:
        return JudgeModel.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        # In quotes a field is none of a command's options.
        what = f"{'.'.join(map(str, first['loc']))!r} of {name!r}" if first["loc"] else repr(name)
        names = ", ".join(map(repr, JudgeModel.model_fields))
        raise ValueError(f"{what} is wrong ({first['msg'].removeprefix('Value error, ')}); the fields are {names}.") from None


def find_model(name: str, given: Mapping[str, Any] | None = None) -> JudgeModel | None:
    """Return what is known of a judge, None if nothing is; fields that are `given` replace those of the table."""
    known, own = MODELS.get(name) or MODELS.get(family_of(name)), given_fields(name, given)
    if own is None:
        return None if known is None else validate(name, known)
    try:
        return validate(name, {**(known or {}), **own})
    except ValueError as error:
        raise ValueError(f"judge_models: {error}") from None


def known_names(given: Mapping[str, Any] | None = None) -> list[str]:
    """Return the names of the judges that are known: those that are given, then the table's, the cheapest first."""
    names = dict.fromkeys((*(given or {}), *MODELS))
    cost = {name: (model.prompt if (model := find_model(name, given)) else None) or 0.0 for name in names}
    return sorted(names, key=lambda name: (name not in (given or {}), cost[name]))


def choices(given: Mapping[str, Any] | None = None) -> list[str]:
    """Return the names of the judges that are served today."""
    found = {name: find_model(name, given) for name in known_names(given)}
    return [name for name, model in found.items() if model and not model.is_retired]


def is_own(url: str) -> bool:
    """Return whether a server is on this machine or its own network, where nobody sends a bill."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".local", ".localhost"))


def image_tokens(width: int, height: int, detail: str, model: str) -> int:
    """Return the prompt tokens of an image by the model's rule; an unknown model's is GPT-4o's."""
    rule = (find_model(model) or JudgeModel()).image
    return count_tokens(width, height, detail, rule.model_dump())
