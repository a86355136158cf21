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
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import Generation, answer_batch, read_description
from granulon_hf.io import Journal, batches, replacing, write_text

ANSWERS = ("prediction", "reference")
TOKENS = ("content", "all")
BLOCK = 512  # samples read at once from a journal, and in a row group of the Parquet file
HEATMAP_ROWS = 256  # more samples are averaged in groups: nobody can see single rows
N_RESAMPLES = 1000


@dataclass
class Alignment:
    """What is compared.

    Args:
        answer (`str`): "prediction" or "reference": what follows the question.
        tokens (`str`): "content" or "all": what the means are over.
        generation ([`Generation`]): how predictions are made, the level, and the batch size.
    """

    answer: str = "prediction"
    tokens: str = "content"
    generation: Generation = field(default_factory=Generation)

    def __post_init__(self):
        for value, choices, name in ((self.answer, ANSWERS, "answer"), (self.tokens, TOKENS, "tokens")):
            if value not in choices:
                raise GranulonError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}.")

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        made = self.generation.settings()
        if self.answer == "reference":
            made = {name: made[name] for name in ("granularity", "visual_stream")}
        return {"answer": self.answer, "tokens": self.tokens, **made}


def mean_states(states: Iterable[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Mean over the marked tokens, one layer after the other.

    Args:
        states (`iterable`): per layer, shape [B x L x E].
        mask (`torch.Tensor`): true on the tokens that count, shape [B x L].

    Returns:
        `torch.Tensor`: shape [layers x B x E], float32.
    """
    hidden, counts = ~mask[..., None], mask.sum(1, keepdim=True)
    # Filled, not multiplied: what padding holds may be no number at all.
    return torch.stack([layer.float().masked_fill(hidden, 0.0).sum(1) / counts for layer in states])


def unusable(samples: Sequence[Sample], answers: Sequence[str | None]) -> list[str | None]:
    reasons: list[str | None] = []
    for sample, answer in zip(samples, answers, strict=True):
        empty = "reference" if not sample.reference.strip() else "answer" if not (answer or "").strip() else None
        reasons.append(empty and f"its {empty} is empty")
    return reasons


@torch.inference_mode()
def align_batch(model: Any, processor: Any, samples: Sequence[Sample], what: Alignment) -> list[dict[str, Any]]:
    """The cosines of a batch of samples; nothing is kept of it but these.

    Args:
        model ([`GranulonForConditionalGeneration`]): in eval mode.
        processor ([`GranulonProcessor`]): its processor.
        samples (`list[Sample]`): to compare; an existing answer of theirs is not used.
        what ([`Alignment`]): settings.

    Returns:
        `list[dict]`: per sample `{"id", "cosine": list of one number per layer, "answer"}`, or `{"id", "error"}`.
    """
    if what.answer == "reference":
        answers = [sample.reference for sample in samples]
    else:
        answers = [row["prediction"] for row in answer_batch(model, processor, samples, what.generation)]
    collator = GranulonCollator(processor, last_answer_only=True, jpeg_reduction=None)
    rows: list[dict[str, Any]] = []
    features, references = [], []
    for sample, answer, reason in zip(samples, answers, unusable(samples, answers), strict=True):
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        feature = None
        if reason is None:
            feature = collator.encode({"id": sample.id, "images": sample.images, "messages": [*sample.prompt, turn]})
            reason = None if feature is not None else collator.problems[-1]["reason"]
        rows.append({"id": sample.id, "error": reason} if feature is None else {"id": sample.id, "answer": answer})
        if feature is not None:
            features.append(feature)
            references.append(sample.reference)
    if features:
        cosines = iter(compare(model, processor, collator._padded(features), references, what).tolist())
        rows = [row if "error" in row else {**row, "cosine": [round(value, 6) for value in next(cosines)]} for row in rows]
    return rows


def compare(model: Any, processor: Any, batch: dict[str, torch.Tensor], references: list[str], what: Alignment) -> torch.Tensor:
    """Cosines, shape [B x layers].

    Args:
        batch (`dict`): of [`GranulonCollator`], padded on the right; labels on the answers.
        references (`list[str]`): B texts.
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    labels, generation = batch.pop("labels"), what.generation
    outputs = model.model(
        **batch,
        granularity=generation.granularity if "pixel_values" in batch else None,
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
    width = max(map(len, plain))
    ids = torch.tensor([one + [tokenizer.pad_token_id] * (width - len(one)) for one in plain], device=ids.device)
    mask = torch.arange(width, device=ids.device) < torch.tensor([len(one) for one in plain], device=ids.device)[:, None]
    alone = model.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
    if what.tokens == "content":
        mask[:, 0] = False
    return cosine_similarity(states, mean_states(alone.hidden_states[1:], mask), dim=-1).T.cpu()


class AlignmentRun:
    """Cosines of one model on one data set, kept in a journal: one line per sample, as it is computed.

    Args:
        folder (`Path`): of the journal (`cosines.jsonl`) and its description (`run.json`).
        description (`dict`): model, data and settings; another one in the same folder is refused.

    Raises:
        GranulonError: the folder holds a run of something else.
    """

    def __init__(self, folder: str | os.PathLike, description: dict[str, Any]):
        self.folder = Path(folder)
        self.journal = Journal(self.folder / "cosines.jsonl")
        self.description = json.loads(json.dumps(description, default=str))
        known = self.folder / "run.json"
        if known.exists():
            before = read_description(known)
            changed = sorted(k for k in before.keys() | self.description.keys() if before.get(k) != self.description.get(k))
            if changed:
                raise GranulonError(
                    f"{str(self.folder)!r} was made with another {' and '.join(changed)}; name another folder, or remove it."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(known, json.dumps(self.description, indent=1) + "\n")

    def blocks(self, size: int = BLOCK, only: Set[str] | None = None) -> Iterator[tuple[list[str], np.ndarray]]:
        """Ids and their cosines [size x layers], in the order of the journal, without the samples that could not be used.

        Args:
            size (`int`): of a block.
            only (`set[str]`, *optional*): ids of samples to keep to.
        """
        ids: list[str] = []
        cosines: list[list[float]] = []
        for row in self.journal:
            if "cosine" in row and (only is None or row["id"] in only):
                ids.append(row["id"])
                cosines.append(row["cosine"])
            if len(ids) == size:
                yield ids, np.array(cosines)
                ids, cosines = [], []
        if ids:
            yield ids, np.array(cosines)

    def usable(self) -> set[str]:
        return {row["id"] for row in self.journal if "cosine" in row}

    def errors(self) -> list[dict[str, str]]:
        return [{"id": row["id"], "reason": row["error"]} for row in self.journal if "error" in row]

    def run(
        self,
        model: Any,
        processor: Any,
        samples: Iterable[Sample],
        what: Alignment,
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Compute what is missing. One batch is in memory at a time, and of each sample that is done its id.

        Args:
            on_progress (`callable`): called with the number of samples that were found or are done since the last call.
        """
        done = {row["id"] for row in self.journal}

        def missing() -> Iterator[Sample]:
            for sample in samples:
                if sample.id in done:
                    on_progress(1)
                else:
                    yield sample

        for batch in batches(missing(), what.generation.batch_size):
            self.journal.append(self.align(model, processor, batch, what))
            on_progress(len(batch))
            batch.clear()  # its images go before those of the next batch come

    def align(self, model: Any, processor: Any, batch: Sequence[Sample], what: Alignment) -> list[dict[str, Any]]:
        try:
            return align_batch(model, processor, batch, what)
        except ValueError as error:  # one bad sample must not cost the others their numbers
            if len(batch) > 1:
                return [row for sample in batch for row in self.align(model, processor, [sample], what)]
            return [{"id": batch[0].id, "error": " ".join(str(error).split())}]


# --- what is made of the journals -------------------------------------------------------------------------------------


def write_parquet(path: str | os.PathLike, runs: dict[str, AlignmentRun]) -> int:
    """All cosines in long form (model, id, layer, cosine), one row group per block of samples.

    Args:
        runs (`dict`): run of each model name.

    Returns:
        `int`: rows written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema({"model": names, "id": pa.string(), "layer": pa.int16(), "cosine": pa.float32()})
    rows = 0
    with replacing(path) as part, pq.ParquetWriter(part, schema) as writer:
        for name, run in runs.items():
            for ids, cosines in run.blocks():
                count, layers = cosines.shape
                columns = {
                    "model": pa.array([name] * cosines.size).cast(names),
                    "id": np.repeat(ids, layers),
                    "layer": np.tile(np.arange(1, layers + 1, dtype=np.int16), count),
                    "cosine": cosines.ravel().astype(np.float32),
                }
                writer.write_table(pa.table(columns, schema=schema))
                rows += cosines.size
    return rows


@dataclass
class Curve:
    """Of one model: samples, and per layer the mean cosine with its 95 % band, each of shape [layers]."""

    n: int
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve(blocks: Iterable[tuple[Sequence[str], np.ndarray]], n_resamples: int = N_RESAMPLES) -> Curve | None:
    """Mean curve with a 95 % percentile bootstrap band, in memory that does not grow with the samples.

    A bootstrap that needs all samples at once is replaced by the Poisson bootstrap: every sample comes into every resample a
    Poisson(1) number of times, so that sums are all that is kept.

    Returns:
        [`Curve`], or `None` where there is no sample.
    """
    draw, n, total = np.random.default_rng(0), 0, np.zeros(1)
    weights, sums = np.zeros((n_resamples, 1)), np.zeros((n_resamples, 1))
    for _, cosines in blocks:
        times = draw.poisson(1.0, (n_resamples, len(cosines)))
        n, total = n + len(cosines), total + cosines.sum(0)
        weights, sums = weights + times.sum(1, keepdims=True), sums + times @ cosines
    if not n:
        return None
    drawn = weights[:, 0] > 0  # of very few samples a resample may hold none
    low, high = np.percentile(sums[drawn] / weights[drawn], [2.5, 97.5], axis=0)
    return Curve(n, total / n, low, high)


def heatmap_rows(run: AlignmentRun, n: int, rows: int = HEATMAP_ROWS, only: Set[str] | None = None) -> np.ndarray:
    """Samples x layers; of more than `rows` samples, neighbours are averaged. Shape [at most rows x layers]."""
    group, sums, counts, seen = -(-n // rows), [], [], 0
    for _, cosines in run.blocks(only=only):
        for line in cosines:
            if seen % group == 0:
                sums.append(np.zeros_like(line))
                counts.append(0)
            sums[-1] += line
            counts[-1] += 1
            seen += 1
    return np.array(sums) / np.array(counts)[:, None]


def heatmap(name: str, rows: np.ndarray, n: int, lowest: float = 0.0):
    """The supplement's figure of one model.

    Args:
        rows (`np.ndarray`): shape [rows x layers].
        n (`int`): samples that the rows stand for.
        lowest (`float`): lower end of the colours, which should be the same for all models that are compared.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    layers = rows.shape[1]
    image = axes.imshow(
        rows, aspect="auto", vmin=lowest, vmax=1, interpolation="nearest", cmap="viridis", extent=(0.5, layers + 0.5, n, 0)
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    grouped = "" if len(rows) == n else f" ({-(-n // len(rows))} averaged per row)"
    axes.set(xlabel="decoder layer", ylabel=f"sample{grouped}", xlim=(0.5, layers + 0.5))
    axes.set_title(f"{name} · mean {rows.mean():.3f}", fontsize=10)
    figure.colorbar(image, label="cosine to the reference")
    return figure


def curves(found: dict[str, Curve]):
    """The mean curves of all models in one plot, with their bands.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    # Colours tell ten encoders apart, and line styles those who see few colours.
    for i, (name, one) in enumerate(found.items()):
        layers = np.arange(1, len(one.mean) + 1)
        colour, style = f"C{i % 10}", ("-", "--", "-.", ":")[i % 4]
        axes.fill_between(layers, one.low, one.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(layers, one.mean, style, color=colour, label=f"{name} (n = {one.n})", marker="o", markersize=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="decoder layer", ylabel="cosine to the reference")
    axes.grid(alpha=0.25)
    axes.set_title("Mean over samples, 95 % bootstrap band", fontsize=10)
    axes.legend(fontsize=8, framealpha=0.7)
    return figure


def report(folder: str | os.PathLike, runs: dict[str, AlignmentRun], left_out: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `alignment.parquet`, `alignment.json`, `curves.png/svg` and per model `heatmap-….png/svg`.

    Args:
        folder (`Path`): where to write.
        runs (`dict`): run of each model name; the names of their folders name the heatmaps.
        left_out (`dict`, *optional*): what loading left out, of [`~granulon_hf.evaluation.sets.left_out`].

    Curves and heatmaps are over the samples that all models have, those aside of which no sample could be used; where models
    have none in common, each is over its own. The Parquet file has all.

    Returns:
        `dict`: what is in `alignment.json`; `failed` has the models without a sample, each with a reason.

    Raises:
        GranulonError: no sample of any model could be used.
    """
    folder = Path(folder)
    usable = {name: run.usable() for name, run in runs.items()}
    failed = {
        name: next((error["reason"] for error in runs[name].errors()), "there are none")
        for name, ids in usable.items()
        if not ids
    }
    if len(failed) == len(runs):
        raise GranulonError(
            f"No sample could be compared: {'; '.join(f'{name} ({reason})' for name, reason in failed.items())}."
        )
    runs = {name: run for name, run in runs.items() if name not in failed}
    common = set.intersection(*(usable[name] for name in runs)) or None
    found = {name: one for name, run in runs.items() if (one := curve(run.blocks(only=common))) is not None}
    write_parquet(folder / "alignment.parquet", runs)
    rows = {name: heatmap_rows(run, found[name].n, only=common) for name, run in runs.items()}
    lowest = min(0.0, *(float(one.min()) for one in rows.values()))
    figures = {f"heatmap-{run.folder.name}": heatmap(name, rows[name], found[name].n, lowest) for name, run in runs.items()}
    figures["curves"] = curves(found)
    for stem, figure in figures.items():
        for kind in ("png", "svg"):
            figure.savefig(folder / f"{stem}.{kind}", dpi=150)
    summary = {
        "models": {
            name: {
                "samples": one.n,
                "usable": len(usable[name]),
                **{key: [round(float(value), 6) for value in getattr(one, key)] for key in ("mean", "low", "high")},
                "mean_of_layers": round(float(one.mean.mean()), 6),
                "left_out": runs[name].errors(),
                "description": runs[name].description,
            }
            for name, one in found.items()
        },
        "failed": failed,
        "samples": "each model's own" if common is None else "those that all models have",
        "left_out_of_data": left_out or {},
        "band": f"95 % percentile Poisson bootstrap, {N_RESAMPLES} resamples, seed 0",
        "layers": "decoder layers from 1, as transformers' hidden_states[1:]",
    }
    write_text(folder / "alignment.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary
