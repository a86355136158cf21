"""Layer-wise alignment: how near a model's states are to those of the reference text, layer by layer (supplement, section 3).

The figures 1 to 10 of the supplement show the "cosine similarity between the reference state and the state of each
corresponding layer". What its words leave open is settled here (ours):

- *Layers.* Decoder layers, counted from 1, with the states that transformers calls `hidden_states[1:]` (the last one is after
  the final norm). The embeddings are no layer and are left out.
- *Whose answer.* The model's own ("prediction"): a state that held the reference text itself would in part be compared with
  itself. "reference" puts the reference there instead: no generation, and models then differ by the image alone. A sample to
  which a model answers nothing is left out, and listed; curves and heatmaps of several models are over the samples that
  all of them could be compared on.
- *Which tokens.* "content": filled image slots, the last question's words, the answer's words; the reference is read after the
  token that the conversation begins with, which is not counted. Many decoders give their first token a norm far above those of
  others (an attention sink), so that a mean with it says little about the rest. "all" counts every token that is attended to,
  chat markup and sink included, and reads the reference as the tokenizer gives it.

Slots that a level leaves empty and padding never count.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cosine_similarity

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import Generation, answer_batch, one_by_one, open_folder, read_description
from granulon_hf.evaluation.batching import FEW
from granulon_hf.evaluation.tables import empty_figure
from granulon_hf.io import Journal, batches, replacing, write_text

ANSWERS = ("prediction", "reference")
TOKENS = ("content", "all")
BLOCK = 512  # samples drawn at once, and in a row group of the Parquet file
HEATMAP_ROWS = 256  # more samples are averaged in groups: nobody can see single rows
N_RESAMPLES = 1000


@dataclass
class Alignment:
    """What is compared."""

    answer: str = "prediction"  # or "reference": what follows the question
    tokens: str = "content"  # or "all": what the means are over
    generation: Generation = field(default_factory=Generation)  # of predictions; also the level, and the batch size

    def __post_init__(self):
        for value, choices, name in ((self.answer, ANSWERS, "answer"), (self.tokens, TOKENS, "tokens")):
            if value not in choices:
                raise GranulonError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}.")

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        made = self.generation.settings()
        if self.answer == "reference":
            names = ("granularity", "visual_stream", "visual_tokens", "price")
            made = {name: made[name] for name in names if name in made}
        return {"answer": self.answer, "tokens": self.tokens, **made}


def mean_states(states: Iterable[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Mean states [layers x B x E], in float32, over the tokens that count: [B x L x E] per layer, and a mask [B x L]."""
    hidden, counts = ~mask[..., None], mask.sum(1, keepdim=True)
    # Filled, not multiplied: what padding holds may be no number at all.
    return torch.stack([layer.float().masked_fill(hidden, 0.0).sum(1) / counts for layer in states])


@torch.inference_mode()
def align_batch(model: Any, processor: Any, samples: Sequence[Sample], what: Alignment) -> list[dict[str, Any]]:
    """The cosines of a batch of samples; nothing is kept of it but these.

    Returns:
        `list[dict]`: per sample `{"id", "answer", "cosine": list of one number per layer}`, or `{"id", "error"}`.
    """
    if what.answer == "reference":
        answers = [sample.reference for sample in samples]
    else:
        answers = [row["prediction"] for row in answer_batch(model, processor, samples, what.generation)]
    collator = GranulonCollator(processor, last_answer_only=True, jpeg_reduction=None)
    rows: list[dict[str, Any]] = [{"id": sample.id} for sample in samples]
    features, references = [], []
    for row, sample, answer in zip(rows, samples, answers, strict=True):
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        if not sample.reference.strip() or not answer.strip():
            row["error"] = f"its {'answer' if sample.reference.strip() else 'reference'} is empty"
        elif feature := collator.encode({"id": sample.id, "images": sample.images, "messages": [*sample.prompt, turn]}):
            row["answer"] = answer
            features.append(feature)
            references.append(sample.reference)
        else:
            row["error"] = collator.problems[-1]["reason"]
    if features:
        cosines = compare(model, processor, collator._padded(features), references, what).tolist()
        for row, values in zip((row for row in rows if "answer" in row), cosines, strict=True):
            row["cosine"] = [round(value, 6) for value in values]
    return rows


def compare(model: Any, processor: Any, batch: dict[str, torch.Tensor], references: list[str], what: Alignment) -> torch.Tensor:
    """Cosines [B x layers] of a collated batch, whose labels are on the answers, and B references."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    labels, generation = batch.pop("labels"), what.generation
    outputs = model.model(
        **batch,
        **(generation.choice() if "pixel_values" in batch else {}),
        visual_stream=generation.visual_stream,
        output_hidden_states=True,
        use_cache=False,
    )
    # Without the empty image slots, where the model has any.
    mask = (batch["attention_mask"] if outputs.attention_mask is None else outputs.attention_mask).bool()
    tokenizer, ids, start = processor.tokenizer, batch["input_ids"], batch["input_ids"][:, 0]
    if what.tokens == "content":
        words = batch["question_mask"].bool() | (labels != -100)
        special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
        mask = mask & (ids == processor.image_token_id) | words & ~torch.isin(ids, special)
    states = mean_states(outputs.hidden_states[1:], mask)
    del outputs  # all layers of a batch are large; the second pass must not come on top

    # What a reference says of control tokens is text, as in the answer.
    plain = tokenizer(references, add_special_tokens=what.tokens == "all", split_special_tokens=True)["input_ids"]
    if what.tokens == "content":
        plain = [[int(first), *one] for first, one in zip(start, plain, strict=True)]
    alone = tokenizer.pad({"input_ids": plain}, padding_side="right", return_tensors="pt").to(ids.device)
    mask = alone["attention_mask"].bool()
    alone = model.model(**alone, output_hidden_states=True, use_cache=False)
    if what.tokens == "content":
        mask[:, 0] = False
    return cosine_similarity(states, mean_states(alone.hidden_states[1:], mask), dim=-1).T.cpu()


class AlignmentRun:
    """Cosines of one model on one data set, kept in a journal: one line per sample, as it is computed.

    Beside the journal (`cosines.jsonl`), `run.json` describes model, data and settings; others in the same folder are refused.
    """

    def __init__(self, folder: Path, description: dict[str, Any]):
        self.folder = folder
        self.journal = Journal(self.folder / "cosines.jsonl")
        known = self.folder / "run.json"
        before = read_description(known) if known.exists() else None
        self.description = open_folder(self.folder, description, before, "was made with")
        write_text(known, json.dumps(self.description, indent=1) + "\n")

    def cosines(self) -> pd.DataFrame:
        """Cosines by id and layer, in the order of the journal, without the samples that could not be used."""
        rows = [row for row in self.journal if "cosine" in row]
        frame = pd.DataFrame([row["cosine"] for row in rows], index=pd.Index([row["id"] for row in rows], name="id"))
        return frame.rename(columns=lambda layer: layer + 1)

    def errors(self) -> list[dict[str, str]]:
        return [{"id": row["id"], "reason": row["error"]} for row in self.journal if "error" in row]

    def run(
        self,
        model: Any,
        processor: Any,
        samples: Iterable[Sample],
        what: Alignment,
        on_progress: Callable[[int], None] = lambda count: None,  # takes the samples found or done since the last call
    ) -> None:
        """Compute what is missing. One batch is in memory at a time, and of each sample that is done its id."""
        done = {row["id"] for row in self.journal}

        def missing() -> Iterator[Sample]:
            for sample in samples:
                if sample.id in done:
                    on_progress(1)
                else:
                    yield sample

        for batch in batches(missing(), what.generation.batch_size or FEW):
            rows = one_by_one(lambda samples: align_batch(model, processor, samples, what), batch)
            self.journal.append({"id": sample.id, **row} for sample, row in zip(batch, rows, strict=True))
            on_progress(len(batch))
            batch.clear()  # its images go before those of the next batch come


# --- what is made of the journals -------------------------------------------------------------------------------------


def write_parquet(path: Path, found: dict[str, pd.DataFrame]) -> None:
    """Write all cosines in long form (model, id, layer, cosine), one row group per block of samples."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"model": pa.dictionary(pa.int32(), pa.string()), "id": pa.string(), "layer": pa.int16(), "cosine": pa.float32()}
    schema = pa.schema(types)
    with replacing(path) as part, pq.ParquetWriter(part, schema) as writer:
        for name, cosines in found.items():
            count, layers = cosines.shape
            columns = {"model": name, "id": cosines.index.repeat(layers), "layer": np.tile(cosines.columns, count)}
            long = pd.DataFrame({**columns, "cosine": cosines.to_numpy().ravel()})
            writer.write_table(pa.Table.from_pandas(long, schema), row_group_size=BLOCK * layers)


def curve(cosines: pd.DataFrame, n_resamples: int = N_RESAMPLES) -> pd.DataFrame:
    """Per layer the `mean` of at least one sample, `low` and `high` of its 95 % percentile bootstrap band.

    In place of samples that are drawn, the Poisson bootstrap puts every sample into every resample a Poisson(1) number of
    times, so that sums of blocks are all that is kept.
    """
    draw, values = np.random.default_rng(0), cosines.to_numpy()
    weights, sums = np.zeros((n_resamples, 1)), np.zeros((n_resamples, values.shape[1]))
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        times = draw.poisson(1.0, (n_resamples, len(block)))
        weights, sums = weights + times.sum(1, keepdims=True), sums + times @ block
    drawn = weights[:, 0] > 0  # of very few samples a resample may hold none
    low, high = np.percentile(sums[drawn] / weights[drawn], [2.5, 97.5], axis=0)
    return pd.DataFrame({"mean": values.mean(0), "low": low, "high": high}, index=cosines.columns)


def heatmap_rows(cosines: np.ndarray, rows: int = HEATMAP_ROWS) -> np.ndarray:
    """Average neighbors where there are more than `rows` samples. Shape [at most rows x layers]."""
    starts = np.arange(0, len(cosines), -(-len(cosines) // rows))
    counts = np.diff([*starts, len(cosines)])
    return np.add.reduceat(cosines, starts) / counts[:, None]


def heatmap(name: str, rows: np.ndarray, n: int, lowest: float = 0.0):
    """The supplement's figure of one model, from [rows x layers] that stand for `n` samples; a `matplotlib.figure.Figure`.

    The lower end of the colors should be the same for all models that are compared.
    """
    from matplotlib.ticker import MaxNLocator

    figure = empty_figure(6.4, 4.4)
    axes = figure.subplots()
    layers = rows.shape[1]
    image = axes.imshow(
        rows, aspect="auto", vmin=lowest, vmax=1, interpolation="nearest", cmap="viridis", extent=(0.5, layers + 0.5, n, 0)
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    grouped = "" if len(rows) == n else f" ({-(-n // len(rows))} averaged per row)"
    axes.set(xlabel="decoder layer", ylabel=f"sample{grouped}", xlim=(0.5, layers + 0.5))
    axes.set_title(f"{name} · mean {rows.mean():.3f}", fontsize=10)
    figure.colorbar(image, label="cosine to the reference")
    return figure


def curves(found: dict[str, pd.DataFrame]):
    """The mean curves of all models in one plot, with their bands; a `matplotlib.figure.Figure`."""
    from matplotlib.ticker import MaxNLocator

    figure = empty_figure(7.2, 4.4)
    axes = figure.subplots()
    # Colors tell ten encoders apart, and line styles those who see few colors.
    for i, (name, one) in enumerate(found.items()):
        color, style = f"C{i % 10}", ("-", "--", "-.", ":")[i % 4]
        axes.fill_between(one.index, one["low"], one["high"], color=color, alpha=0.18, linewidth=0)
        axes.plot(one["mean"], style, color=color, label=name, marker="o", markersize=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="decoder layer", ylabel="cosine to the reference")
    axes.grid(alpha=0.25)
    axes.set_title("Mean over samples, 95 % bootstrap band", fontsize=10)
    axes.legend(fontsize=8, framealpha=0.7)
    return figure


def report(folder: Path, runs: dict[str, AlignmentRun], left_out: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `alignment.parquet`, `alignment.json`, `curves.png/svg` and per model `heatmap-….png/svg`.

    Curves and heatmaps are over the samples that all models have, those aside of which no sample could be used; where models
    have none in common, each is over its own. The Parquet file has all.

    Returns what is in `alignment.json`, of which `failed` has the models without a sample, each with a reason. `left_out` is
    what loading left out. Raises GranulonError where no sample of any model could be used.
    """
    cosines = {name: run.cosines() for name, run in runs.items()}
    failed = {}
    for name, run in runs.items():
        if cosines[name].empty:
            failed[name] = next((error["reason"] for error in run.errors()), "there are none")
            del cosines[name]
    if not cosines:
        raise GranulonError(
            f"No sample could be compared: {'; '.join(f'{name} ({reason})' for name, reason in failed.items())}."
        )
    write_parquet(folder / "alignment.parquet", cosines)
    common = set.intersection(*(set(one.index) for one in cosines.values()))
    shown = {name: one[one.index.isin(common)] if common else one for name, one in cosines.items()}
    found = {name: curve(one) for name, one in shown.items()}
    rows = {name: heatmap_rows(one.to_numpy(), HEATMAP_ROWS) for name, one in shown.items()}
    lowest = min(0.0, *(float(one.min()) for one in rows.values()))
    figures = {"curves": curves({f"{name} (n = {len(shown[name])})": one for name, one in found.items()})}
    for name, one in rows.items():
        figures[f"heatmap-{runs[name].folder.name}"] = heatmap(name, one, len(shown[name]), lowest)
    for stem, figure in figures.items():
        for kind in ("png", "svg"):
            figure.savefig(folder / f"{stem}.{kind}", dpi=150)
    summary = {
        "models": {
            name: {
                "samples": len(shown[name]),
                "usable": len(cosines[name]),
                **{key: [round(value, 6) for value in one[key].tolist()] for key in ("mean", "low", "high")},
                "mean_of_layers": round(float(one["mean"].to_numpy().mean()), 6),
                "left_out": runs[name].errors(),
                "description": runs[name].description,
            }
            for name, one in found.items()
        },
        "failed": failed,
        "samples": "those that all models have" if common else "each model's own",
        "left_out_of_data": left_out or {},
        "band": f"95 % percentile Poisson bootstrap, {N_RESAMPLES} resamples, seed 0",
        "layers": "decoder layers from 1, as transformers' hidden_states[1:]",
    }
    write_text(folder / "alignment.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary
