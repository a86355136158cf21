"""A small frozen language model for the experiment: a Qwen2 decoder with a vocabulary of words, trained on text alone.

It learns to answer the questions of GranuScenes from descriptions of scenes, and never sees a picture. A description stands
where the image slots will stand, in one of three forms:

    words   one word after the other: name, category, place, size, letters and colours of each object, objects in random order
    cells   some cells of the 14 × 14 grid in raster order, each *one* slot: the sum of the embeddings of the words that are
            true of it, at the position that this cell's image slot will have; behind them, in half of the descriptions, some of
            `things`
    things  objects and tags in random order, each one slot: the sum of the embeddings of its words

In half of the descriptions the cells say where they are, and in half the things do. The last two forms are what a projector can
imitate: it has one vector for a patch or a cluster. All arms get the same model.
"""

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from granulon_hf.data.granuscenes import GranuScenes, Pictures
from granulon_hf.data.granuscenes.questions import COLOURS, LETTERS, PHRASINGS, QUARTERS, nameable
from granulon_hf.data.granuscenes.scenes import Scene
from granulon_hf.io import write_text

GRID = 14
SIZES = 6  # words for how large an object is, in steps of a quarter of the smallest
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
IMAGE, QUESTION, ANSWER = "<image>", "<q>", "<a>"
# One mark before a question and one before an answer; the processor puts the image placeholders before the question's words.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<q>' + message['content'] }}"
    "{%- else -%}{{ '<a>' }}{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<a>' }}{%- endif -%}"
)
SEED = 1_000_003  # of the scenes that are described: others than those of any run
FORMS = ("words", "cells", "things")
CHECK_EVERY, PATIENCE = 200, 4  # steps between two checks of the accuracy, and checks without a gain that make a plateau


@dataclass
class TextSettings:
    """How the language model is made and trained.

    Args:
        name (`str`): "tiny".
        width, layers, heads (`int`): of the decoder.
        scenes (`int`): described in training.
        batch_size (`int`): scenes a step, with all their questions.
        learning_rate (`float`): after 100 steps of warm-up; it falls to 0 over a fifth of `max_steps` when the
            accuracy on descriptions has reached a plateau, at the latest at the end.
        max_steps (`int`): of AdamW.
        test_scenes (`int`): that its accuracy is measured on.
        seed (`int`): of weights and descriptions.
    """

    name: str = "tiny"
    width: int = 96
    layers: int = 3
    heads: int = 4
    scenes: int = 12000
    batch_size: int = 32
    learning_rate: float = 2e-3
    max_steps: int = 2000
    test_scenes: int = 200
    seed: int = 0


# --- tokenizer ----------------------------------------------------------------------------------------------------------


def make_tokenizer(pictures: Pictures) -> PreTrainedTokenizerFast:
    """Every word of questions, answers and descriptions is one token, in alphabetical order."""
    names = {name for pool in pictures.pools.values() for things in pool.values() for name in things}
    texts = [*names, *pictures.categories, *COLOURS, *LETTERS, *QUARTERS, "few some many yes no left right a an tag large ;"]
    texts += [phrasing.replace("{", " ").replace("}", " ") for phrasings in PHRASINGS.values() for phrasing in phrasings]
    texts += ["row column"] + [f"row{i} column{i}" for i in range(GRID)] + [f"size{i}" for i in range(SIZES)]
    split = pre_tokenizers.Split(Regex(r"\w+(?:-\w+)*|[^\w\s]"), "removed", invert=True)
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    special = [*SPECIAL.values(), IMAGE, QUESTION, ANSWER]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **SPECIAL, extra_special_tokens=[IMAGE, QUESTION, ANSWER], padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


# --- descriptions -------------------------------------------------------------------------------------------------------


def cell_of(x: float, y: float, side: int) -> tuple[int, int]:
    return min(GRID - 1, int(y * GRID / side)), min(GRID - 1, int(x * GRID / side))


def size_word(thing: Any, side: int) -> str:
    left, top, right, bottom = thing.box
    length = ((right - left) * (bottom - top)) ** 0.5 / side * 192
    return f"size{min(SIZES - 1, int((length - 24) / 9)) if length > 24 else 0}"


def about(scene: Scene, number: int, side: int) -> list[str]:
    """Words that are true of every part of an object."""
    thing = scene.things[number]
    return [*thing.name.split(), thing.category, size_word(thing, side), *(["large"] if number == 0 else [])]


def true_cells(scene: Scene, side: int = 192) -> list[list[str]]:
    """Words that are true of each of the 196 cells: of the object whose box covers its centre, and of the tag centred in it."""
    cells: list[list[str]] = [[] for _ in range(GRID * GRID)]
    centres = [side * (i + 0.5) / GRID for i in range(GRID)]
    for i, thing in enumerate(scene.things):
        left, top, right, bottom = thing.box
        inside = [
            (r, c) for r in range(GRID) for c in range(GRID) if top <= centres[r] <= bottom and left <= centres[c] <= right
        ]
        for row, column in [*inside, cell_of(*thing.centre, side)]:
            cells[row * GRID + column] = about(scene, i, side)
    for i, thing in enumerate(scene.things):
        for tag in thing.tags:
            row, column = cell_of(*tag.centre, side)
            cells[row * GRID + column] = ["tag", tag.letter, tag.colour, *about(scene, i, side)]
    return cells


def some(dice: random.Random, words: Sequence[str], share: float) -> list[str]:
    return [word for word in words if dice.random() < share]


def describe(scene: Scene, form: str, dice: random.Random, side: int = 192) -> tuple[list[list[str]], list[int]]:
    """Slots, each a list of words, and their positions."""
    order = list(range(len(scene.things)))
    dice.shuffle(order)
    if form == "words":
        slots: list[list[str]] = []
        for i in order:
            thing = scene.things[i]
            row, column = cell_of(*thing.centre, side)
            words = [thing.name, thing.category, f"row{row}", f"column{column}", size_word(thing, side)]
            words += ["large"] if i == 0 else []
            for tag in dice.sample(thing.tags, 2):
                words += [tag.letter, tag.colour]
            slots += [[word] for text in [*words, ";"] for word in text.split()]
        return slots, list(range(len(slots)))
    if form == "things":
        slots = thing_slots(scene, order, dice, side)
        start = dice.choice((0, 0, GRID * GRID))
        return slots, list(range(start, start + len(slots)))
    cells = grid_cells(scene, dice, side)
    positions = sorted(cells)
    slots = [cells[position] for position in positions]
    if dice.random() < 0.5:
        extra = thing_slots(scene, order, dice, side)
        extra = extra[: dice.randint(1, 20)]
        slots += extra
        positions += list(range(GRID * GRID, GRID * GRID + len(extra)))
    return slots, positions


def thing_slots(scene, order, dice, side) -> list[list[str]]:
    where = place_words(dice)
    slots = []
    for i in order:
        thing = scene.things[i]
        slots.append([*about(scene, i, side), *where(*cell_of(*thing.centre, side))])
        for tag in thing.tags:
            more = some(dice, about(scene, i, side), 0.9)
            slots.append(["tag", tag.letter, tag.colour, *more, *where(*cell_of(*tag.centre, side))])
    dice.shuffle(slots)
    return slots


def place_words(dice) -> Callable[[int, int], list[str]]:
    """What all slots of a description say of where they are: row and column, or (in half of the descriptions) nothing."""
    if dice.random() < 0.5:
        return lambda row, column: [f"row{row}", f"column{column}"]
    return lambda row, column: []


def grid_cells(scene, dice, side) -> dict[int, list[str]]:
    """Words of some cells, by their number in raster order: all with tags, some of each object, some of nothing."""
    where = place_words(dice)
    cells: dict[int, list[str]] = {}
    for _ in range(dice.randint(0, 8)):
        row, column = dice.randrange(GRID), dice.randrange(GRID)
        cells[row * GRID + column] = where(row, column)
    for i, thing in enumerate(scene.things):
        left, top, right, bottom = thing.box
        for _ in range(dice.randint(1, 5)):
            x, y = left + (0.15 + 0.7 * dice.random()) * (right - left), top + (0.15 + 0.7 * dice.random()) * (bottom - top)
            row, column = cell_of(x, y, side)
            cells[row * GRID + column] = some(dice, about(scene, i, side), 0.9) + where(row, column)
        row, column = cell_of(*thing.centre, side)
        cells[row * GRID + column] = about(scene, i, side) + where(row, column)
    for i, thing in enumerate(scene.things):
        for tag in thing.tags:
            row, column = cell_of(*tag.centre, side)
            more = some(dice, about(scene, i, side), 0.9) + where(row, column)
            cells[row * GRID + column] = ["tag", tag.letter, tag.colour, *more]
    return cells


def asked_of(scene: Scene) -> list[tuple[str, str, str]]:
    return [(question.text, question.answer, question.type) for question in scene.questions]


def short_questions(
    scene: Scene, categories: Sequence[str], dice: random.Random, side: int = 192
) -> list[tuple[str, str, str]]:
    """What the questions ask, in two or three words: with whole questions about full scenes alone, binding is found late, and
    whether some types are found at all hangs on the seed."""
    there = sorted({thing.category for thing in scene.things})
    absent = [category for category in categories if category not in there]
    asked = [(f"any {category}", "yes", "presence") for category in there]
    asked += [(f"any {category}", "no", "presence") for category in dice.sample(absent, min(len(there), len(absent)))]
    marks = Counter((tag.letter, tag.colour) for thing in scene.things for tag in thing.tags)
    named = nameable([thing.name for thing in scene.things])
    for i, thing in enumerate(scene.things):
        for tag in thing.tags:
            if i in named:
                asked.append((f"{thing.name} {tag.colour}", tag.letter, "letter"))
                asked.append((f"{thing.name} {tag.letter}", tag.colour, "colour"))
            if i == 0:
                asked.append((f"largest {tag.colour}", tag.letter, "largest_letter"))
            if marks[tag.letter, tag.colour] == 1:
                asked.append((f"{tag.letter} {tag.colour} tag", thing.category, "bearer"))
        if i in named:
            x, y = thing.centre
            row, column = cell_of(x, y, side)
            asked += [(f"row {thing.name}", f"row{row}", "place"), (f"column {thing.name}", f"column{column}", "place")]
            asked.append((f"quarter {thing.name}", QUARTERS[2 * (y > side / 2) + (x > side / 2)], "where"))
            apart = [scene.things[j] for j in named if abs(scene.things[j].centre[0] - x) >= 0.12 * side]
            for other in dice.sample(apart, min(2, len(apart))):
                asked.append((f"side {thing.name} {other.name}", "left" if x < other.centre[0] else "right", "relation"))
    return asked


def evenly(dice: random.Random, asked: Sequence[tuple[str, str, str]], count: int) -> list[tuple[str, str, str]]:
    """Some of the questions, as many of one type as of another: of tags there are many more to ask."""
    by_type: dict[str, list[tuple[str, str, str]]] = {}
    for one in dice.sample(asked, len(asked)):
        by_type.setdefault(one[2], []).append(one)
    rounds = [one for row in itertools.zip_longest(*by_type.values()) for one in row if one is not None]
    return dice.sample(rounds[:count], min(count, len(rounds)))


class TextBatches:
    """Batches of described scenes with their questions.

    Args:
        scenes (`Sequence[Scene]`): what is described.
        tokenizer: of [`make_tokenizer`].
        categories (`Sequence[str]`): all that there are, also of what is not shown.
    """

    def __init__(self, scenes: Sequence[Scene], tokenizer: Any, categories: Sequence[str]):
        self.categories = categories
        self.scenes, self.tokenizer = sorted(scenes, key=lambda scene: len(scene.things)), tokenizer
        self.vocabulary = tokenizer.get_vocab()
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def row(self, scene: Scene, form: str, dice: random.Random, asked: Sequence[tuple[str, str, str]]) -> dict[str, list]:
        """Words of each token [[id, …], …], positions and labels of a conversation of (text, answer, type); no slots if form is
        "blind"."""
        slots, positions = ([], []) if form == "blind" else describe(scene, form, dice)
        words = [[self.vocabulary[QUESTION]]] + [[self.vocabulary[word] for word in slot] for slot in slots]
        at = [0] + [position + 1 for position in positions]
        labels = [-100] * len(words)
        kinds = [""] * len(words)
        first = max(at) + 1
        if form == "cells":
            first = max(first, GRID * GRID + 1)
        rest: list[int] = []
        for turn, (text, said, kind) in enumerate(asked):
            prompt = ([self.vocabulary[QUESTION]] if turn else []) + self.ids(text) + [self.vocabulary[ANSWER]]
            answer = [*self.ids(said), self.tokenizer.eos_token_id]
            rest += prompt + answer
            labels += [-100] * len(prompt) + answer
            kinds += [""] * len(prompt) + [kind, ""]
        words += [[token] for token in rest]
        return {"words": words, "positions": at + list(range(first, first + len(rest))), "labels": labels, "kinds": kinds}

    def collate(self, rows: Sequence[dict[str, list]]) -> dict[str, torch.Tensor]:
        length, width = max(len(r["words"]) for r in rows), max(len(w) for r in rows for w in r["words"])
        words = torch.zeros(len(rows), length, width, dtype=torch.long)  # the padding token is number 0
        batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in ("position_ids", "attention_mask")}
        labels = torch.full((len(rows), length), -100)
        for i, row in enumerate(rows):
            filled = [w + [0] * (width - len(w)) for w in row["words"]]
            words[i, : len(filled)] = torch.tensor(filled)
            batch["position_ids"][i, : len(filled)] = torch.tensor(row["positions"])
            batch["attention_mask"][i, : len(filled)] = 1
            labels[i, : len(filled)] = torch.tensor(row["labels"])
        return {"words": words, "labels": labels, **batch}

    def draw(self, size: int, dice: random.Random, share: float = 1.0) -> dict[str, torch.Tensor]:
        """A batch of the share of the scenes with the fewest objects; the smaller it is, the shorter are descriptions and
        questions."""
        rows = []
        for _ in range(size):
            scene = self.scenes[int(dice.random() * share * len(self.scenes))]
            short = dice.random() < 1.1 - 0.8 * share
            asked, most = (short_questions(scene, self.categories, dice), 12) if short else (asked_of(scene), 5)
            form = dice.choices(FORMS, (0.2 * share, 0.45 * share, 1 - 0.65 * share))[0]
            rows.append(self.row(scene, form, dice, evenly(dice, asked, most)))
        return self.collate(rows)


def meanings(words: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Sums of the embeddings of words [I x slots x words], 0 being none: [I x slots x E]."""
    return F.embedding_bag(words.flatten(0, 1), table, mode="sum", padding_idx=0).unflatten(0, words.shape[:2])


def states(model: Qwen2ForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states: a slot's embedding is the sum of its words'."""
    embeds = meanings(batch["words"], model.get_input_embeddings().weight)
    return model.model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state


@torch.inference_mode()
def text_accuracy(model: Any, batches: TextBatches, form: str, seed: int = 0) -> dict[str, float]:
    """Accuracy of each type of question, every question alone behind a description of that form."""
    dice, right = random.Random(seed), {}
    tasks = [(scene, one) for scene in batches.scenes for one in asked_of(scene)]
    for start in range(0, len(tasks), 64):
        rows = [batches.row(scene, form, dice, [one]) for scene, one in tasks[start : start + 64]]
        batch = batches.collate(rows)
        said = model.lm_head(states(model, batch)).argmax(-1)
        for i, row in enumerate(rows):
            at = next(j for j, kind in enumerate(row["kinds"]) if kind)
            right.setdefault(row["kinds"][at], []).append(float(said[i, at - 1] == row["labels"][at]))
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


def described_scenes(pictures: Pictures, count: int, seed: int) -> list[Scene]:
    """Scenes with all phrasings: a language model knows more ways to ask than the pictures' training shows."""
    sets = [GranuScenes(split, count, pictures, seed=seed) for split in ("train", "test_heldout")]
    return [sets[i % 3 == 2].scene(i) for i in range(count)]


def untrained(tokenizer: Any, settings: TextSettings) -> Qwen2ForCausalLM:
    """The language model before its training."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.width // 2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # slots are found by content, over any distance
        max_position_embeddings=1024,
        initializer_range=settings.width**-0.5,  # 0.02 is for wide models: here attention would stay even for long
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def train(folder: Path, pictures: Pictures, settings: TextSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Train the language model and write it with its tokenizer and `results.json`; what was written before is returned.

    Args:
        folder (`Path`): of the model.
        pictures ([`Pictures`]): whose names are described; no picture is opened.
        settings ([`TextSettings`]): how.
        progress (`rich.progress.Progress`, *optional*): shows the steps.

    Returns:
        `dict`: `name`, `accuracy_by_form` (of each type of question; "blind" is without a description), `seconds`.
    """
    if (folder / "results.json").exists():
        return json.loads((folder / "results.json").read_text())
    began = time.time()
    torch.manual_seed(settings.seed)
    tokenizer = make_tokenizer(pictures)
    model = untrained(tokenizer, settings).train()
    batches = TextBatches(described_scenes(pictures, settings.scenes, SEED + settings.seed), tokenizer, pictures.categories)
    test = TextBatches(
        described_scenes(pictures, settings.test_scenes, SEED + settings.seed + 1), tokenizer, pictures.categories
    )
    dice = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    state: dict[str, Any] = {"step": 0, "falls_from": None, "losses": [], "curve": []}
    unfinished = folder / "unfinished.pt"
    if unfinished.exists():  # a killed study goes on
        state, weights, moments, dice_state = torch.load(unfinished, weights_only=False)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        dice.setstate(dice_state)
    folder.mkdir(parents=True, exist_ok=True)
    small, losses = TextBatches(test.scenes[::4], tokenizer, pictures.categories), state["losses"]
    fall = max(1, settings.max_steps // 5)
    task = progress.add_task("language model", total=settings.max_steps, completed=state["step"]) if progress else None
    while state["step"] < min(settings.max_steps, (state["falls_from"] or settings.max_steps) + fall):
        step = state["step"]
        left = 1.0 if state["falls_from"] is None else 1 - (step - state["falls_from"]) / fall
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(left, (step + 1) / 100)
        # Binding is found sooner where there is less to tell apart.
        batch = batches.draw(settings.batch_size, dice, min(1.0, 0.15 + max(0.0, 2 * step / settings.max_steps - 0.4)))
        labelled = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        chosen = labelled != -100
        loss = F.cross_entropy(model.lm_head(states(model, batch)[chosen]), labelled[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        state["step"] += 1
        if state["step"] % CHECK_EVERY == 0:
            found = [value for form in FORMS for value in text_accuracy(model, small, form).values()]
            state["curve"].append(sum(found) / len(found))
            best_before = max(state["curve"][:-PATIENCE], default=0.0)
            plateau = len(state["curve"]) > PATIENCE and max(state["curve"][-PATIENCE:]) < best_before + 0.005
            if state["falls_from"] is None and step >= settings.max_steps / 2 and plateau:
                state["falls_from"] = state["step"]
            part = folder / ".unfinished.part"
            torch.save((state, model.state_dict(), optimizer.state_dict(), dice.getstate()), part)
            part.rename(unfinished)
        if state["falls_from"] is None and state["step"] >= settings.max_steps - fall:
            state["falls_from"] = state["step"]
        if progress:
            accuracy = f", accuracy {state['curve'][-1]:.3f}" if state["curve"] else ""
            text = f"language model, loss {sum(losses[-50:]) / len(losses[-50:]):.3f}{accuracy}"
            progress.update(task, advance=1, description=text)
    model.eval()
    scores = {form: text_accuracy(model, test, form) for form in (*FORMS, "blind")}
    model.config.name_or_path = tokenizer.name_or_path = settings.name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results = {
        "name": f"{settings.name}: Qwen2, {settings.layers} layers, {settings.width} wide, trained on descriptions",
        "accuracy_by_form": scores,
        "accuracy_curve": {(i + 1) * CHECK_EVERY: round(value, 4) for i, value in enumerate(state["curve"])},
        "losses": [sum(losses[i : i + 50]) / len(losses[i : i + 50]) for i in range(0, len(losses), 50)],
        "seconds": round(time.time() - began, 1),
    }
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    unfinished.unlink(missing_ok=True)
    return results
