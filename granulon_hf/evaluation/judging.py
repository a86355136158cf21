"""Predictions from a file to the judge and back: reading, the table of samples, the HTML report, evaluate's offline cache."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from granulon_hf.errors import GranulonError, one_line
from granulon_hf.evaluation.tables import data_url, jpeg, write_page
from granulon_hf.judge import judge
from granulon_hf.judge.judge import encode_image, open_image, refuse_address, to_rgb

FIELDS = ("id", "prediction", "image", "question", "reference", "task")
SCORES = ("accuracy", "hallucination")
THUMBNAIL = 320  # pixels
NUMBER = re.compile(r"\s*[0-9]{1,3}(?:\.[0-9]*)?\s*")


@dataclass
class Prediction:
    """One line of a file of predictions; `image` is a path or `{"bytes", "path"}`."""

    id: str
    prediction: str
    image: Any
    question: str = ""
    reference: str = ""
    task: str | None = None


def as_json(value: Any) -> str:
    """Return a value as a file has it, cut for a message."""
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a JSONL, Parquet or CSV file, or a folder of `datasets`' `save_to_disk`: each row's place, for messages, and the
    row. In CSV all values are texts, or None where there is nothing."""
    if not path.exists():
        raise GranulonError(f"There is no file {str(path)!r}.")
    if path.is_dir() or path.suffix == ".parquet":
        yield from ((f"row {i}", row) for i, row in enumerate(table_rows(path)))
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        with open(path, "rb") as file:
            yield from ((f"line {i}", read_object(path, i, line)) for i, line in enumerate(file, 1) if line.strip())
    elif path.suffix == ".csv":
        yield from ((f"row {i}", row) for i, row in enumerate(csv_rows(path)))
    else:
        raise GranulonError(f"{path.name!r} is neither .jsonl nor .parquet nor .csv nor a datasets folder.")


def csv_rows(path: Path) -> list[dict[str, Any]]:
    import pandas

    try:
        table = pandas.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig")
    except ValueError as error:  # of encoding and of form
        raise GranulonError(f"{str(path)!r} is no table in CSV with commas, in UTF-8 ({one_line(error)}).") from None
    return table.astype(object).where(table.notna(), None).to_dict("records")


def id_of(value: Any) -> str:
    """Return an id as text: 7 for 7.0 too, which tables make of it where a row has no id."""
    return re.sub(r"\.0$", "", str(value)) if re.fullmatch(r"-?\d+\.0", str(value)) else str(value)


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read Arrow's rows, in which images stay encoded."""
    import datasets
    import pyarrow.parquet as parquet

    kind = "folder that datasets' save_to_disk wrote" if path.is_dir() else "readable Parquet file"
    try:
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else parquet.ParquetFile(path)
        if isinstance(loaded, dict):
            raise ValueError(f"it holds the splits {', '.join(loaded)}; name one of its folders")
        for table in loaded.with_format("arrow").iter(64) if path.is_dir() else loaded.iter_batches(64):
            yield from table.to_pylist()
    except Exception as error:
        raise GranulonError(f"{str(path)!r} is no {kind} ({one_line(error)}).") from error


def score_of(row: dict[str, Any], column: str, where: str) -> float | None:
    """Return a score from 0 to 100, which may be written as a text, or None where there is none."""
    value = row.get(column)
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= value <= 100):
        raise GranulonError(f"{where}: {column} is {as_json(value)}, not 0 to 100.")
    return float(value) if isinstance(value, Decimal) else value


def read_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GranulonError(f"{path}, line {number} is no JSON ({one_line(error)}); one object a line.") from None
    if not isinstance(row, dict):
        raise GranulonError(f"{path}, line {number} is no JSON object: {as_json(row)}.")
    return row


def image_of(value: Any, root: Path, where: str) -> Any:
    """Return a row's image as the judge takes it, relative paths below `root`."""
    try:
        refuse_address(value)
    except ValueError as error:
        raise GranulonError(f"{where}: {error}") from None
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return str(root / value["path"])
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()  # lone surrogates name no file
        return str(root / os.path.expanduser(value))
    if value is None or isinstance(value, bytes):  # without an image: one unscored sample
        return {"bytes": value or b"", "path": None}
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value
    raise GranulonError(f"{where}: the image is {as_json(value)}, not a path or encoded bytes.")


def read_predictions(path: Path, columns: dict[str, str] | None = None, image_root: Path | None = None) -> list[Prediction]:
    """Read all predictions of a file.

    Args:
        path (`Path`): a JSONL, Parquet or CSV file with the columns "prediction" and "image" (or "images" with one image), and
            optionally "id", "question", "reference" and "task"; or a folder of `datasets.Dataset.save_to_disk`.
        columns (`dict[str, str]`, *optional*): other names of these columns.
        image_root (`Path`, *optional*): where relative image paths start; by default beside the file.
    """
    if unknown := sorted(set(columns or {}) - set(FIELDS)):
        raise GranulonError(f"There is no field {unknown[0]!r} to name a column for; the fields are {', '.join(FIELDS)}.")
    named = {name: name for name in FIELDS} | (columns or {})
    root = image_root or (path if path.is_dir() else path.parent)
    found: dict[str, Prediction] = {}
    for place, row in rows_of(path):
        where = f"{path}, {place}"
        if named["image"] not in row and "images" in row and "image" not in (columns or {}):
            images = row["images"]
            if not isinstance(images, list) or len(images) > 1:
                raise GranulonError(f"{where}: the judge looks at one image, and `images` is not a list of one.")
            row["image"] = images[0] if images else None
        for field in ("prediction", "image"):
            if named[field] not in row:
                there = f"it has {', '.join(map(repr, row))}"
                raise GranulonError(
                    f"{where} has no column {named[field]!r} ({there}); name the column with --column {field}=NAME."
                )
        texts = {field: row.get(named[field]) for field in ("prediction", "question", "reference", "task")}
        for field, text in texts.items():
            if not isinstance(text, str | None):
                raise GranulonError(f"{where}: {named[field]} is {as_json(text)}, not a text.")
        name = row.get(named["id"])
        name = f"#{len(found)}" if name is None else name if isinstance(name, str) else id_of(name)
        if name in found:
            raise GranulonError(f"{where} has the id {name!r} a second time.")
        image, task = image_of(row[named["image"]], root, where), texts.pop("task")
        found[name] = Prediction(id=name, image=image, task=task, **{field: text or "" for field, text in texts.items()})
    if not found:
        raise GranulonError(f"{path} holds no predictions.")
    paths = [sample.image for sample in found.values() if isinstance(sample.image, str)]
    if len(paths) == len(found) and not any(map(os.path.exists, paths)):
        raise GranulonError(f"None of the images exists, the first would be {paths[0]!r}; say --image-root FOLDER.")
    return list(found.values())


def judged(samples: list[Prediction], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per sample: what was judged (of the image its path, and as "image_id" which one it is), accuracy,
    hallucination, reason, segments' scores.

    Of a panel, or of several samples, also the spread and, as "accuracy.JUDGE", each judge's own score.
    """
    rows = []
    for i, sample in enumerate(samples):
        row = asdict(sample)
        row["image"] = row["image"] if isinstance(row["image"], str) else row["image"].get("path")
        row |= {"image_id": result["image_ids"][i], **{name: result[f"{name}_scores"][i] for name in SCORES}}
        row |= {"reason": result["reasons"][i], "empty": result["empty"][i]}
        if judges := result.get("judges"):
            row |= {f"{name}_spread": result[f"{name}_spread"][i] for name in SCORES}
            row |= {f"{name}.{judge}": one[f"{name}_scores"][i] for judge, one in judges.items() for name in SCORES}
        if parts := result.get("segments"):
            row["segments"] = {name: [part[i] for part in parts[f"{name}_scores"]] for name in SCORES}
        rows.append(row)
    return rows


def interval_text(result: dict[str, Any], name: str) -> str:
    """Return the interval of a mean in words, or why there is none."""
    if result[name] is None:
        return ""
    if (ci := result[f"{name}_ci"]) is not None:
        return f"{ci[0]:.1f} to {ci[1]:.1f}"
    return "none of a single image" if result["n_images"] < 2 else "none, since all images are scored alike"


def length_correlation(rows: list[dict[str, Any]]) -> float | None:
    """Return Spearman's correlation of accuracy with the number of words; None where it is undefined."""
    scored = [row for row in rows if row["accuracy"] is not None and not row["empty"]]
    accuracy, words = [row["accuracy"] for row in scored], [len(row["prediction"].split()) for row in scored]
    if len(set(accuracy)) < 2 or len(set(words)) < 2:
        return None
    return float(spearmanr(accuracy, words).statistic)


def thumbnail(image: Any) -> str | None:
    """Return the data URL of a small JPEG, or None where the image cannot be read."""
    try:
        small = to_rgb(open_image(encode_image(image)))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        return data_url(jpeg(small, quality=80))
    except Exception:  # Pillow raises what its many decoders raise
        return None


def write_report(path: Path, title: str, samples: list[Prediction], result: dict[str, Any], show: int = 200) -> None:
    """Write a self-contained HTML page: the summary, a histogram of both scores, the `show` worst samples with their images."""
    rows = judged(samples, result)
    # Hallucination minus accuracy. The unscored lead, since somebody has to look at them.
    worth = [-101 if row["accuracy"] is None else row["accuracy"] - row["hallucination"] for row in rows]
    worst = sorted(range(len(rows)), key=worth.__getitem__)[:show]
    cards = [{**rows[i], "thumbnail": thumbnail(samples[i].image)} for i in worst]
    histograms = {}
    for name in SCORES:
        scores = [row[name] for row in rows if row[name] is not None]
        counts, _ = np.histogram(scores, bins=10, range=(0, 100))
        histograms[name] = {"counts": counts, "top": max(1, counts.max())}
    more: dict[str, Any] = {"n": len(rows), "histograms": histograms, "length": length_correlation(rows)}
    more["interval_text"] = interval_text
    write_page(path, "judge_report.html.jinja", title=title, result=result, cards=cards, **more)


def install() -> Path:
    """Put the judge into evaluate's module cache, where `evaluate.load("granulon/judge")` finds it offline; return the file."""
    from datasets import DownloadMode
    from evaluate.loading import LocalEvaluationModuleFactory, init_dynamic_modules

    factory = LocalEvaluationModuleFactory(judge.__file__, download_mode=DownloadMode.FORCE_REDOWNLOAD)  # replaces another one
    factory.name = "granulon/judge"
    return Path(init_dynamic_modules()).joinpath(*factory.get_module().module_path.split(".")[1:]).with_suffix(".py")
