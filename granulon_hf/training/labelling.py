"""Soft labels for the granularity controller: how far a question wants each level, asked of GPT-4o or any compatible model.

The paper says that GPT-4o labels a text-to-granularity corpus with n preference weights per question; it does not print the
prompt. The prompt, the parser and the descriptions of the levels are ours. Requests, store, repair and budget are the judge's.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Annotated, Any, ClassVar

import pydantic
import yaml

from granulon_hf.judge.judge import NoBoolean, Options, Unit, ask, digest_of, fence, foresee, read_object, response_formats

WORDS = yaml.safe_load(files("granulon_hf.data").joinpath("granularity/labelling.yaml").read_text(encoding="utf-8"))
LEVELS: dict[str, str] = WORDS["levels"]
SUM_TOLERANCE = 0.01  # weights with two decimals may miss 1 by rounding
WEIGHTS = pydantic.TypeAdapter(dict[str, Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False), NoBoolean]])


def parse_weights(content: str, levels: Sequence[str]) -> list[float]:
    """Read the weights of the levels, in their order; a sum that misses 1 by rounding (`SUM_TOLERANCE`) is divided out, and a
    ValueError says what else is wrong."""
    weights = read_object(content, levels, WEIGHTS)
    total = math.fsum(weights.values())
    if abs(total - 1) > SUM_TOLERANCE + 1e-9:
        raise ValueError(f"the weights sum to {total:.3g}, not to 1: {content.strip()[-80:]!r}")
    return [weights[name] / total for name in levels]


@dataclass
class LabelOptions(Options):
    """Options of a labelling run: the judge's, with levels, name and meaning of each, in place of images."""

    tasks: ClassVar = ("granularity",)
    nothing: ClassVar = {"weights": None}

    task: str = "granularity"
    hardened: bool = field(default=True, init=False)  # there is no printed prompt to compare with
    levels: Mapping[str, str] = field(default_factory=lambda: dict(LEVELS))

    def __post_init__(self):
        form = ", ".join(f"{json.dumps(name)}: number" for name in self.levels)
        self.reply = WORDS["reply"].replace("{form}", "{" + form + "}")
        self.repair = WORDS["repair"].replace("{reply}", self.reply)
        self.formats = response_formats("weights", dict.fromkeys(self.levels, "number"))
        super().__post_init__()
        if len(self.levels) < 2 or not all(name.strip() and meaning.strip() for name, meaning in self.levels.items()):
            raise ValueError("Preference weights need at least two levels, each with a name and a meaning.")

    def prepare(self, unit: Unit) -> tuple[str, str, int]:
        parameters = [self.temperature, self.max_tokens, self.seed, self.response_format]
        return digest_of([self.task, *self.prompt(unit, ""), self.model, parameters]), "", self.tokens(unit)

    def read(self, content: str) -> dict:
        return {"weights": parse_weights(content, list(self.levels))}

    def prompt(self, unit: Unit, mark: str | None) -> tuple[str | None, str]:
        mark = mark or ""
        levels = "\n".join(f"- {name}: {meaning}" for name, meaning in self.levels.items())
        values = {"levels": levels, "question": fence(unit.question, mark), "reply": self.reply}
        # One pass: nothing inside a question is looked at as a template.
        text = re.sub(r"\{(levels|question|reply)\}", lambda match: values[match[1]], WORDS["prompt"])
        return WORDS["system"].replace("{mark}", mark), text


def units_of(questions: Sequence[str]) -> list[Unit]:
    return [Unit(i, None, "", {}, text.encode("utf-8", "replace").decode(), "") for i, text in enumerate(questions)]


def estimate(questions: Sequence[str], **options: Any) -> dict:
    """Count what [`label`] with these arguments would ask and cost; send and write nothing. See the judge's `foresee`."""
    return {"n": len(questions), **foresee(units_of(questions), LabelOptions(**options))}


def label(questions: Sequence[str], **options: Any) -> dict:
    """Ask for the preference weights of questions.

    Args:
        questions (`Sequence[str]`): each is judged by its wording alone.
        **options: fields of [`LabelOptions`]; of these `store` is the JSONL file of all answers (a run with the same
            questions asks only what is missing in it), and `max_cost` the USD that this run may spend.

    Returns:
        `dict`: `weights` (for each question a list in the order of the levels, or None), `reasons` (why there are none),
        `n_labelled`, `n_requests` `spent_usd` and `lost_usd` (of this run; None where the price is unknown), `models` (for each
        question, as the server reports it).

    Raises:
        JudgeError: the run cannot go on (key, quota, model, network); what was paid for is in the store.
        ValueError: an option that cannot be.
    """
    run = ask(units_of(questions), LabelOptions(**options))
    return {
        "weights": [result["weights"] for result in run.results],
        "reasons": [result["reason"] for result in run.results],
        "models": [result["rows"][-1].get("model") if result["rows"] else None for result in run.results],
        "n_labelled": sum(result["weights"] is not None for result in run.results),
        "n_requests": run.n_requests,
        "spent_usd": run.spent if run.price else None,
        "lost_usd": run.lost if run.price else None,
    }
