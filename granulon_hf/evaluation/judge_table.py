"""The table of known judges, made of the prices that litellm publishes.

`model_prices_and_context_window_backup.json` is in every wheel of litellm (`pip download litellm --no-deps`, then unpack it):

    granulon judge models --litellm PRICES.json --out judges.yaml         # one's own, for --judge-models
    python -m granulon_hf.evaluation.judge_table PRICES.json VERSION       # the package's, judge/known_models.py

litellm does not say what an image costs: `IMAGE_RULES` are those of OpenAI's vision guide, and models that it does not list get
the factor of the small ones, which is rather too much for a budget.
"""

import datetime
import json
import pprint
import re
import sys
from pathlib import Path
from typing import Any

from granulon_hf.errors import GranulonError, one_line
from granulon_hf.io import write_text
from granulon_hf.judge import known_models
from granulon_hf.judge.models import family_of, validate

# The first that fits the beginning of a name.
IMAGE_RULES: dict[str, dict[str, float]] = {
    "gpt-4o-mini": {"base": 2833, "tile": 5667},
    "gpt-4.1-mini": {"patch": 1.62},
    "gpt-4.1-nano": {"patch": 2.46},
    "gpt-4": {"base": 85, "tile": 170},
    "gpt-5-mini": {"patch": 1.62},
    "gpt-5-nano": {"patch": 2.46},
    "gpt-5-": {"base": 70, "tile": 140},
    "gpt-5.1": {"base": 70, "tile": 140},
    "o4-mini": {"patch": 1.72},
    "o1": {"base": 75, "tile": 150},
    "o3": {"base": 75, "tile": 150},
    "": {"patch": 1.62},
}
# Chat models of OpenAI that look at images; not those that search, speak, or are for one trade.
NAME = re.compile(r"(?:gpt-\d|o\d)(?!.*(?:search|audio|realtime|codex|cyber|law|rosalind|deep-research|image|-pro))")
CHAT = "/v1/chat/completions"


def read_litellm(path: Path, skipped: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Read litellm's price file as a table of judges: names and fields of `granulon_hf.judge.models.JudgeModel`.

    A judge whose row cannot be read is left out; `skipped` takes its name, and why.
    """
    skipped = {} if skipped is None else skipped
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GranulonError(f"{str(path)!r} is no price file of litellm's ({one_line(error)}).") from None
    if not isinstance(listed, dict):
        raise GranulonError(f"{str(path)!r} is no price file of litellm's: it must hold one JSON object, a row for each model.")
    found = {}
    for name, row in listed.items():
        try:
            if is_judge(name, row):
                fields = entry(name, row)
                validate(name, fields)
                found[name] = fields
        except KeyError as error:
            skipped[name] = f"{name!r} has no {error}"
        except (AttributeError, TypeError, ValueError) as error:
            skipped[name] = one_line(error)
    if not found:
        why = f" ({next(iter(skipped.values()))})" if skipped else ""
        raise GranulonError(f"{str(path)!r} lists no chat model of OpenAI's that looks at images{why}.")
    # A snapshot that differs in nothing from its family is found by it.
    return {name: row for name, row in found.items() if name == family_of(name) or row != found.get(family_of(name))}


def is_judge(name: str, row: Any) -> bool:
    if not NAME.match(name):
        return False
    kind = (row.get("litellm_provider"), row.get("mode"), row.get("supports_vision"))
    return kind == ("openai", "chat", True) and CHAT in row.get("supported_endpoints", [CHAT])


def entry(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a model's fields, without those that have their default."""
    fields = {
        "prompt": round(row["input_cost_per_token"] * 1e6, 6),
        "completion": round(row["output_cost_per_token"] * 1e6, 6),
        "context": row["max_input_tokens"],
        "output": row["max_output_tokens"],
        "reasons": bool(row.get("supports_reasoning")),
        "image": next(rule for start, rule in IMAGE_RULES.items() if f"{name}-".startswith(start)),
        "retires": row.get("deprecation_date"),
        "successor": row.get("successor_model"),
    }
    return {field: value for field, value in fields.items() if value not in (None, False)}


def main(path: str, version: str) -> None:
    """Write the package's table."""
    skipped: dict[str, str] = {}
    models = dict(sorted(read_litellm(Path(path), skipped).items()))
    for name, why in skipped.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    body = "\n".join(
        f"    {json.dumps(name)}: {pprint.pformat(row, width=10_000, sort_dicts=False)}," for name, row in models.items()
    ).replace("'", '"')
    head = '"""Judges that are known; `granulon_hf.evaluation.judge_table` writes this file of litellm\'s published prices."""'
    date = f'DATE = "{datetime.date.today()}"\nSOURCE = "litellm {version}"'
    fields = "# USD per million tokens, tokens, days; `models.JudgeModel` says what each is.\n# ruff: noqa: E501\n# fmt: off"
    text = f"{head}\n\n{fields}\n\n{date}\nMODELS = {{\n{body}\n}}\n"
    write_text(Path(known_models.__file__), text)


if __name__ == "__main__":
    main(*sys.argv[1:])
