"""The arms as a table, and the model classes of those that Granulon has no setting for.

An arm says what the language model is shown: `pixels` (the 196 pixel tokens or not), and `tokens` more that a `maker` makes.
Everything else is the same for all arms.
"""

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPImageProcessor

from granulon_hf.errors import GranulonError
from granulon_hf.modeling.aggregation_granulon import GranulonAggregation
from granulon_hf.modeling.configuration_granulon import DEFAULT_GRANULARITY_LEVELS, GranulonConfig
from granulon_hf.modeling.modeling_granulon import (
    GranulonForConditionalGeneration,
    GranulonImageFeatures,
    GranulonModel,
)
from granulon_hf.modeling.processing_granulon import GranulonProcessor, find_image_token
from granulon_hf.modeling.reducers_granulon import REDUCERS, PatchFeatures
from granulon_hf.training.stages import set_stage

LEVELS = [dict(level) for level in DEFAULT_GRANULARITY_LEVELS]  # coarse (4, 5), middle (2, 10), fine (1, 20)
GRIDS = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8)}
COMPACT = (4, 9, 16, 25, 36, 64)  # squares, which every reducer fills
BUDGETS = (4, 9, 16, 25, 64)  # of a nested arm: one projector for all of them
PRICES = (0.001, 0.004, 0.016)  # of a visual token, in nats of the answer's loss
PRICED = ("adata",)  # reducers whose nested arm also chooses its budget by measured loss
FORMS = ("first", "own-projector")  # semantic slots in front; a projector of their own
PLACES = {"place": "semantic", "places": "all"}  # `slot_position`: semantic slots are told where they are, or all slots
CHANNELS = 128  # of queries and keys of the resampler


def level(name: str, alpha: int, beta: int) -> dict[str, Any]:
    return {"name": name, "alpha": alpha, "beta": beta, "gamma": 1.0}


def arm(pixels: bool, maker: str = "none", policy: str = "none", levels=(), clustering: str = "joint") -> dict[str, Any]:
    tokens = max((one["beta"] for one in levels), default=0)
    return {
        "tokens": tokens,
        "pixels": pixels,
        "maker": maker,
        "policy": policy,
        "clustering": clustering,
        "levels": [dict(one) for one in levels],
    }


def make_arms() -> dict[str, tuple[str, dict[str, Any]]]:
    """Group ("main" or "budget") and description of every arm, by name."""
    main: dict[str, dict[str, Any]] = {"pixel": arm(True)}
    fixed = {one["beta"]: one for one in LEVELS} | {50: level("finest", 1, 50)}
    for stream, pixels in (("pixel", True), ("semantic", False)):
        for beta, one in fixed.items():
            main[f"{stream}+fixed{beta}"] = arm(pixels, "clusters", "fixed", [one])
        for policy in ("adaptive", "random", "oracle"):
            main[f"{stream}+{policy}"] = arm(pixels, "clusters", policy, LEVELS)
    main["pixel+adaptive+relation"] = arm(True, "clusters", "adaptive", LEVELS, "relation")
    main["semantic+adaptive+relation"] = arm(False, "clusters", "adaptive", LEVELS, "relation")
    for beta in (5, 10):  # as few clusters, of unpooled patches
        main[f"semantic+fixed{beta}+alpha1"] = arm(False, "clusters", "fixed", [level("unpooled", 1, beta)])
    for gamma in (0.3, 3.0):
        main[f"pixel+adaptive+gamma{gamma:g}"] = arm(True, "clusters", "adaptive", [{**one, "gamma": gamma} for one in LEVELS])
    for form in (*FORMS, *PLACES):  # one change each to the paper's form; the others have no such entry
        main[f"pixel+adaptive+{form}"] = arm(True, "clusters", "adaptive", LEVELS) | {"form": form}
    for name in ("semantic+adaptive", f"semantic+fixed{LEVELS[-1]['beta']}"):
        main[f"{name}+place"] = main[name] | {"form": "place"}
    main["pixel+places"] = main["pixel"] | {"form": "places"}
    unpooled = [{**one, "alpha": 1} for one in LEVELS]
    main["semantic+adaptive+alpha1"] = arm(False, "clusters", "adaptive", unpooled)
    for maker in ("dummy", "resampler"):
        main[f"pixel+{maker}"] = arm(True, maker, "fixed", [level("all", 1, LEVELS[-1]["beta"])])
    budget = {
        f"{name}{count}": arm(False, maker, "fixed", [level("all", 1, count)])
        for name, maker in (
            ("pool", "pool"),
            ("kmeans", "clusters"),
            ("resampler", "resampler"),
            ("text-resampler", "text_resampler"),
        )
        for count in GRIDS
    }
    # The compact form with the package's own reducers, told where their tokens are. AdaTA's clusters, and what the tower sees
    # in smaller images, are kept in the store.
    for reducer in REDUCERS:
        maker = "clusters" if reducer in ("adata", "downsample") else "reducer"
        own = {"reducer": reducer, "form": "place"}
        for count in COMPACT:
            budget[f"{reducer}{count}+place"] = arm(False, maker, "fixed", [level("all", 1, count)]) | own
        nested = f"{reducer}+nested+place"
        budget[nested] = arm(False, maker, "nested", [level(str(count), 1, count) for count in BUDGETS]) | own
        for count in BUDGETS:
            view = arm(False, maker, "fixed", [level(str(count), 1, count)]) | own
            budget[f"{reducer}{count}+nested+place"] = view | {"view": nested}
        for price in PRICES if reducer in PRICED else ():
            budget[f"{reducer}+price{price:g}+place"] = budget[nested] | {"policy": "priced", "price": price, "view": nested}
    return {name: (group, one) for group, arms in (("main", main), ("budget", budget)) for name, one in arms.items()}


ARMS = make_arms()


def views_of(name: str) -> list[str]:
    """What a nested arm is tested as: at each of its budgets, and at those that a controller chooses at each price."""
    return [view for view, (_, one) in ARMS.items() if one.get("view") == name]


def reads_question(arm: dict[str, Any]) -> bool:
    """Whether a question makes the image's tokens, so that they can serve that question alone."""
    return arm["maker"] == "text_resampler" or (arm["maker"] == "reducer" and "question" in REDUCERS[arm["reducer"]].needs)


def store_name(arm: dict[str, Any], level: dict[str, Any]) -> str:
    """What the store keeps an arm's tokens of a level under."""
    how = "downsample" if arm.get("reducer") == "downsample" else arm["clustering"]
    return AggregateStore.name(level["alpha"], level["beta"], how)


# --- clusters that are known -------------------------------------------------------------------------------------------


def some_of(features: torch.Tensor) -> torch.Tensor:
    """Return as much of features [... x N x D] as tells images apart."""
    return features[..., ::5, ::7]


class AggregateStore:
    """Semantic tokens of images by their features and the level: clustering has no learned part, so that once is enough.

    Args:
        folder (`Path`): holds `keys.txt`, one line for each image, and for each level a file of tokens, with the mean cell of
            each behind it [images x beta x (D + 2)] in bfloat16.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        keys = folder / "keys.txt"
        self.rows = {key: row for row, key in enumerate(keys.read_text().split())} if keys.exists() else {}
        self.files: dict[str, np.memmap] = {}
        self.known: dict[tuple[str, str], torch.Tensor] = {}

    @staticmethod
    def key(features: torch.Tensor) -> str:
        """Of one image's features [N x D] in bfloat16: the hash of some of them."""
        some = some_of(features).to(torch.bfloat16).contiguous().view(torch.int16)
        return hashlib.sha256(some.numpy().tobytes()).hexdigest()[:24]

    @staticmethod
    def name(alpha: int, beta: int, clustering: str) -> str:
        return f"{clustering}-{alpha}-{beta}"

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def tokens(self, key: str, name: str) -> torch.Tensor | None:
        """Tokens and mean cells [M x (D + 2)] of an image, best first; `None` where they are not known."""
        if (key, name) in self.known:
            return self.known[key, name]
        if key not in self.rows or not self.path(name).exists():
            return None
        if name not in self.files:
            beta, size = int(name.split("-")[2]), self.path(name).stat().st_size
            width = size // (2 * beta * len(self.rows))
            self.files[name] = np.memmap(self.path(name), np.int16, "r", shape=(len(self.rows), beta, width))
        return torch.from_numpy(np.array(self.files[name][self.rows[key]])).view(torch.bfloat16)

    def remember(self, key: str, name: str, tokens: torch.Tensor) -> None:
        self.known[key, name] = tokens

    def mean(self, keys: Sequence[str], name: str) -> torch.Tensor:
        """Mean tokens and cells [M x (D + 2)] of images that are known."""
        return torch.stack([self.tokens(key, name).float() for key in keys]).mean(0).to(torch.bfloat16)


def with_positions(found: GranulonAggregation) -> torch.Tensor:
    """What the store keeps of images [I x K x (D + 2)]."""
    return torch.cat([found.tokens, found.positions.to(found.tokens)], dim=2)


# --- models ------------------------------------------------------------------------------------------------------------


class Resampler(nn.Module):
    """Learned queries and one cross-attention over the patch tokens; keys know their place on the grid.

    With `text_width` the queries are moved by the mean state of the question.
    """

    def __init__(self, tokens: int, width: int, patches: int, text_width: int | None = None):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, CHANNELS))
        self.positions = nn.Parameter(torch.randn(patches, CHANNELS) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, CHANNELS, bias=False)
        self.text = nn.Linear(text_width, tokens * CHANNELS) if text_width else None

    def forward(self, features: torch.Tensor, question: torch.Tensor | None = None) -> torch.Tensor:
        """Features [I x N x D], mean question states [I x E]; tokens [I x K x D]."""
        features = features.float()
        keys = self.key(self.norm(features)) + self.positions
        queries = self.queries.expand(len(features), -1, -1)
        if self.text is not None:
            queries = queries + self.text(question.float()).view(queries.shape)
        return (queries @ keys.transpose(1, 2) / math.sqrt(CHANNELS)).softmax(-1) @ features


class Dummy(nn.Module):
    """Learned tokens that see nothing: as many as the clusters, through the same projector."""

    def __init__(self, tokens: int, width: int, scale: float = 1.0):
        super().__init__()
        self.tokens = nn.Parameter(scale * torch.randn(tokens, width))

    def forward(self, features: torch.Tensor, question: torch.Tensor | None = None) -> torch.Tensor:
        return self.tokens.expand(len(features), -1, -1)


class Pool(nn.Module):
    """Average pooling to a grid of as many cells."""

    def __init__(self, tokens: int):
        super().__init__()
        self.grid = GRIDS[tokens]

    def forward(self, features: torch.Tensor, question: torch.Tensor | None = None) -> torch.Tensor:
        side = math.isqrt(features.shape[1])
        grid = features.float().transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(grid, self.grid).flatten(2).transpose(1, 2)


class ArmModel(GranulonModel):
    """Granulon with the token makers and slots of an arm; for `maker="clusters"` with pixels it is Granulon itself."""

    arm: dict[str, Any]
    store: AggregateStore | None
    maker: nn.Module | None
    semantic_projector: nn.Module | None
    question: torch.Tensor | None

    def attach(self, arm: dict[str, Any], store: AggregateStore | None, width: int, patches: int) -> None:
        """Make what the arm needs besides the model's own parts."""
        self.arm, self.store, self.question = arm, store, None
        kind, count, text = arm["maker"], arm["tokens"], self.config.text_config.hidden_size
        makers = {
            "dummy": lambda: Dummy(count, width),
            "pool": lambda: Pool(count),
            "resampler": lambda: Resampler(count, width, patches),
            "text_resampler": lambda: Resampler(count, width, patches, text),
        }
        self.maker = makers[kind]() if kind in makers else None
        own = arm.get("form") == "own-projector"
        self.semantic_projector = copy.deepcopy(self.multi_modal_projector) if own else None

    def _aggregate(self, patches, level, *args, **kwargs) -> GranulonAggregation:
        features = patches.features
        if self.maker is not None:
            tokens = self.maker(features, self.question)
            kept = torch.arange(tokens.shape[1], device=features.device).expand(len(tokens), -1)
            return GranulonAggregation(tokens=tokens, kept_clusters=kept, level=level)
        if self.store is None:
            return self._aggregate_once(patches, level, *args, **kwargs)
        slots = self.config.num_semantic_tokens
        rows, chosen = [], level.tolist()
        for one, index in zip(features, chosen, strict=True):
            value = self.config.granularity_levels[index]
            key, name = self.store.key(one), store_name(self.arm, value)
            tokens = self.store.tokens(key, name)
            if tokens is None:
                if self.arm.get("reducer") == "downsample":
                    raise GranulonError(f"The store has no tokens {name} of an image, and its features do not tell them.")
                found = super()._aggregate(PatchFeatures(one.unsqueeze(0), patches.grid), torch.tensor([index]))
                tokens = with_positions(found)[0, found.keep[0]].detach()
                self.store.remember(key, name, tokens)
            rows.append(tokens[:slots])
        counts = torch.tensor([len(row) for row in rows])
        tokens = torch.stack([F.pad(row, (0, 0, 0, slots - len(row))) for row in rows]).to(features)
        slot = torch.arange(slots)
        kept = torch.where(slot < counts.unsqueeze(1), slot, -1)
        tokens, positions = tokens.split([tokens.shape[2] - 2, 2], dim=2)
        return GranulonAggregation(tokens=tokens, kept_clusters=kept, positions=positions.float(), level=level)

    def _aggregate_once(self, patches, level, *args, **kwargs) -> GranulonAggregation:
        """Aggregate each image once whose questions follow each other, or every row where tokens are drawn anew, as in
        training, or chosen for the question."""
        features, first = patches.features, torch.ones_like(level, dtype=torch.bool)
        if not self.training and not reads_question(self.arm):
            some = some_of(features)
            first[1:] = (some[1:] != some[:-1]).flatten(1).any(1) | (level[1:] != level[:-1])
        found = super()._aggregate(replace(patches, features=features[first]), level[first], *args, **kwargs)
        return GranulonAggregation(**{name: value[first.cumsum(0) - 1] for name, value in found.items()})

    def get_image_features(self, pixel_values, granularity=None, return_dict=True, **kwargs) -> GranulonImageFeatures:
        if self.config.compact or (self.arm["pixels"] and self.arm.get("form") not in FORMS):
            return super().get_image_features(pixel_values, granularity, return_dict=return_dict, **kwargs)
        patches, outputs = self._patch_features(pixel_values)
        found = self._aggregate(patches, *self._image_choices(granularity, None, pixel_values))
        slots = (self.semantic_projector or self.multi_modal_projector)(found.tokens, found.positions)
        slots = slots * self._level_values(found.level, "gamma").to(slots).view(-1, 1, 1)
        streams = [(slots, found.keep)]
        if self.arm["pixels"]:
            pixels = self.multi_modal_projector(patches.features)
            streams.insert(int(self.arm.get("form") == "first"), (pixels, torch.ones_like(pixels[..., 0], dtype=torch.bool)))
        slots, kept = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
        return GranulonImageFeatures(
            last_hidden_state=outputs.last_hidden_state, pooler_output=list(slots), slot_mask=kept, aggregation=found
        )

    def encode_images(self, pixel_values, inputs_embeds, image_mask, attention_mask=None, question_mask=None, *args, **kwargs):
        if self.arm["maker"] == "text_resampler":
            mask = (question_mask.bool() & ~image_mask).unsqueeze(-1)
            self.question = inputs_embeds.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
        return super().encode_images(pixel_values, inputs_embeds, image_mask, attention_mask, question_mask, *args, **kwargs)


class ArmForConditionalGeneration(GranulonForConditionalGeneration):
    """[`GranulonForConditionalGeneration`] of an arm."""

    def __init__(self, config):
        super().__init__(config)
        self.model = ArmModel(config)
        self.post_init()


class ArmProcessor(GranulonProcessor):
    """Asks for the slots that an arm has; features are computed before, so that no picture is resized."""

    slots: int

    def _slots_per_image(self, height: int, width: int) -> int:
        return self.slots


def no_picture() -> CLIPImageProcessor:
    """An image processor that leaves the collator's stand-in pictures as they are."""
    switches = ("resize", "center_crop", "rescale", "normalize", "convert_rgb")
    return CLIPImageProcessor(size={"height": 8, "width": 8}, **{f"do_{name}": False for name in switches})


def build(
    arm: dict[str, Any],
    language_model: Any,
    tokenizer: Any,
    vision_tower: Any,
    *,
    width: int,
    patches: int,
    seed: int,
    store: AggregateStore | None = None,
    controller: dict[str, torch.Tensor] | None = None,
) -> tuple[ArmForConditionalGeneration, ArmProcessor]:
    """Model and processor of an arm; the projector, and what the arm adds, are trainable and in float32.

    Args:
        arm (`dict`): of [`ARMS`].
        language_model, tokenizer, vision_tower: the frozen parts.
        width, patches (`int`): of the features.
        seed (`int`): of the new weights. The projector begins with the same ones in every arm.
        store ([`AggregateStore`], *optional*): clusters that are known.
        controller (`dict`, *optional*): trained weights.
    """
    image_token = tokenizer.convert_tokens_to_ids(find_image_token(tokenizer))
    config = GranulonConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_id=image_token,
        granularity_levels=arm["levels"],
        num_semantic_tokens=max(1, arm["tokens"]),
        clustering=arm["clustering"],
        **({"visual_tokens": "semantic", "reducer": arm["reducer"]} if arm["maker"] == "reducer" else {}),
        slot_position=PLACES.get(arm.get("form", ""), "none"),
        controller_hidden_size=64,
        image_seq_length=patches,
        tie_word_embeddings=True,
        dtype=language_model.dtype,
    )
    torch.manual_seed(seed)
    model = ArmForConditionalGeneration.from_backbones(config, vision_tower, language_model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.manual_seed(seed)
        layer.reset_parameters()
    model.model.attach(arm, store, width, patches)
    if controller is not None and arm["policy"] == "adaptive":
        model.model.controller.load_state_dict(controller)
    set_stage(model, "projector")
    for part in (model.model.maker, model.model.semantic_projector):
        if part is not None:
            part.float().requires_grad_(True)
    processor = ArmProcessor.from_parts(no_picture(), tokenizer, vision_tower.config, num_semantic_tokens=arm["tokens"])
    processor.slots = (patches if arm["pixels"] else 0) + arm["tokens"]
    return model, processor


def forward_flops(
    arm: dict[str, Any], decoder: Any, width: int, patches: int, visual: float, text: float, cached: bool = False
) -> float:
    """FLOPs of one forward pass, from its visible tokens; the tower, the same for all but `downsample`, is left out, and
    clusters if cached.

    2 · (weights of decoder layers + head at one position) · tokens, 4 · layers · (heads · their width) · tokens² / 2 of causal
    attention, 2 · weights of the projector · visual tokens; of a resampler keys, scores and sums; of clusters the kernel
    N² · D and 10 steps of N² · C (before pooling; joint kernel).
    """
    config = decoder.config
    layers = sum(p.numel() for p in decoder.layers.parameters() if p.ndim == 2)
    tokens = visual + text
    attention = decoder.layers[0].self_attn.q_proj.out_features  # heads may be wider than the hidden state
    total = 2.0 * layers * tokens + 2 * config.num_hidden_layers * attention * tokens**2
    total += 2.0 * config.hidden_size * config.vocab_size
    total += 2.0 * (width * config.hidden_size + config.hidden_size**2) * visual
    extra = arm["tokens"]
    if arm["maker"] in ("resampler", "text_resampler"):
        total += 2.0 * patches * (width * CHANNELS + extra * (CHANNELS + width))
    elif arm["maker"] == "clusters" and arm.get("reducer") != "downsample" and not cached:
        total += 2.0 * patches**2 * width + 2.0 * 10 * patches**2 * extra
    elif arm["maker"] == "pool" or arm.get("reducer") == "pool":
        total += 1.0 * patches * width
    elif arm.get("reducer") in ("queries", "region-attention"):  # keys, values, queries and sums; the latter has an MLP, too
        projected = 2 * patches + (4 if arm["reducer"] == "region-attention" else 2) * extra
        total += 2.0 * width**2 * projected + 4.0 * patches * extra * width
    elif arm.get("reducer") in ("attention-merge", "adaptive-prune", "question-dpp"):  # every patch with every other
        total += 2.0 * patches**2 * width
    return total
