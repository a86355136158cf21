# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""Granulon model configuration."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .reducers_granulon import REDUCERS

DEFAULT_GRANULARITY_LEVELS = (
    {"name": "coarse", "alpha": 4, "beta": 5, "gamma": 1.0},
    {"name": "middle", "alpha": 2, "beta": 10, "gamma": 1.0},
    {"name": "fine", "alpha": 1, "beta": 20, "gamma": 1.0},
)
# What the values of a level must be; none may be a bool, which Python takes for an integer.
LEVEL_RULES = {
    "name": ("a non-empty string", lambda value: isinstance(value, str) and value),
    "alpha": ("an integer of at least 1", lambda value: isinstance(value, int) and value >= 1),
    "beta": ("an integer of at least 1", lambda value: isinstance(value, int) and value >= 1),
    "gamma": ("a number above 0", lambda value: isinstance(value, int | float) and 0 < value < float("inf")),
}
BACKBONE_KEYS = {"name", "revision", "subfolder"}
# The default backbones: DINOv3 ViT-L/16 at 224 px (supplement, section 1) and Qwen2.5-1.5B.
DINOV3_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
DINOV3_LARGE |= {"num_register_tokens": 4, "image_size": 224, "patch_size": 16}
QWEN25_SMALL = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
QWEN25_SMALL |= {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}
# Of the compact form (ours): no pooling before the clusters, since they are all that the language model sees.
COMPACT_GRANULARITY_LEVELS = (
    {"name": "coarse", "alpha": 1, "beta": 16, "gamma": 1.0},
    {"name": "middle", "alpha": 1, "beta": 32, "gamma": 1.0},
    {"name": "fine", "alpha": 1, "beta": 64, "gamma": 1.0},
)


@strict
class GranulonConfig(PreTrainedConfig):
    r"""
    Configuration of a Granulon model: any vision tower, any decoder, and how pixel features become semantic tokens.

    Fields marked *(ours)* settle what the paper and its supplement leave open.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of the vision tower. Defaults to DINOv3 ViT-L/16
            at 224 px (supplement, section 1).
        text_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of the decoder. Defaults to Qwen2.5-1.5B.
        image_token_id (`int`, defaults to 151655): Token that marks an image slot. It must already be in the tokenizer: the
            frozen embedding table is never resized.
        visual_tokens (`"pixel+semantic"`, `"semantic"` or `"pixel"`, defaults to `"pixel+semantic"`): What the language model
            sees of an image: pixel tokens and semantic ones (paper), semantic ones alone (the compact form, ours), or pixel
            tokens alone, which is a plain LLaVA and the same as `granularity_levels=[]`.
        reducer (`str`, defaults to `"adata"`): How semantic tokens are made of patch features: AdaTA (paper), or `"pool"`,
            `"queries"`, `"attention-merge"`, `"adaptive-prune"`, `"question-dpp"`, `"region-attention"`, and the controls
            `"random"` and `"downsample"`.
        granularity_levels (`list[dict]`, *optional*): Levels `{"name", "alpha", "beta", "gamma"}`: pooling kernel side (AdaTA
            alone), number of clusters or of tokens, weight of the projected semantic tokens. `None` gives coarse (4, 5, 1.0),
            middle (2, 10, 1.0) and fine (1, 20, 1.0) *(ours)*, in the compact form coarse (1, 16, 1.0), middle (1, 32, 1.0) and
            fine (1, 64, 1.0); an empty list gives a plain LLaVA with that vision tower.
        num_semantic_tokens (`int`, *optional*): K, semantic slots per image. Defaults to 20 *(ours: about 10 % of 196 pixel
            tokens)*, in the compact form to the largest level. A level with fewer tokens leaves some empty.
        default_granularity (`str`, *optional*): Level that an untrained controller prefers, and the level of an image without a
            question *(ours)*. Defaults to the middle one of `granularity_levels`.
        relation (`"cosine"` or `"attention"`, defaults to `"cosine"`): Relation between patches: cosine of their features
            (released code), or the head-mean of the vision tower's last self-attention (paper).
        relation_weight (`float`, defaults to 1.0): Lambda_f, weight of the relation against the features in the clustering
            kernel.
        clustering (`"joint"` or `"relation"`, defaults to `"joint"`): `"joint"` clusters features and relation together;
            `"relation"` clusters the rows of the pooled relation (the formula as printed, and the released code).
        clustering_steps (`int`, defaults to 10): Fixed number of k-means steps.
        filter_weights (`list[float]`, defaults to `[1.0, 1.0, 1.0]`): Eta: weights of size, coherence and dispersion in the
            quality score *(ours)*.
        slot_position (`"none"`, `"semantic"` or `"all"`, *optional*): Which slots are told where they are *(ours)*,
            by learned embeddings of row and column that are added behind the projector: none (paper), semantic tokens (the mean
            patch of their cluster), or pixel tokens as well. Defaults to `"none"`, in the compact form to `"semantic"`: without
            places it lost .04 of accuracy in `examples/experiment`.
        slot_position_bins (`int`, defaults to 14): Rows and columns of these embeddings; between two of them a slot gets parts
            of both.
        controller_hidden_size (`int`, defaults to 256): Width of the granularity controller *(ours)*.
        controller_prices (`list[float]`, *optional*): Prices of a visual token, in nats of the answer's loss, that the
            controller was trained at *(ours)*: it has outputs for each, and a call may name one. `None` is the paper's
            controller, which knows no price.
        pixel_loss_weight (`float`, defaults to 0.0): Weight of the loss with the semantic slots hidden (paper's dual-stream
            likelihood; 0 is the supplement's recipe).
        semantic_loss_weight (`float`, defaults to 0.0): Weight of the loss with the pixel slots hidden.
        vision_feature_layer (`int` or `list[int]`, *optional*): Hidden state(s) of the vision tower to use, as in LLaVA;
            several are concatenated. `None` uses the tower's own last hidden state, after its final norm *(ours)*.
        vision_feature_select_strategy (`"default"` or `"full"`, defaults to `"default"`): `"default"` keeps patch tokens only;
            `"full"` also keeps CLS and register tokens, which needs `granularity_levels=[]` since they have no place on the
            grid.
        image_seq_length (`int`, defaults to 196): Pixel tokens per image at the vision tower's own resolution; informative.
        projector_hidden_act (`str`, defaults to `"gelu"`): Activation of the projector.
        multimodal_projector_bias (`bool`, defaults to `True`): Whether the projector's linear layers have a bias.
        tie_word_embeddings (`bool`, *optional*): Taken from `text_config` unless given.
        backbones (`dict`, *optional*): Where the frozen backbones come from *(ours)*:
            `{"vision": {"name", "revision"}, "text": {"name", "revision"}}`. A checkpoint in adapter form is assembled from
            them; in any other it is information.

    Raises:
        ValueError: a level, the default level or an option is not valid.

    Example:

    ```python
    >>> from granulon_hf import GranulonConfig, GranulonForConditionalGeneration

    >>> config = GranulonConfig(default_granularity="fine")
    >>> [level["name"] for level in config.granularity_levels]
    ['coarse', 'middle', 'fine']
    ```"""

    model_type = "granulon"
    # What Trainer need not gather when it predicts.
    keys_to_ignore_at_inference = "cache image_outputs granularity_probs granularity attention_mask aggregation".split()
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov3_vit", init_kwargs=DINOV3_LARGE),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2", init_kwargs=QWEN25_SMALL),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    visual_tokens: Literal["pixel+semantic", "semantic", "pixel"] = "pixel+semantic"
    reducer: str = "adata"
    granularity_levels: list[dict[str, Any]] | None = None
    num_semantic_tokens: int | None = None
    default_granularity: str | None = None
    relation: Literal["cosine", "attention"] = "cosine"
    relation_weight: float | int = 1.0
    clustering: Literal["joint", "relation"] = "joint"
    clustering_steps: int = 10
    filter_weights: list[float | int] | tuple[float | int, ...] = (1.0, 1.0, 1.0)
    slot_position: Literal["none", "semantic", "all"] | None = None
    slot_position_bins: int = 14
    controller_hidden_size: int = 256
    controller_prices: list[float | int] | None = None
    pixel_loss_weight: float | int = 0.0
    semantic_loss_weight: float | int = 0.0
    vision_feature_layer: int | list[int] | None = None
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    image_seq_length: int = 196
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool | None = None
    backbones: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        compact = self.visual_tokens == "semantic"
        if self.granularity_levels is None:
            levels = COMPACT_GRANULARITY_LEVELS if compact else DEFAULT_GRANULARITY_LEVELS
            self.granularity_levels = [] if self.visual_tokens == "pixel" else [dict(level) for level in levels]
        self.filter_weights = [float(weight) for weight in self.filter_weights]
        self._check_levels()
        if self.num_semantic_tokens is None:
            self.num_semantic_tokens = max((level["beta"] for level in self.granularity_levels if compact), default=20)
        if self.slot_position is None:
            self.slot_position = "semantic" if compact else "none"
        if self.granularity_levels and self.default_granularity is None:
            self.default_granularity = self.level_names[len(self.granularity_levels) // 2]
        self._check_options()
        if not self.granularity_levels:
            self.visual_tokens = "pixel"
        super().__post_init__(**kwargs)
        # False at the top of a composite config would silently re-initialize a tied head on load.
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)

    @property
    def level_names(self) -> list[str]:
        """Names of the granularity levels, in order."""
        return [level["name"] for level in self.granularity_levels]

    @property
    def compact(self) -> bool:
        """Whether the language model sees semantic tokens alone."""
        return self.visual_tokens == "semantic"

    @property
    def num_semantic_slots(self) -> int:
        """Semantic slots that every image gets: K, or 0 without levels."""
        return self.num_semantic_tokens if self.granularity_levels else 0

    @property
    def slot_options(self) -> dict[str, Any]:
        """What the processor must know of the slots of an image; arguments of [`GranulonProcessor`]."""
        names = ("visual_tokens", "reducer", "granularity_levels", "default_granularity")
        return {"num_semantic_tokens": self.num_semantic_slots} | {name: getattr(self, name) for name in names}

    def _check_levels(self):
        for level in self.granularity_levels:
            if not isinstance(level, dict) or set(level) != set(LEVEL_RULES):
                raise ValueError(f"A granularity level has the keys name, alpha, beta and gamma; got {level!r}.")
            for key, (rule, holds) in LEVEL_RULES.items():
                if isinstance(level[key], bool) or not holds(level[key]):
                    raise ValueError(f"Level {level['name']!r}: {key} must be {rule}; got {level[key]!r}.")
        if len(set(self.level_names)) != len(self.level_names):
            raise ValueError(f"The names of the granularity levels must differ; got {self.level_names}.")

    def _check_options(self):
        names = self.level_names
        full = self.vision_feature_select_strategy == "full"
        if names and self.default_granularity not in names:
            raise ValueError(f"default_granularity={self.default_granularity!r} is not one of the levels {names}.")
        if names and self.num_semantic_tokens < 1:
            raise ValueError(f"num_semantic_tokens must be at least 1; got {self.num_semantic_tokens}.")
        if names and full:
            raise ValueError(
                "vision_feature_select_strategy='full' keeps CLS and register tokens, which have no place on the grid that "
                "granularity levels pool; use 'default', or granularity_levels=[]."
            )
        if self.reducer not in REDUCERS:
            raise ValueError(f"reducer must be one of {', '.join(REDUCERS)}; got {self.reducer!r}.")
        if self.compact and not names:
            raise ValueError("visual_tokens='semantic' needs granularity levels, which say how many tokens an image gets.")
        if self.visual_tokens == "pixel" and names:
            raise ValueError("visual_tokens='pixel' shows pixel tokens alone and takes no levels: use granularity_levels=[].")
        if self.compact and (self.pixel_loss_weight or self.semantic_loss_weight):
            raise ValueError("The losses of one visual stream need both streams; with visual_tokens='semantic' they must be 0.")
        if self.slot_position == "semantic" and not names:
            raise ValueError("slot_position='semantic' needs granularity levels; without them use 'all', or 'none'.")
        if self.slot_position == "all" and full:
            raise ValueError("slot_position='all' locates patches; CLS and register tokens have no place: use 'default'.")
        for name, least in (("slot_position_bins", 2), ("controller_hidden_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        if len(self.filter_weights) != 3:
            raise ValueError(f"filter_weights are three numbers (size, coherence, dispersion); got {self.filter_weights}.")
        for name in ("relation_weight", "clustering_steps", "pixel_loss_weight", "semantic_loss_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}.")
        if self.backbones is not None and not (
            set(self.backbones) == {"vision", "text"}
            # Nothing else is passed on: a config must not be able to switch remote code on.
            and all(isinstance(one, dict) and {"name"} <= set(one) <= BACKBONE_KEYS for one in self.backbones.values())
        ):
            raise ValueError(
                'backbones are {"vision": {"name": …, "revision": …}, "text": {"name": …, "revision": …}} (and "subfolder"); '
                f"got {self.backbones!r}."
            )
        prices = self.controller_prices
        if prices is not None and (not prices or min(prices) < 0 or len(set(prices)) < len(prices)):
            raise ValueError(f"controller_prices must be different numbers of at least 0; got {prices}.")


# By this table of names `transformers serve` knows which models read images.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(GranulonConfig.model_type, "GranulonForConditionalGeneration")

__all__ = ["GranulonConfig"]
