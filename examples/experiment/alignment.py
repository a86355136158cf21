"""Before any question is asked, the projector learns the language model's words: the study's stand-in for LLaVA's captions.

For every cell of the grid the language model knows a description (`language_model.true_cells`): the sum of the embeddings of
the words that are true there. The projector is fitted to it, cell by cell. From random weights, questions alone teach no arm to
read tags within a quick run; with this, all begin where reading is possible. All arms of a seed begin with the same projector,
and those whose slots are told where they are (`slot_position`) with its words for rows and columns.
"""

import fcntl
import json
import time
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from granulon_hf.data.granuscenes.questions import COLOURS, LETTERS
from granulon_hf.io import write_text

from .language_model import GRID, meanings, true_cells

if TYPE_CHECKING:
    from .training import Study

SCENES, LEARNING_RATE = 10, 2e-3  # scenes a step, of AdamW; the rate falls to 0


def words_of_cells(study: "Study", split: str, tokenizer: Any) -> torch.Tensor:
    """Ids of the words of all cells [scenes x cells x words]; 0 is none."""
    vocabulary = tokenizer.get_vocab()
    rows = [[[vocabulary[word] for word in cell] for cell in true_cells(scene)] for scene in study.scenes[split]]
    width = max(len(cell) for row in rows for cell in row)
    return torch.tensor([[cell + [0] * (width - len(cell)) for cell in row] for row in rows])


@torch.inference_mode()
def readability(projector: Any, features: Any, images: list[Any], words: torch.Tensor, table: torch.Tensor, tokenizer: Any):
    """How often the nearest letter, and colour, of a tag's cell is the tag's, after the projector."""
    right: dict[str, list[float]] = {"letter": [], "colour": []}
    kinds = {"letter": list(LETTERS), "colour": list(COLOURS)}
    ids = {kind: torch.tensor(tokenizer.convert_tokens_to_ids(names)) for kind, names in kinds.items()}
    tag = tokenizer.convert_tokens_to_ids("tag")
    for image, row in zip(images, words, strict=True):
        with_tag = row[:, 0] == tag
        made = projector(features(image)[with_tag].float())
        for place, kind in enumerate(kinds, start=1):
            others = table[ids[kind]] - table[ids[kind]].mean(0)
            said = ids[kind][(made @ others.T - 0.5 * others.square().sum(1)).argmax(1)]
            right[kind] += (said == row[with_tag, place]).float().tolist()
    return {kind: round(sum(values) / len(values), 4) for kind, values in right.items()}


def words_of_places(table: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Embeddings of the words for rows and for columns [2 x 14 x E]: what the projector's `position` begins with."""
    names = [[f"{kind}{number}" for number in range(GRID)] for kind in ("row", "column")]
    return table[torch.tensor([tokenizer.convert_tokens_to_ids(one) for one in names])]


def align(study: "Study", seed: int) -> dict[str, torch.Tensor] | None:
    """Weights with which all arms of a seed begin; fitted once, kept in `OUT/alignment/<seed>`.

    The three kinds of cells (nothing, object, tag) weigh the same. `results.json` has what can be read from tags' cells of
    validation scenes (chance is an eighth): an estimate of what questions about tags can reach.

    Args:
        study ([`Study`]): with features and language model.
        seed (`int`): of first weights and order.

    Returns:
        `dict` of weights, "position" for the arms that have it; `None` if `alignment_epochs` is 0.
    """
    epochs = study.settings.alignment_epochs
    if not epochs:
        return None
    folder = study.out / "alignment" / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another arm of this seed may be at it
        path = folder / "projector.safetensors"
        if path.exists() and (folder / "results.json").exists():  # the archive of a study has the second without the first
            return load_file(path)
        began = time.time()
        model, processor = study.model("pixel", seed)
        features, tokenizer = study.features(model), processor.tokenizer
        table = model.get_input_embeddings().weight.detach().float()
        projector = model.model.multi_modal_projector
        words = words_of_cells(study, "train", tokenizer)
        images = [study.image(scene.id) for scene in study.scenes["train"]]
        tag = tokenizer.convert_tokens_to_ids("tag")
        kinds = (words[..., 0] != 0).long() + (words[..., 0] == tag)
        weights = (1 / torch.bincount(kinds.flatten(), minlength=3).clamp(min=1))[kinds] * kinds.numel() / 3
        optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        steps = epochs * -(-len(images) // SCENES)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1 - step / steps))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            study.stop_if_orphaned()
            for chosen in torch.randperm(len(images), generator=generator).split(SCENES):
                made = projector(torch.stack([features(images[i]) for i in chosen]).float())
                distance = (made - meanings(words[chosen], table)).square().mean(-1)
                optimizer.zero_grad()
                (distance * weights[chosen]).mean().backward()
                optimizer.step()
                schedule.step()
        held_out = [study.image(scene.id) for scene in study.scenes["validation"]]
        words = words_of_cells(study, "validation", tokenizer)
        results = readability(projector, features, held_out, words, table, tokenizer)
        state = {name: value.detach().contiguous() for name, value in projector.state_dict().items()}
        state["position"] = words_of_places(table, tokenizer)
        save_file(state, path)
        write_text(folder / "results.json", json.dumps(results | {"seconds": round(time.time() - began, 1)}, indent=1) + "\n")
        return state
