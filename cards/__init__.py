"""Model cards: one Jinja template, one data file for each variant of the paper, and what renders them for any model.

Import it as ``granulon_hf.cards``. The other cards here are finished files: `demo_space.md` is the README of the demo's Space.
"""

import html
import shlex
import warnings
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from granulon_hf.errors import GranulonError, one_line
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.variants import NAMES, parse

FOLDER = Path(__file__).parent
# What the Hub's page shows to try the model with: a conversation, as the tag image-text-to-text has it.
PHOTOGRAPH = "https://huggingface.co/datasets/mishig/sample_images/resolve/main/tiger.jpg"
WIDGET = [
    {
        "example_title": title,
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": PHOTOGRAPH}}, {"type": "text", "text": question}],
            }
        ],
    }
    for title, question in (("Coarse", "What is in the picture?"), ("Fine", "What is at the bottom left of the picture?"))
]


def card_data(name: str) -> dict[str, Any]:
    """Read the data file of a variant: `title`, `metadata` (the head of the card), `parts`, `recipe`, and for some `notice`.

    Raises:
        GranulonError: an unknown name; the message lists all.
    """
    parse(name)
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def model_card(
    config: GranulonConfig,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    form: Literal["full", "adapter"] = "full",
    backbones: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    source: str | None = None,
    tuned: bool = False,
    whole: str | list[str] | None = None,
) -> ModelCard:
    """Render the card of a model.

    Args:
        config ([`GranulonConfig`]): of the model; levels and sizes are read from it.
        name (`str`, *optional*): the variant of the paper that the weights are, trained by its recipe. Without it nothing is
            said about training, and of the backbones only what `config` and `backbones` tell.
        repo_id (`str`, *optional*): where it is going to be, for the snippets.
        form (`str`, defaults to `"full"`): all weights, or `"adapter"`: only what was trained.
        backbones (`dict`, *optional*): where the frozen parts are from, as in [`GranulonConfig`]; by default what `config`
            says.
        results (`dict`, *optional*): content of the `scores.json` of `granulon eval run`; with several models in it, that of
            this one is found by `source`, `repo_id` or `name`, the first that is there.
        source (`str`, *optional*): the folder or Hub id that was evaluated.
        tuned (`bool`, defaults to `False`): whether the backbones' own weights were trained too.
        whole (`str` or `list[str]`, *optional*): of a quantized model, the Hub id of the one before; by default the backbones.

    Returns:
        [`~huggingface_hub.ModelCard`]: with the scores as `model-index`.

    Raises:
        GranulonError: an unknown name, a model that is not the named variant, no repository id, or results of other models.
        ImportError: `results` need the packages of `granulon-hf[eval]`.
    """
    if form not in ("full", "adapter"):
        raise GranulonError(f"A card is of the form 'full' or 'adapter'; got {form!r}.")
    if repo_id is not None:
        check_repo_id(repo_id)
    backbones = backbones or config.backbones
    vision: Any = config.vision_config
    text: Any = config.text_config
    if name is not None:
        check_variant(config, name)
    variant = name or (find_variant(backbones) if backbones else None)
    data = card_data(variant) if variant else {}
    width = data["parts"]["text"]["hidden_size"] if data else None
    other_size = name if name and text.hidden_size != width else None
    if text.hidden_size != width:  # what is said of the variant's own weights is not true of these
        name, data = None, {}
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["granulon"]}
    metadata["widget"] = WIDGET
    known = data.get("metadata", {"license": "unknown"})
    metadata |= known if name else {key: value for key, value in known.items() if key.startswith("license")}
    if backbones:
        metadata["base_model"] = [s["name"] for s in backbones.values() if is_hub_id(s["name"])] or None
    hub = metadata.get("base_model")
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is not None:
        quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
        metadata["base_model"] = whole or hub
    if metadata.get("base_model"):
        # Two models joined, both unchanged, is nearest to the Hub's "merge".
        relation = "adapter" if form == "adapter" else "finetune" if tuned else "merge"
        metadata["base_model_relation"] = "quantized" if quantization else relation
    repo_name = repo_id.split("/")[-1] if repo_id else None
    title = data["title"] if name else repo_name or "A Granulon model"
    if data.get("notice") and repo_name and not repo_name.lower().startswith("llama"):
        warnings.warn(
            f"The Llama 3.2 licence asks that the name of a published model begins with 'Llama'; {repo_name!r} does not.",
            stacklevel=2,
        )
    called = (source, source and Path(source).name, repo_id, repo_name, name or other_size)
    rows, command = score_rows(results, [one for one in called if one], name) if results else ([], "")
    if rows:
        metadata["metrics"] = list(dict.fromkeys(row["metric"] for row in rows))
    return ModelCard.from_template(
        ModelCardData(
            **metadata,
            model_name=repo_name or title if rows else None,
            eval_results=[eval_result(row) for row in rows] or None,
        ),
        template_str=(FOLDER / "model_card.md.jinja").read_text(encoding="utf-8"),
        md=inline,
        title=title,
        name=name,
        data=data,
        config=config,
        vision=vision,
        text=text,
        hub=hub,
        quantization=quantization,
        repo=repo_id or "path/to/this/folder",
        form=form,
        other_size=other_size,
        width=width,
        rows=rows,
        paper=any(row["paper"] is not None for row in rows),
        command=command,
        recorded=bool(results and results.get("command")),
    )


def check_variant(config: GranulonConfig, name: str) -> None:
    """Raise GranulonError for an unknown name, or a model that cannot be that variant."""
    encoder, decoder = parse(name)
    vision: Any = config.vision_config
    text: Any = config.text_config
    timm = encoder.open_id is not None and vision.model_type == "timm_wrapper"
    for what, found, right in (
        ("vision tower", vision.model_type, "timm_wrapper" if timm else encoder.tiny["model_type"]),
        ("language model", text.model_type, decoder.tiny["model_type"]),
        ("visual tokens", config.visual_tokens, GranulonConfig(**encoder.config).visual_tokens),
    ):
        if found != right:
            raise GranulonError(
                f"The model is not {name!r}: {what} {found!r} instead of {right!r}. Name its own variant, or none."
            )


def find_variant(backbones: dict[str, Any]) -> str | None:
    """Find a variant with these backbones: their licenses are known."""
    for name in NAMES:
        encoder, decoder = parse(name)
        if backbones["vision"]["name"] in (encoder.hub_id, encoder.open_id) and backbones["text"]["name"] == decoder.hub_id:
            return name
    return None


def check_repo_id(repo_id: str) -> None:
    """Raise GranulonError for a name that no repository can have."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise GranulonError(f"{repo_id!r} is not a name of a repository: {one_line(error)}") from None


def is_hub_id(text: str) -> bool:
    """Tell whether a backbone's name can be a repository; folders are nobody else's business."""
    try:
        check_repo_id(text)
    except GranulonError:
        return False
    return "/" in text and not Path(text).exists()


def inline(text: Any) -> str:
    """Write words of others as one line of plain text in Markdown."""
    text = html.escape(" ".join(str(text).split()))
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in text)


def score_rows(results: dict[str, Any], names: list[str], variant: str | None) -> tuple[list[dict[str, Any]], str]:
    """Make the evaluation's table for one model, a row for each data set and metric, and the command."""
    from granulon_hf.evaluation.benchmark import PAPER, PERCENT, estimated, scored
    from granulon_hf.evaluation.hallucination import WEIGHTED
    from granulon_hf.evaluation.tables import score_text

    rows: list[dict[str, Any]] = []
    try:
        models = list(results["models"])
        found = models if len(models) == 1 else [name for name in names if name in models]
        if not found:
            raise GranulonError(
                f"The results are of {', '.join(models)}; say which is this model by the name of its repository."
            )
        for data, metrics in results["scores"][found[0]].items():
            # A set that is a folder has the folder's name: where it lies is nobody else's business.
            failed = results.get("failed", {}).get(found[0], {}).get(data, 0)
            of_set = {"data": data, "shown": Path(data).name, "failed": failed}
            for metric, values in metrics.items():
                frame = scored(results, found[0], data, metric)
                if frame["weight"].any():
                    scale, unit = (100.0, ", %") if metric in PERCENT else (1.0, "")
                    score = estimated(frame, metric)
                    ends = [None if score[end] is None else scale * score[end] for end in ("low", "high")]
                    row = {"metric": metric, "unit": unit, "mean": scale * score["score"], "interval": ends, "n": len(frame)}
                    unscored = 0 if metric in WEIGHTED else len(values) - len(frame)
                    row |= {"text": score_text(score, digits=1, scale=scale), "unscored": unscored}
                    rows.append(of_set | row | {"paper": PAPER.get(variant or "", {}).get((data, metric))})
        sets = [part for data in results["data"] for part in ("--data", Path(data).name)]
    except (KeyError, TypeError, AttributeError) as error:
        raise GranulonError(f"The results are no scores.json of `granulon eval run` ({error!r}).") from None
    command = results.get("command") or shlex.join(["granulon", "eval", "run", "--model", found[0], *sets])
    return rows, " ".join(command.replace("```", "").split())


def eval_result(row: dict[str, Any]) -> EvalResult:
    """Write a row as the Hub's `model-index` has it; the interval is in the metric's arguments."""
    from granulon_hf.data.loading import ADAPTERS

    adapter = ADAPTERS.get(row["data"])
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=(adapter and adapter.repo) or row["shown"],
        dataset_name=row["shown"],
        metric_type=row["metric"],
        metric_name=row["metric"] + row["unit"],
        metric_value=round(row["mean"], 2),
        metric_args={"interval_95": [end if end is None else round(end, 2) for end in row["interval"]], "samples": row["n"]},
    )


__all__ = ["card_data", "check_variant", "model_card"]
