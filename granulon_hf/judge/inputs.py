"""Inputs of the judge as units to be scored, and what scoring them would cost."""

import contextlib
import os
from typing import Any

from .images import encode_image
from .options import Options, Unit
from .prices import PRICES_DATE, price_of
from .prompts import segments_of
from .store import Store


def columns_of(predictions: Any, images: Any, references: Any, questions: Any) -> dict[str, list]:
    """Return the inputs as columns of one length, "" for what is not given; raise ValueError for what cannot be an input."""
    if predictions is None or images is None:
        raise ValueError("Give predictions= and images=, one image for every prediction.")
    columns = {"predictions": list(predictions), "images": [encode_image(image) for image in images]}
    for name, column in (("references", references), ("questions", questions)):
        columns[name] = [""] * len(columns["predictions"]) if column is None else ["" if x is None else x for x in column]
    for name, column in columns.items():
        if len(column) != len(columns["predictions"]):
            raise ValueError(f"There are {len(columns['predictions'])} predictions but {len(column)} {name}.")
    for name in ("predictions", "references", "questions"):
        for i, text in enumerate(columns[name]):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{i}] is {text!r}, not a text (an empty answer is '').")
            columns[name][i] = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be sent
    return columns


def units_of(columns: dict[str, list], options: Options) -> list[Unit]:
    """Return what has to be scored: every prediction that is not empty and, with `segments`, its segments that are not."""
    units = []
    rows = zip(*(columns[name] for name in ("predictions", "images", "references", "questions")), strict=True)
    for i, (prediction, image, reference, question) in enumerate(rows):
        if options.task == "vqa" and not (question.strip() or reference.strip()):
            raise ValueError(f"Task 'vqa' needs a question or a reference; sample {i} has neither.")
        parts = segments_of(prediction, options.segments) if options.segments else []
        texts = [(None, prediction), *enumerate(parts)]
        units += [Unit(i, segment, text, image, question, reference) for segment, text in texts if text.strip()]
    return units


def foresee(units: list[Unit], options: Options) -> dict:
    """Count what a run would ask and cost; send nothing, and write nothing.

    Returns:
        n_unreadable (images), n_stored (units that the store already has), too_long (samples with a text beyond the judge's
        context, which is not sent), n_requests, prompt_tokens, completion_tokens (20 a request), cost_usd (None for an
        unknown model), prices_date (None where `prices=` tells them). Repairs are not foreseen.
    """
    exists = options.store is not None and os.path.exists(options.store)
    keys, prompts, too_long = set(), [], set()
    n_unreadable = n_stored = 0
    with contextlib.closing(Store(options.store if exists else None)) as store:
        for unit in units:
            try:
                key, _, tokens = options.prepare(unit)
            except Exception:
                n_unreadable += unit.segment is None
                continue
            if key in keys:
                continue
            keys.add(key)
            if options.settled(store.answers(key)):
                n_stored += 1
            elif options.too_long(tokens):
                too_long.add(unit.sample)
            else:
                prompts.append(tokens)
    price = price_of(options.model, options.prices, options.backend)
    return {
        "n_unreadable": n_unreadable,
        "n_stored": n_stored,
        "too_long": sorted(too_long),
        "n_requests": len(prompts),
        "prompt_tokens": sum(prompts),
        "completion_tokens": 20 * len(prompts),
        "cost_usd": price and price[0] * sum(prompts) + price[1] * 20 * len(prompts),
        "prices_date": None if options.model in (options.prices or {}) else PRICES_DATE,
    }


def estimate(predictions: Any, images: Any, references: Any = None, questions: Any = None, **options: Any) -> dict:
    """Count what `compute` with these arguments would ask and cost; send nothing, and write nothing.

    Returns:
        n, n_empty, and what `foresee` says.
    """
    chosen = Options(**options)
    columns = columns_of(predictions, images, references, questions)
    n_empty = sum(not text.strip() for text in columns["predictions"])
    return {"n": len(columns["predictions"]), "n_empty": n_empty, **foresee(units_of(columns, chosen), chosen)}
