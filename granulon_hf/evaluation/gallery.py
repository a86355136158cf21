"""Case studies: the answers of several models side by side, as one HTML page that needs nothing else."""

import base64
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from PIL import Image

from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import PredictionRun, look, read_description
from granulon_hf.evaluation.metrics import normalize, option_accuracy, recall
from granulon_hf.evaluation.tables import data_url, jpeg, write_page
from granulon_hf.modeling.images_granulon import open_rgb

SIDE = 480  # pixels, long side of a picture
# Photograph and overlay of 200 samples stay below 20 MB: 2 x 32 kB, a third more in base64.
PICTURE_BYTES = 32_000
RIGHT_FROM = 0.5  # of recall, or of the judge's accuracy / 100, where there are no options to name
WORDS = yaml.safe_load(Path(__file__).with_name("gallery.yaml").read_text(encoding="utf-8"))
ORDERS: dict[str, str] = WORDS["orders"]
STOP_WORDS = frozenset(WORDS["stop_words"].split())


@dataclass
class Answer:
    """One model's answer to a sample; accuracy and hallucination are the judge's, 0 to 100."""

    model: str
    prediction: str
    level: str | None = None
    probs: dict[str, float] = field(default_factory=dict)
    recall: float = 0.0
    right: bool = False
    accuracy: float | None = None
    hallucination: float | None = None
    note: str = ""
    hallucinated: list[str] = field(default_factory=list)
    pieces: list[tuple[str, str]] = field(default_factory=list)

    @property
    def forced(self) -> bool:
        """Another level than the controller's choice was used."""
        return self.level is not None and bool(self.probs) and self.level != max(self.probs, key=self.probs.__getitem__)

    @property
    def judged(self) -> float | None:
        """Accuracy minus hallucination, -100 to 100."""
        return None if self.accuracy is None or self.hallucination is None else self.accuracy - self.hallucination


class Picture(NamedTuple):
    """A JPEG's data URL, and its size in pixels."""

    url: str
    width: int
    height: int


@dataclass
class Case:
    """A sample with the answers of all models; `images` are the places where each may be found, first choice first."""

    id: str
    question: str
    reference: str
    task: str
    choices: list[str]
    images: list[list[Path]]
    answers: list[Answer]
    place: int
    photos: list[Picture | None] = field(default_factory=list)
    overlays: list[Picture | None] = field(default_factory=list)
    overlay_level: str = ""

    def keys(self) -> dict[str, float | None]:
        """Sort keys by order, smallest first, None last."""
        judged = [a.judged for a in self.answers if a.judged is not None]
        # Differences of the judge count more where all answers have them; both are on a scale of 0 to 100.
        values = [j / 2 for j in judged] if len(judged) == len(self.answers) else [100 * a.recall for a in self.answers]
        return {
            "judge": sum(judged) / len(judged) if judged else None,
            "recall": sum(answer.recall for answer in self.answers) / len(self.answers),
            "difference": min(values) - max(values),
            "data": self.place,
        }

    def facts(self) -> str:
        """What the page filters and sorts by, as JSON for an attribute; the template escapes it."""
        levels = {answer.level for answer in self.answers if answer.level is not None}
        texts = {normalize(answer.prediction) for answer in self.answers}
        facts = {"keys": self.keys(), "task": self.task, "levels": sorted(levels)}
        return json.dumps(facts | {"right": [answer.right for answer in self.answers], "differ": len(texts) > 1})


Draw = Callable[[Case, list[Image.Image]], tuple[list[Image.Image], str]]  # overlays, and the level that they show

# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The predictions of a folder, by sample id, in the order of the file."""

    folder: Path
    name: str
    source: str
    rows: dict[str, dict[str, Any]]
    visual_tokens: int | None = None  # that the answers were made with, where a number was asked for


def read_runs(folders: Sequence[Path], names: dict[Path, str] | None = None) -> list[Run]:
    """Predictions of several folders, each with a name of its own: its model's, with the folder's where two are alike."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise GranulonError("The same folder is given twice; a gallery puts different predictions side by side.")
    runs: list[Run] = []
    for folder in folders:
        path = folder / "run.json"
        description = read_description(path).get("description") if path.is_file() else None
        if not isinstance(description, dict):
            raise GranulonError(
                f"{str(folder)!r} is no folder of predictions: it has no run.json that describes a run of `granulon eval run`."
            )
        rows = PredictionRun(folder, description).rows()
        if not rows:
            raise GranulonError(f"{str(folder)!r} holds no predictions yet.")
        for key, row in rows.items():
            check_row(folder, key, row)
        model = description.get("model")
        source = str((model.get("source") if isinstance(model, dict) else model) or folder.name)
        name = (names or {}).get(folder) or source.rstrip("/").rpartition("/")[2]
        generation = description.get("generation")
        asked = generation.get("visual_tokens") if isinstance(generation, dict) else None
        runs.append(Run(folder, name, source, rows, asked))
    given = Counter(run.name for run in runs)
    for run in runs:
        if given[run.name] > 1:
            run.name = f"{run.name} ({run.folder.resolve().name})"
    if len({run.name for run in runs}) < len(runs):
        raise GranulonError(f"Several folders are called {runs[0].name!r}; tell them apart with --name FOLDER=NAME.")
    return runs


def check_row(folder: Path, key: str, row: dict[str, Any]) -> None:
    kinds: dict[str, Any] = {"prediction": str, "question": str, "reference": str, "images": list, "choices": list | None}
    kinds |= {"task": str | None, "granularity": str | None, "granularity_probs": dict | None, "error": str | None}
    where = f"{str(folder)!r}, sample {key!r}"
    for name, kind in kinds.items():
        if not isinstance(row.setdefault(name, None if isinstance(None, kind) else kind()), kind):
            raise GranulonError(f"{where}: {name} is {json.dumps(row[name])[:60]}, which no evaluation writes.")
    if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in (row["granularity_probs"] or {}).values()):
        raise GranulonError(f"{where}: granularity_probs are no probabilities.")


def read_scores(path: Path, run: Run) -> dict[str, dict[str, Any]]:
    """Rows of the `samples.jsonl` of `granulon judge run`, or of the folder that it is in, by sample id.

    A row may carry `hallucinated`, a list of phrases of the answer that people, or another judge, found to be made up.
    """
    from granulon_hf.evaluation.judging import as_json, rows_of, score_of

    path = path / "samples.jsonl" if path.is_dir() else path
    found = {}
    for place, row in rows_of(path):
        key, phrases = str(row.get("id")), row.get("hallucinated") or []
        for name in ("accuracy", "hallucination"):
            score_of(row, name, f"{path}, {place}")
        if not (isinstance(phrases, list) and all(isinstance(phrase, str) for phrase in phrases)):
            raise GranulonError(f"{path}, {place}: hallucinated is {as_json(phrases)}, not a list of phrases.")
        if key in run.rows and row.get("prediction", run.rows[key]["prediction"]) != run.rows[key]["prediction"]:
            raise GranulonError(f"{path}, {place} scores another answer than {str(run.folder)!r} holds; judge it again.")
        found[key] = row
    if not found.keys() & run.rows.keys():
        raise GranulonError(f"{path} has no id in common with {str(run.folder)!r}.")
    return found


def join(runs: Sequence[Run], scores: dict[str, dict[str, dict[str, Any]]] | None = None) -> list[Case]:
    """Cases of the samples that all runs have, in the order of the first; `scores` are those of [`read_scores`], by run."""
    first, cases = runs[0], []
    for place, (key, row) in enumerate(first.rows.items()):
        rows = [(run, run.rows[key]) for run in runs if key in run.rows]
        if len(rows) < len(runs):
            continue
        for run, other in rows:
            if (other["question"], other["reference"]) != (row["question"], row["reference"]):
                raise GranulonError(
                    f"The sample {key!r} has another question or reference in {str(run.folder)!r} than in "
                    f"{str(first.folder)!r}; a gallery needs predictions on the same data."
                )
        case = Case(
            id=key,
            question=row["question"],
            reference=row["reference"],
            task=row["task"] or "",
            choices=[str(choice) for choice in row["choices"] or []],
            images=[
                [inside(run.folder, other["images"][i]) for run, other in rows if i < len(other["images"])]
                for i in range(len(row["images"]))
            ],
            answers=[answer_of(run.name, other, (scores or {}).get(run.name, {}).get(key, {})) for run, other in rows],
            place=place,
        )
        cases.append(case)
    if not cases:
        raise GranulonError("No sample is in all folders: their ids have nothing in common.")
    return cases


def answer_of(model: str, row: dict[str, Any], score: dict[str, Any]) -> Answer:
    """An answer with its scores; right is what the judge, the named option or the shared words say, in this order."""
    prediction, reference, accuracy = row["prediction"], row["reference"], score.get("accuracy")
    if accuracy is not None:
        right = accuracy >= 100 * RIGHT_FROM
    elif row["choices"]:
        right = option_accuracy(prediction, [str(choice) for choice in row["choices"]], reference) == 1
    else:
        # Normalized: "A car." shares the "a" of "a rocket".
        right = bool(prediction.strip()) and recall(normalize(prediction), normalize(reference)) >= RIGHT_FROM
    return Answer(
        model=model,
        prediction=prediction,
        level=row["granularity"],
        probs=row["granularity_probs"] or {},
        recall=recall(prediction, reference),
        right=right,
        accuracy=accuracy,
        hallucination=score.get("hallucination"),
        note=str(row["error"] or (score.get("reason") if accuracy is None else "") or ""),
        hallucinated=score.get("hallucinated") or [],
    )


def inside(folder: Path, name: Any) -> Path:
    """Path of an image; predictions may come from others, and must not put any file of this machine on a page."""
    path = (folder / str(name).replace("\0", "")).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise GranulonError(f"{str(folder)!r} names the image {name!r:.80}, which lies outside of the folder.")
    return path


# --- marking ----------------------------------------------------------------------------------------------------------


def mark(text: str, spans: Iterable[tuple[int, int, str]]) -> list[tuple[str, str]]:
    """Text in pieces `(kind, text)`; the kind is "" where nothing is marked. Of spans that overlap the first given wins."""
    kinds = [""] * len(text)
    for start, end, kind in spans:
        for i in range(start, end):
            kinds[i] = kinds[i] or kind
    edges = [0, *(i for i in range(1, len(text)) if kinds[i] != kinds[i - 1]), len(text)]
    return [(kinds[a], text[a:b]) for a, b in itertools.pairwise(edges) if a < b]


def hallucinated_spans(answer: Answer) -> list[tuple[int, int, str]]:
    """Where the phrases that the scores file names occur as whole words, in any case."""
    patterns = [r"(?<!\w)" + re.escape(phrase.strip()) + r"(?!\w)" for phrase in answer.hallucinated if phrase.strip()]
    found = (m for pattern in patterns for m in re.finditer(pattern, answer.prediction, re.IGNORECASE))
    return [(m.start(), m.end(), "hallucinated") for m in found]


def unsupported_spans(prediction: str, *known: str) -> list[tuple[int, int, str]]:
    """Content words of an answer that neither the question, its options nor the reference use (ours; a hint, no verdict).

    A true statement that the reference leaves out is marked too, and a false one in the reference's words is not.
    """
    words = {stem(word) for text in known for word in re.findall(r"\w+", text.lower())}
    spans = []
    for found in re.finditer(r"\w+", prediction):
        word = found[0].lower()
        if len(word) > 2 and word not in STOP_WORDS and stem(word) not in words:
            spans.append((found.start(), found.end(), "unsupported"))
    return spans


def stem(word: str) -> str:
    return word.removesuffix("s") if len(word) > 3 else word


# --- pictures ---------------------------------------------------------------------------------------------------------


def picture(image: Image.Image, most_bytes: int = PICTURE_BYTES) -> Picture:
    """Fit a picture into so many bytes before base64: first the quality gives way, then the size."""
    side = SIDE
    while True:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (82, 70, 55, 40):
            data = jpeg(small, quality=quality, optimize=True)
            if len(data) <= most_bytes or side <= 32:
                return Picture(data_url(data), *small.size)
        side = side * 2 // 3


def open_first(paths: Sequence[Path]) -> Image.Image | None:
    for path in paths:
        with suppress(ValueError):
            return open_rgb(path, at_least=SIDE)
    return None


def add_pictures(case: Case, draw: Draw | None = None) -> None:
    """Photographs of a case, and overlays where `draw` is given and all photographs can be read."""
    images = [open_first(paths) for paths in case.images]
    budget = PICTURE_BYTES // max(len(images), 1)
    case.photos = [None if image is None else picture(image, budget) for image in images]
    readable = [image for image in images if image is not None]
    case.overlays = [None] * len(images)
    if draw is None or not images or len(readable) < len(images):
        return
    try:
        drawn, case.overlay_level = draw(case, readable)
        case.overlays = [picture(image, budget) for image in drawn]
    except ValueError as error:  # the photograph is still there
        case.overlay_level = f"no overlay: {error}"


def cluster_drawer(model: Any, processor: Any, levels: dict[str, str] | None = None, visual_tokens: int | None = None) -> Draw:
    """A function that draws the kept clusters of a case, at the level of its id in `levels` or that the controller chooses, or
    this number of tokens."""
    import torch

    from granulon_hf import overlay

    if not model.config.granularity_levels:
        raise GranulonError("The model for the overlay has no granularity levels, and so no clusters to draw.")

    @torch.inference_mode()
    def draw(case: Case, images: list[Image.Image]) -> tuple[list[Image.Image], str]:
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": case.question}]
        level = (levels or {}).get(case.id)
        forced = level if level in model.config.level_names else None
        seen = look(model, processor, [[{"role": "user", "content": content}]], forced, visual_tokens=visual_tokens)
        drawn = []
        for i, (image, pixels) in enumerate(zip(images, seen.pixel_values, strict=True)):
            view = overlay.model_view(processor.image_processor, image, pixels, SIDE)
            clusters = overlay.draw_clusters(view, seen.images.aggregation, i, size=2 * SIDE)
            # Whole pixels per patch changed the proportions a little: on the page the picture would jump.
            drawn.append(clusters.resize(view.size, Image.Resampling.LANCZOS))
        return drawn, seen.levels[0] or f"{visual_tokens} tokens"

    return draw


# --- the page ---------------------------------------------------------------------------------------------------------


def ordered(cases: Sequence[Case], order: str) -> list[Case]:
    """Cases by one of [`ORDERS`]; what has no key comes last, ties keep the order of the data."""
    keys = {case.id: case.keys()[order] for case in cases}
    return sorted(cases, key=lambda case: (keys[case.id] is None, keys[case.id] or 0.0, case.place))


def means(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Per model over all cases: mean recall, share of right answers, and the judge's means over what it scored."""
    scale = {"right": 100, "recall": 100, "accuracy": 1, "hallucination": 1}
    rows = [{name: getattr(answer, name) for name in ("model", *scale)} for case in cases for answer in case.answers]
    table = pd.DataFrame(rows).astype(dict.fromkeys(scale, float)).groupby("model", sort=False).mean() * pd.Series(scale)
    return table.astype(object).where(table.notna(), None).reset_index().to_dict("records")


def digest(text: str) -> str:
    """The source expression by which a Content-Security-Policy allows this text, and no other, as an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


def write_gallery(
    out: str | os.PathLike,
    cases: Sequence[Case],
    *,
    title: str = "Case studies",
    order: str = "recall",  # one of ORDERS, of which the first `limit` are shown
    limit: int | None = 200,
    draw: Draw | None = None,  # of `cluster_drawer`, for `overlay_model`
    overlay_model: str = "",
    mark_unsupported: bool = False,
    notes: Sequence[str] = (),  # sentences for the head of the page
    on_progress: Callable[[int], Any] = lambda done: None,  # called with 1 for each sample
) -> int:
    """Write the page, and return its size in bytes.

    Everything that comes from models and data is text or an attribute that Jinja escapes, and none of it is inside of the
    script or the style, which a Content-Security-Policy pins by their hashes.
    """
    shown = ordered(cases, order)[:limit]
    for case in shown:
        add_pictures(case, draw)
        for answer in case.answers:
            spans = hallucinated_spans(answer)
            if mark_unsupported:
                spans += unsupported_spans(answer.prediction, case.question, case.reference, *case.choices)
            answer.pieces = mark(answer.prediction, spans)
        on_progress(1)
    answers = [answer for case in shown for answer in case.answers]
    # In the order of the models' levels, not of the alphabet.
    levels = dict.fromkeys(level for answer in answers for level in [*answer.probs, answer.level] if level is not None)
    write_page(
        Path(out),
        "gallery.html.jinja",
        trim=True,
        digest=digest,
        title=title,
        cases=shown,
        total=len(cases),
        models=[answer.model for answer in cases[0].answers],
        means=means(cases),
        judged=any(answer.judged is not None for case in cases for answer in case.answers),
        order=order,
        orders=ORDERS,
        tasks=sorted({case.task for case in shown if case.task}),
        levels=[level for level in levels if any(level == answer.level for answer in answers)],
        kinds={kind for answer in answers for kind, _ in answer.pieces if kind} | set(["unsupported"] * mark_unsupported),
        overlays=any(overlay is not None for case in shown for overlay in case.overlays),
        overlay_model=overlay_model,
        right_from=RIGHT_FROM,
        notes=notes,
    )
    return Path(out).stat().st_size
