"""Train projector and controller of the demo model on one CPU thread, and measure the result on held-out pictures.

    apt-get download tuxpaint-stamps-default mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
    for package in *.deb; do dpkg -x $package pictures; done
    python examples/demo_model/train.py --stamps pictures/usr/share/tuxpaint/stamps \\
        --backgrounds pictures/usr/share/backgrounds

Stages, each kept in --work and skipped where its file is there: `features` (of the frozen tower), `controller`, `answers`
(the projector, through the frozen language model), `evaluation`. The adapter and its results are written to --out.
"""

import argparse
import json
import os
import random
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from rich.progress import track
from safetensors.torch import load_file, save_file
from scenes import (
    NUMBERS,
    REGIONS,
    VOCABULARY,
    SceneMaker,
    Thing,
    ask,
    find_backgrounds,
    find_stamps,
    split_backgrounds,
    split_stamps,
    with_article,
)
from timm.data import ImageNetInfo
from torch import nn

from granulon_hf.data.collator import encode_prompts
from granulon_hf.demo_model import SHIPPED, build_demo, load_classifier
from granulon_hf.modeling.aggregation_granulon import aggregate, grid_positions
from granulon_hf.training.controller import CORPUS, ControllerArguments, Question
from granulon_hf.training.controller import train_controller as fit_controller

LEVELS = ("coarse", "middle", "fine")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, required=True, help="folder of the Tux Paint stamps")
    parser.add_argument("--backgrounds", type=Path, required=True, help="folder of the wallpapers")
    parser.add_argument("--work", type=Path, default=Path("demo_work"), help="intermediate files")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where adapter.safetensors and results.json go")
    parser.add_argument("--scenes", type=int, default=3000, help="training scenes")
    parser.add_argument("--test-scenes", type=int, default=110, help="three questions about each")
    parser.add_argument("--steps", type=int, default=1300, help="steps of `answers`")
    parser.add_argument("--batch", type=int, default=10, help="images per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stages", nargs="+", default=["features", "controller", "answers", "evaluation"])
    return parser.parse_args()


def read_questions(split: str) -> list[dict]:
    """Of the corpus that ships; those with a topic are asked about the scenes."""
    rows = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def phrasings(split: str) -> dict[str, list[str]]:
    topics: dict[str, list[str]] = {}
    for row in read_questions(split):
        if "topic" in row:
            topics.setdefault(row["topic"], []).append(row.get("template", row["text"]))
    return topics


def scene_maker(args, split: str) -> SceneMaker:
    """Scenes of training pictures and phrasings, or of held-out stamps on held-out wallpapers."""
    held_out = split == "test"
    stamps = split_stamps(find_stamps(args.stamps))[held_out]
    return SceneMaker(stamps, split_backgrounds(find_backgrounds(args.backgrounds))[held_out], phrasings(split), seed=held_out)


def save(value, path: Path) -> None:
    """Write whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    if path.suffix == ".safetensors":
        save_file(value, unfinished)
    else:
        torch.save(value, unfinished)
    unfinished.chmod(0o644)  # safetensors leaves its files to their owner alone
    os.replace(unfinished, path)


@torch.no_grad()
def cache_features(args, model, processor) -> None:
    """Features of the frozen tower of every training scene, [scenes x 196 x 1280] in bfloat16, and the scenes."""
    maker = scene_maker(args, "train")
    tower = model.model.vision_tower.to(memory_format=torch.channels_last)
    features, scenes = torch.empty(args.scenes, 196, 1280, dtype=torch.bfloat16), []
    for start in track(range(0, args.scenes, 8), description="features"):
        images, batch = zip(*(maker(index) for index in range(start, min(start + 8, args.scenes))), strict=True)
        pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(tower.dtype).contiguous(memory_format=torch.channels_last)
        features[start : start + len(batch)] = tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        scenes += batch
    save({"features": features, "scenes": scenes}, args.work / "features.pt")


# The encoder's own ImageNet classes under the names that a child would use; all others keep their own.
BASIC_NAMES = (
    "0-1 fish, 2-4 shark, 5-6 ray, 7-8 chicken, 9-9 ostrich, 10-16 bird, 18-20 bird, 21-23 bird, 24-24 owl, "
    "25-29 salamander, 30-32 frog, 33-37 turtle, 38-48 lizard, 49-50 crocodile, 51-51 dinosaur, 52-68 snake, "
    "72-77 spider, 80-95 bird, 97-97 duck, 98-98 duck, 99-99 goose, 100-100 swan, 101-101 elephant, "
    "104-104 kangaroo, 113-116 snail, 118-121 crab, 122-124 lobster, 127-129 bird, 131-144 bird, 145-145 penguin, "
    "146-146 bird, 147-148 whale, 149-150 seal, 151-268 dog, 269-272 wolf, 273-275 dog, 277-280 fox, 281-285 cat, "
    "286-290 leopard, 294-297 bear, 300-307 insect, 308-308 insect, 309-318 insect, 319-326 insect, 330-332 rabbit, "
    "333-333 mouse, 335-335 squirrel, 336-337 beaver, 339-339 horse, 341-343 pig, 344-344 hippo, 345-347 cow, "
    "348-349 sheep, 350-350 goat, 351-353 antelope, 354-354 camel, 365-382 monkey, 385-386 elephant, 387-388 panda, "
    "389-391 fish, 392-397 fish, 402-402 guitar, 404-404 plane, 407-407 ambulance, 409-409 clock, 417-417 balloon, "
    "429-430 ball, 436-436 car, 440-440 bottle, 444-444 bicycle, 468-468 car, 472-472 boat, 486-486 violin, "
    "504-504 cup, 505-505 teapot, 511-511 car, 513-513 trumpet, 515-515 hat, 541-541 drum, 546-546 guitar, "
    "554-554 boat, 555-555 truck, 569-569 truck, 574-574 ball, 579-579 piano, 609-609 car, 610-610 shirt, "
    "617-617 jacket, 620-620 laptop, 625-625 boat, 627-627 car, 654-654 bus, 656-656 car, 657-657 rocket, "
    "658-658 glove, 671-671 bicycle, 675-675 truck, 717-717 truck, 722-722 ball, 725-725 pitcher, 751-751 car, "
    "768-768 ball, 779-779 bus, 780-780 boat, 805-805 ball, 806-806 sock, 808-808 hat, 812-812 rocket, 814-814 boat, "
    "817-817 car, 834-834 suit, 847-847 tank, 849-849 teapot, 852-852 ball, 864-864 truck, 867-867 truck, "
    "874-874 bus, 876-876 bathtub, 889-889 violin, 890-890 ball, 892-892 clock, 895-895 plane, 898-898 bottle, "
    "907-907 bottle, 914-914 boat, 919-919 sign, 928-928 ice cream, 936-936 lettuce, 945-945 pepper, "
    "947-947 mushroom, 948-948 apple, 967-967 cup of coffee, 968-968 cup, 970-970 mountain, 972-972 mountain, 975-975 lake, "
    "977-978 beach, 980-980 volcano, 984-986 flower, 987-987 corn, 991-997 mushroom"
)


def class_names() -> list[str]:
    """A name for each of the 1,000 ImageNet classes."""
    info = ImageNetInfo()
    # Of a compound the last word says what it is: a soup bowl is a bowl.
    names = [re.split("[ -]", info.index_to_description(index).split(",")[0])[-1] for index in range(1000)]
    for entry in BASIC_NAMES.split(", "):
        span, name = entry.split(" ", 1)
        first, last = map(int, span.split("-"))
        names[first : last + 1] = [name] * (last + 1 - first)
    return names


def unit_names(units: int) -> list[str]:
    """The names of the projector's hidden units: those that stand for most classes come first."""
    names = class_names()
    return sorted(dict.fromkeys(names), key=lambda name: -names.count(name))[:units]


def covered_cells(scene) -> torch.Tensor:
    """Which thing covers each of the 14 x 14 cells: its index, -1 for none, -2 where a border runs through. Shape [196]."""
    centre = torch.arange(14) * 32 + 16
    cells = torch.full((14, 14), -1)
    for index, thing in enumerate(scene.things):
        left, top, right, bottom = thing.box
        for margin, value in ((12, -2), (-0.12 * min(right - left, bottom - top), index)):
            rows = (centre > top - margin) & (centre < bottom + margin)
            columns = (centre > left - margin) & (centre < right + margin)
            cells[rows.unsqueeze(1) & columns] = value
    return cells.flatten()


class Head:
    """Says what the tower's own ImageNet head sees in features, by names: [N x D] to [N x names], above 0 where it sees one.

    A name is seen where its classes' mean logit is four standard deviations above what it is on average, counted in standard
    deviations: some classes' logits are large everywhere in pictures of this size, and a language model of this size reads
    one word, not the sum of ten. It is seen at most as well as at eight, so that no name drowns the others: photographs reach
    what no stamp does. This is what `linear_1` of the projector computes with ReLU6, and it is not trained: what the head
    sees stays what it is.

    Args:
        features (`torch.Tensor`): any features, for mean and deviation, shape [N x D].
        units (`int`): hidden units of the projector.
    """

    def __init__(self, features: torch.Tensor, units: int):
        weight, names = load_classifier().classifier.weight.detach(), class_names()
        self.names = unit_names(units)
        of_name = torch.tensor([[float(name == other) for other in names] for name in self.names])
        weight = of_name / of_name.sum(1, keepdim=True) @ (weight - weight.mean(0))
        logits = features @ weight.T
        self.weight = 1.5 * weight / logits.std(0).unsqueeze(1)
        self.bias = -1.5 * (logits.mean(0) / logits.std(0) + 4)
        kind_of = {name: kind for kind, names in VOCABULARY.items() for name in names}
        # Classes 0 to 397 are animals and 924 to 965 are food; the kind of most other things is not known here.
        others = {names[index]: "animal" if index < 398 else "food" for index in (*range(398), *range(924, 966))}
        self.kinds = [kind_of.get(name) or others.get(name) for name in self.names]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return F.relu6(F.linear(features, self.weight, self.bias))


class SaidThroughMap(nn.Module):
    """`linear_2` as one map of all names' words: what is learned of reading one name holds for every other."""

    def __init__(self, said: torch.Tensor):
        super().__init__()
        self.register_buffer("said", said)

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        return map @ self.said

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.eye(weight.shape[0])


@torch.no_grad()
def say_words(projector, head: Head, table: torch.Tensor, tokenizer) -> None:
    """Let each hidden unit say the word of its name from the start, and the projector take what the head saw, not features.

    A word is the mean of its tokens' input embeddings, which are the rows of `table`.
    """
    size = table.norm(dim=1).mean()
    tokens = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in head.names]
    said = torch.stack([F.normalize(table[ids].mean(0), dim=0) for ids in tokens], dim=1) * size
    parametrize.register_parametrization(projector.linear_2, "weight", SaidThroughMap(said))
    # Where nothing is seen a token still has a size, so that it is not blown up by the language model's norms.
    projector.linear_2.bias.copy_(F.normalize(table.mean(0), dim=0) * size)
    projector.linear_1 = projector.act = nn.Identity()


class Packer:
    """Packs all questions of an image behind one copy of its tokens, each question blind to the others.

    One sequence is [chat prefix ; pixel tokens ; semantic tokens of each level ; questions with their answers]. A question
    of level g sees the prefix, the pixel tokens, the semantic tokens of g and itself, at the positions that `generate`
    would give them.
    """

    def __init__(self, model, processor):
        self.config, self.tokenizer = model.config, processor.tokenizer
        content = [{"type": "image"}, {"type": "text", "text": "QUESTION"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        self.places = grid_positions(14, 14, torch.device("cpu"))
        before, after = prompt.split(processor.image_token)
        self.prefix = self.ids(before)
        self.lead, self.tail = after.split("QUESTION")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def semantic_tokens(self, features: torch.Tensor, budget: int | None) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """The filled semantic slots of each image's levels, or of the one budget: tokens [M x D] and their places [M x 2]."""
        config, images = self.config, features.shape[0]
        levels = config.granularity_levels if budget is None else [{"alpha": 1, "beta": budget}]
        alpha, beta = (torch.tensor([level[key] for level in levels] * images) for key in ("alpha", "beta"))
        result = aggregate(
            features.repeat_interleave(len(levels), dim=0),
            (14, 14),
            alpha,
            beta,
            num_slots=int(beta.max()),
            max_clusters=int(beta.max()),
            relation_weight=config.relation_weight,
            clustering=config.clustering,
            steps=config.clustering_steps,
            filter_weights=config.filter_weights,
        )
        filled = [
            (tokens[keep], places[keep])
            for tokens, places, keep in zip(result.tokens, result.positions, result.keep, strict=True)
        ]
        return [filled[start : start + len(levels)] for start in range(0, len(filled), len(levels))]

    def __call__(self, features, semantic, questions, full: bool) -> dict[str, torch.Tensor]:
        """One image's sequence.

        Args:
            features (`torch.Tensor`): shape [196 x D].
            semantic (`list[tuple]`): tokens and places of each level, or one pair that all questions see.
            questions (`list[Question]`): to pack.
            full (`bool`): with the pixel tokens, which the compact form leaves out.
        """
        pixels = features.shape[0] if full else 0
        start = len(self.prefix) + pixels
        # token id (-1: visual), position, level (0: seen by all), question (0: none), label
        rows = [(token, position, 0, 0, -100) for position, token in enumerate(self.prefix)]
        rows += [(-1, len(self.prefix) + pixel, 0, 0, -100) for pixel in range(pixels)]
        for level, (tokens, _) in enumerate(semantic, 1):
            rows += [(-1, start + slot, level, 0, -100) for slot in range(len(tokens))]
        for number, question in enumerate(questions, 1):
            level = min(LEVELS.index(question.level) + 1, len(semantic))
            asked = self.ids(self.lead + question.text + self.tail)
            answer = self.ids(question.answer + self.tokenizer.eos_token)
            labels = [-100] * (len(asked) - 1) + answer + [-100]
            first = start + len(semantic[level - 1][0])
            rows += [
                (token, first + offset, level, number, label)
                for offset, (token, label) in enumerate(zip(asked + answer, labels, strict=True))
            ]
        visual, places = zip(*([(features, self.places)] if full else []), *semantic, strict=True)
        return {"rows": torch.tensor(rows), "visual": torch.cat(visual), "places": torch.cat(places)}


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Right-padded batch with an additive block attention mask [B x 1 x L x L]."""
    length = max(len(example["rows"]) for example in examples)
    padding = torch.tensor([[0, 0, 0, -1, -100]])
    rows = torch.stack([torch.cat([e["rows"], padding.expand(length - len(e["rows"]), -1)]) for e in examples])
    ids, positions, level, question, labels = rows.unbind(-1)
    same_level = (level.unsqueeze(1) == 0) | (level.unsqueeze(1) == level.unsqueeze(2))
    same_question = (question.unsqueeze(1) == 0) | (question.unsqueeze(1) == question.unsqueeze(2))
    seen = same_level & same_question & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min).unsqueeze(1)
    visual, places = (torch.cat([example[name] for example in examples]) for name in ("visual", "places"))
    return {"ids": ids, "positions": positions, "labels": labels, "mask": mask.bfloat16(), "visual": visual, "places": places}


def answer_loss(model, projector, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean next-token loss over the answers, and whether each token was the likeliest."""
    visual = batch["ids"] < 0
    embeds = model.get_input_embeddings()(batch["ids"].clamp(min=0))
    embeds = embeds.masked_scatter(visual.unsqueeze(-1), projector(batch["visual"].float(), batch["places"]).to(embeds))
    states = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    told = batch["labels"] >= 0
    logits, labels = model.lm_head(states[told]).float(), batch["labels"][told]
    return F.cross_entropy(logits, labels), logits.argmax(-1) == labels


def name_things(scene, seen: torch.Tensor, cells: torch.Tensor, head: Head) -> list[tuple[Thing, int]]:
    """The things of a scene under the names that the head has for them; none if it is not sure of one, or sees two alike.

    A frozen tower's features do not hold what it does not see: to learn other names than its own would be to learn to guess.
    """
    found = []
    for index, thing in enumerate(scene.things):
        sums = seen[cells == index].sum(0)
        (first, second), (unit, _) = sums.topk(2)
        sure = first > 1.25 * second and (len(scene.things) > 1 or unit == seen.sum(0).argmax())
        if not sure or unit in [other for _, other in found]:
            return []
        found.append((thing, int(unit)))
    return found


def train_answers(args, data, model, processor) -> dict:
    """The projector learns, through the frozen language model, what makes it answer right."""
    packer, rng, templates = Packer(model, processor), random.Random(1), phrasings("train")
    projector = model.model.multi_modal_projector.float().requires_grad_(True)
    head = Head(data["features"][::30].flatten(0, 1)[::2].float(), len(projector.linear_2.bias))
    say_words(projector, head, model.get_input_embeddings().weight.float(), processor.tokenizer)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98))
    checkpoint, first, log = args.work / "answers.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint)
        projector.load_state_dict(state["projector"])
        optimizer.load_state_dict(state["optimizer"])
        first, log = state["step"], state["log"]
    model.model.language_model.set_attn_implementation("eager")  # SDPA is slower with such a mask on a CPU
    cells = [covered_cells(scene) for scene in data["scenes"]]
    found = [
        name_things(scene, head(features.float()), cell, head)
        for scene, features, cell in zip(data["scenes"], data["features"], cells, strict=True)
    ]
    known = [index for index, things in enumerate(found) if things]
    one_token = torch.tensor([len(packer.ids(f" {name}")) == 1 for name in head.names]).nonzero().squeeze(1)
    print(f"the head is sure of {len(known)} of {len(found)} scenes", flush=True)
    started = time.time()
    for step in range(first, args.steps):
        rng.seed(step)
        torch.manual_seed(step)
        done = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20, max(0.05, (1 - done) / 0.3))
        chosen = rng.sample(known, args.batch)
        features = data["features"][chosen]
        # At last every third step has the pixel tokens too; the others are several times cheaper.
        full = done > 0.7 and step % 3 == 0
        semantic = packer.semantic_tokens(features, None if full else rng.choice((16, 24, 32)))
        examples = []
        for index, one, levels in zip(chosen, features, semantic, strict=True):
            # Names change places in most pictures: so few scenes teach to read all of them, and none is a good guess. Those of
            # several tokens stay where they are: a mean of tokens is hard to read, and most of them are rarely seen.
            order = torch.arange(len(head.names))
            if rng.random() < 0.7:
                order[one_token] = one_token[torch.randperm(len(one_token))]
            seen, levels = head(one.float())[:, order], [(head(tokens.float())[:, order], places) for tokens, places in levels]
            units = order.argsort()[[unit for _, unit in found[index]]].tolist()  # unit i now shows what `order[i]` did
            if not full and levels[0][0].sum(0)[units].min() < 0.5:
                continue  # what the clusters do not show cannot be read from them
            things = [
                replace(thing, name=head.names[unit], kind=head.kinds[unit])
                for (thing, _), unit in zip(found[index], units, strict=True)
            ]
            absent = seen.sum(0).argsort()[: len(head.names) // 2].tolist()
            names, *others = ask(things, templates, rng, [head.names[unit] for unit in rng.sample(absent, 9)])
            examples.append(packer(seen, levels, [names, *rng.sample(others, min(2, len(others)))], full))
        loss, right = answer_loss(model, projector, collate(examples))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        log.append([loss.item(), right.float().mean().item(), len(examples)])
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            recent = torch.tensor(log[-20:]).mean(0).tolist()
            pace = (time.time() - started) / (step + 1 - first)
            print(
                f"answers {step + 1}/{args.steps} loss {recent[0]:.3f} tokens right {recent[1]:.3f} {pace:.2f} s/step",
                flush=True,
            )
            state = {"projector": projector.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "log": log}
            save(state, checkpoint)
            write_adapter(args, model, head)
    means = torch.tensor([entry[:2] for entry in log]).split(50)
    return {
        "steps": len(log),
        "images": sum(count for *_, count in log),
        "scenes": len(known),
        "loss_and_tokens_right_of_50_steps": [[round(value, 3) for value in mean.mean(0).tolist()] for mean in means],
    }


def draw_curve(answers: dict, path: Path) -> None:
    """Loss and share of tokens right over the steps of `answers`, each a mean of 50."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    curves = zip(*answers["loss_and_tokens_right_of_50_steps"], strict=True)
    for axis, curve, label in zip(axes, curves, ("loss of a token", "tokens that are likeliest"), strict=True):
        axis.plot([50 * (index + 1) for index in range(len(curve))], curve)
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def write_adapter(args, model, head: Head) -> None:
    """Projector and controller, in bfloat16."""
    projector = model.model.multi_modal_projector
    state = {
        "multi_modal_projector.linear_1.weight": head.weight,
        "multi_modal_projector.linear_1.bias": head.bias,
        "multi_modal_projector.linear_2.weight": projector.linear_2.weight,
        "multi_modal_projector.linear_2.bias": projector.linear_2.bias,
        "multi_modal_projector.position": projector.position,
    } | {f"controller.{name}": value for name, value in model.model.controller.state_dict().items()}
    state = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in state.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    save(state, args.out / "adapter.safetensors")


def filled(row: dict, rng: random.Random) -> str:
    """A phrasing with its slots filled."""
    kind = rng.choice(list(VOCABULARY))
    return row.get("template", row["text"]).format(
        kind=with_article(kind), name=rng.choice(list(VOCABULARY[kind])), region=rng.choice([r for row in REGIONS for r in row])
    )


def train_controller(args, model, processor) -> dict:
    """Soft-label cross-entropy on the corpus, the scenes' questions with many fillings; accuracy on held-out phrasings."""
    rng, questions = random.Random(3), []
    for split, copies in (("train", 6), ("test", 4)):
        rows = [row for row in read_questions(split) for _ in range(copies if "template" in row else 1)]
        questions += [Question(filled(row, rng), row["weights"], split == "test") for row in rows]
    torch.manual_seed(2)
    result = fit_controller(model, processor, questions, ControllerArguments(seed=2))
    print("controller", {name: result[name] for name in ("n_train", "n_test", "accuracy", "ece", "confusion", "wrong")})
    save({n: v.contiguous() for n, v in model.model.controller.state_dict().items()}, args.work / "controller.safetensors")
    return result


def nouns(answer: str) -> list[str]:
    """`"A frog and an apple."` to `["apple", "frog"]`: what is compared."""
    words = answer.lower().strip().rstrip(".").replace(", and ", ", ").replace(" and ", ", ").split(", ")
    return sorted(word.removeprefix("a ").removeprefix("an ").removeprefix("the ").strip() for word in words)


def exact(said: str, row: dict) -> float:
    return float(nouns(said) == nouns(row["truth"]))


def lenient(said: str, row: dict) -> float:
    """Right in substance: "Yes, there is one." for "Yes.", "The cat is on the left." for "On the left."."""

    def gist(text: str):
        words = re.findall(r"[a-z]+", text.lower())
        if row["topic"] == "is_there":
            return words[:1]
        if row["topic"] == "count":
            return next((word for word in words if word.capitalize() in NUMBERS), None)
        regions = [region for line in REGIONS for region in line if f" {region} " in f" {' '.join(words)} "]
        return max(regions, key=len, default=None)

    if row["topic"] in ("is_there", "count", "where"):
        return float(gist(said) == gist(row["truth"]))
    text, true = " ".join(re.findall(r"[a-z]+", said.lower())), nouns(row["truth"])
    return float(len(nouns(said)) == len(true) and all(f" {noun} " in f" {text} " for noun in true))


def f1(said: str, row: dict) -> float:
    """F1 of the nouns said."""
    told, true = set(nouns(said)), nouns(row["truth"])
    return 2 * sum(noun in true for noun in told) / (len(told) + len(true))


# What fills the slot of a topic's phrasings: all that a blind guesser can go by.
SLOT = {
    "kind": "",
    "is_there": "{kind}",
    "names": "",
    "count": "",
    "where": "{name}",
    "what_at": "{region}",
    "right_of": "{name}",
    "left_of": "{name}",
}


def blind_answers(scenes) -> dict:
    """The most frequent training answer by level, by topic, and by topic with the words that fill its slot."""
    rng, counts = random.Random(5), {}
    for scene in scenes:
        for question in ask(scene.things, {topic: [slot] for topic, slot in SLOT.items()}, rng):
            for key in (question.level, question.topic, (question.topic, question.text)):
                counts.setdefault(key, Counter())[question.answer] += 1
    return {key: answers.most_common(1)[0][0] for key, answers in counts.items()}


def interval(scores: list[list[float]]) -> dict:
    """Mean with a 95 % interval from 2,000 resamples of scenes."""
    rng = random.Random(0)
    sums = [(sum(one), len(one)) for one in scores if one]
    means = []
    for _ in range(2000):
        sample = rng.choices(sums, k=len(sums))
        means.append(sum(s for s, _ in sample) / sum(n for _, n in sample))
    means.sort()
    mean = sum(s for s, _ in sums) / sum(n for _, n in sums)
    return {"n": sum(n for _, n in sums), "mean": round(mean, 3), "ci95": [round(means[50], 3), round(means[1949], 3)]}


@torch.no_grad()
def answer(model, processor, images: list, texts: list[str]) -> tuple[list[str], list[str]]:
    """Greedy answers, and the levels that the controller chose."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for image, text in zip(images, texts, strict=True)
    ]
    inputs = encode_prompts(processor, chats)
    probs = model.get_granularity_probs(inputs["input_ids"], question_mask=inputs["question_mask"])
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(output, skip_special_tokens=True), [LEVELS[level] for level in probs.argmax(-1)]


def evaluate(args, scenes, split: str) -> dict:
    """Answers about held-out stamps on held-out wallpapers, one question of each level about each scene.

    `split` says whether the phrasings are those of training. `model` lets its controller choose the level, `majority` gives
    the most frequent training answer of the level, and `blind` that of the question's topic and slot words.
    """
    model, processor = build_demo(args.out)
    maker, blind, templates = scene_maker(args, "test"), blind_answers(scenes), phrasings(split)
    count = args.test_scenes if split == "train" else args.test_scenes // 2
    rows = []
    for start in track(range(0, count, 4), description=f"evaluation, phrasings of {split}"):
        images, batch = [], []
        for index in range(start, min(start + 4, count)):
            image, scene = maker(index)
            asked = ask(scene.things, templates, random.Random(index))
            slots = ask(scene.things, {topic: [slot] for topic, slot in SLOT.items()}, random.Random(index))
            for level in LEVELS:
                of_level = [number for number, one in enumerate(asked) if one.level == level]
                number = random.Random(f"{level}{index}").choice(of_level)
                one = asked[number]
                row = {"scene": index, "level": level, "topic": one.topic, "question": one.text, "truth": one.answer}
                row["blind"] = blind.get((one.topic, slots[number].text), blind[one.topic])
                row["majority"] = blind[level]
                images.append(image)
                batch.append(row)
        answers, levels = answer(model, processor, images, [row["question"] for row in batch])
        for row, said, level in zip(batch, answers, levels, strict=True):
            rows.append(row | {"model": said, "chosen_level": level})
    save_json(rows, args.work / f"answers_{split}.json")
    return summarise(rows)


def summarise(rows: list[dict]) -> dict:
    """Mean scores with intervals: of all rows, by level, by topic, and of `names` where the scene holds one thing only."""
    groups = {"all": rows}
    for row in rows:
        groups.setdefault(row["level"], []).append(row)
        groups.setdefault(row["topic"], []).append(row)
        if row["topic"] == "names" and len(nouns(row["truth"])) == 1:
            groups.setdefault("names, one thing", []).append(row)
    result: dict = {"level_chosen": interval([[float(row["level"] == row["chosen_level"])] for row in rows])}
    for group, of_group in groups.items():
        result[group] = {}
        for arm in ("model", "blind", "majority"):
            for measure, score in (("exact", exact), ("lenient", lenient), ("f1", f1)):
                by_scene: dict = {}
                for row in of_group:
                    by_scene.setdefault(row["scene"], []).append(score(row[arm], row))
                result[group][f"{arm}_{measure}"] = interval(list(by_scene.values()))
    return result


def save_json(value, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, processor = build_demo(adapter=None)
    model.requires_grad_(False)
    if "features" in args.stages and not (args.work / "features.pt").exists():
        cache_features(args, model, processor)
    data = torch.load(args.work / "features.pt", weights_only=False, mmap=True)
    results_path = args.work / "results.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else {}
    if "controller" in args.stages and not (args.work / "controller.safetensors").exists():
        results["controller"] = train_controller(args, model, processor)
        save_json(results, results_path)
    if (args.work / "controller.safetensors").exists():
        model.model.controller.load_state_dict(load_file(args.work / "controller.safetensors"))
    if "answers" in args.stages:
        results["answers"] = train_answers(args, data, model, processor)
        save_json(results, results_path)
        draw_curve(results["answers"], args.work / "curve.png")
    if "evaluation" in args.stages:
        for split in ("train", "test"):
            results[f"evaluation_phrasings_{split}"] = evaluate(args, data["scenes"], split)
            save_json(results, results_path)
            save_json(results, args.out / "results.json")


if __name__ == "__main__":
    main()
