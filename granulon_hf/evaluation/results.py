"""Scores as the Hub's `.eval_results/*.yaml`, which model repositories hold and benchmarks collect."""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

import granulon_hf
from granulon_hf.data import ADAPTERS
from granulon_hf.evaluation.benchmark import PERCENT, estimated, scored, slug
from granulon_hf.evaluation.tables import score_text
from granulon_hf.io import write_text


def write_results(result: dict[str, Any], out: Path) -> tuple[list[Path], list[str]]:
    """Write `<model>/.eval_results/<set>.yaml` for every model and every set that is on the Hub.

    A task is a metric, of a part of the set where it has several. Values are those of the table; the notes have the interval.

    Args:
        result (`dict`): of [`~granulon_hf.evaluation.benchmark.run_suite`].
        out (`Path`): folder of the evaluation.

    Returns:
        the files, and the sets that have no repository, of which nothing can be written.
    """
    files, now = [], datetime.now(timezone.utc).isoformat(timespec="seconds")
    known = {data: ADAPTERS[data].repo for data in result["sets"] if data in ADAPTERS}
    for model in result["models"]:
        for data, repo in known.items():
            if repo is None:
                continue
            entries = []
            for part in result["sets"][data]["parts"]:
                for metric in result["scores"][model][part]:
                    frame, scale = scored(result, model, part, metric), 100.0 if metric in PERCENT else 1.0
                    if not frame["weight"].any():
                        continue
                    found = estimated(frame, metric)
                    notes = f"{score_text(found, 1, scale)} (95 %), {len(frame)} samples, granulon_hf {granulon_hf.__version__}"
                    if metric in ("judge", "hallucination"):
                        notes += f", judge {result['judge']}"
                    task = metric if part == data else f"{part.removeprefix(f'{data}-')}_{metric}"
                    entries.append(EvalResultEntry(repo, task, round(scale * found["score"], 2), date=now, notes=notes))
            files.append(out / slug(model) / ".eval_results" / f"{slug(data)}.yaml")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            write_text(files[-1], yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
    return files, [data for data in result["sets"] if not known.get(data)]
