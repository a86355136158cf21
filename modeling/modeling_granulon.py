# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""PyTorch Granulon model.

Notation: B batch, I images, N = H·W patch tokens of one image, D vision width, E language width, L text length, n number of
granularity levels, K semantic slots per image, S = N + K slots of one image (N without levels, K in the compact form).

    image ────► vision tower ──► F [I x N x D]
    question ─► controller ────► p [B x n] ──argmax──► level (alpha, beta, gamma)
    F, level ─► AdaTA ─────────► semantic tokens [I x K x D], keep [I x K]
    [Φ(F) ; gamma · Φ(semantic tokens)] ──► S image slots ──► language model ──► answer

In the compact form (`visual_tokens="semantic"`) the slots are the semantic tokens alone, and S = K. Another reducer may stand
in AdaTA's place.
"""

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import GENERATION_CONFIG_NAME, WEIGHTS_NAME, logging, torch_compilable_check
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from .adapter_granulon import ADAPTER_WEIGHTS, HUB_OPTIONS, assemble, find_adapter, find_file, load_whole, name_backbone
from .aggregation_granulon import GranulonAggregation, grid_positions, recall
from .attention_granulon import NAME as PACKED_ATTENTION
from .configuration_granulon import GranulonConfig
from .controller_granulon import GranularityController, cast_input, first_block_states, unpack_questions
from .processing_granulon import find_image_token
from .reducers_granulon import REDUCERS, PatchFeatures, QueryReducer, side_of
from .vision_granulon import (
    LastAttention,
    describe,
    last_self_attention,
    probe_vision_tower,
    run_resized,
    takes_any_size,
    to_patch_tokens,
    vision_width,
)

try:
    from transformers.modeling_outputs import MultimodalBaseModelOutputWithPast, MultimodalCausalLMOutputWithPast
    from transformers.modeling_utils import slice_logits_to_keep

    CACHE = "cache"
except ImportError:
    # vLLM pins a transformers before 5.24, of which it needs no more than the states: it generates, and keeps caches, itself.
    from transformers.modeling_outputs import BaseModelOutputWithPast as MultimodalBaseModelOutputWithPast
    from transformers.modeling_outputs import CausalLMOutputWithPast as MultimodalCausalLMOutputWithPast

    CACHE = "past_key_values"

logger = logging.get_logger(__name__)
Granularity = str | int | Sequence[str | None] | torch.Tensor | None
Budget = int | Sequence[int] | torch.Tensor | None
# What of `generate` depends on the length of the prompt, and arguments that see the prompt.
GENERATION_LENGTHS = ("max_new_tokens", "min_length", "return_dict_in_generate")
SEE_PROMPT = ("inputs_embeds", "cache", "past_key_values", "custom_generate", "visual_stream", "stopping_criteria")
SEE_PROMPT += ("logits_processor", "prefix_allowed_tokens_fn")
# Labels whose logits are held at once: 1.2 GB in bfloat16 with a vocabulary of 150,000, and 2.5 GB in float32 beside it.
LOSS_CHUNK = 4096


@dataclass
class GranulonModelOutputWithPast(MultimodalBaseModelOutputWithPast):
    """Output of a decoder that was shown images, as in transformers, with the levels that were chosen.

    Args:
        image_outputs ([`GranulonImageFeatures`], *optional*): of the vision tower, with the projected slots as `pooler_output`.
        granularity_probs (`torch.Tensor`, *optional*): p, what the controller prefers, shape [B x n]; of packed samples, one
            row per sample.
        granularity (`torch.Tensor`, *optional*): index of the level that was used, shape [B], or one per packed sample.
        attention_mask (`torch.Tensor`, *optional*): the mask with the empty image slots hidden, shape [B x past + L]. In a
            decoding loop of your own, extend this one (`generate` does).
        aggregation (`GranulonAggregation`, *optional*): clusters, scores and assignment maps of every image.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    granularity_probs: torch.Tensor | None = None
    granularity: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    aggregation: GranulonAggregation | None = None


@dataclass
class GranulonCausalLMOutputWithPast(MultimodalCausalLMOutputWithPast):
    """Next-token loss (a scalar, where `labels` are given), logits [B x L x vocabulary], and the fields of
    [`GranulonModelOutputWithPast`]."""

    image_outputs: BaseModelOutputWithPooling | None = None
    granularity_probs: torch.Tensor | None = None
    granularity: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    aggregation: GranulonAggregation | None = None


@dataclass
class GranulonImageFeatures(BaseModelOutputWithPooling):
    """Output of the vision tower as it is, and what became of it.

    Args:
        pooler_output (`list[torch.Tensor]`): projected slots of each image, pixel tokens first, each of shape [S x E].
        slot_mask (`torch.LongTensor`, *optional*): 1 on filled slots, shape [I x S]; `None` without levels.
        aggregation (`GranulonAggregation`, *optional*): clusters, scores and assignment maps; `None` without levels.
        granularity_probs (`torch.Tensor`, *optional*): what the controller prefers, shape [B x n]; `None` where no question
            was read.
        granularity (`torch.Tensor`, *optional*): index of the level that each sample is shown at, shape [B].
    """

    slot_mask: torch.Tensor | None = None
    aggregation: GranulonAggregation | None = None
    granularity_probs: torch.Tensor | None = None
    granularity: torch.Tensor | None = None


class GranulonMultiModalProjector(nn.Module):
    """Φ, the LLaVA projector: Linear, activation, Linear; the parameter names are LLaVA's.

    With `slot_position` in the config it adds learned embeddings of a slot's row and column, zero at first (ours).
    """

    def __init__(self, config: GranulonConfig, vision_width: int):
        super().__init__()
        text_width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(vision_width, text_width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_width, text_width, bias=bias)
        bins = torch.zeros(2, config.slot_position_bins, text_width)
        self.position = None if config.slot_position == "none" else nn.Parameter(bins)

    def forward(self, features: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Project features [... x D]; their rows and columns from -1 to 1 [... x 2] count with `slot_position` alone."""
        # Trained in float32 beside frozen parts in bfloat16.
        slots = self.linear_2(self.act(self.linear_1(cast_input(features, self))))
        if positions is None or self.position is None:
            return slots
        last = self.position.shape[1] - 1
        place = (positions + 1) / 2 * last
        low = place.floor().clamp(max=last - 1).long()
        weight = (place - low).to(self.position.dtype).unsqueeze(-1)  # between two bins it is parts of both
        row, column = (
            torch.lerp(table[bin], table[bin + 1], part)
            for table, bin, part in zip(self.position, low.unbind(-1), weight.unbind(-2), strict=True)
        )
        return slots + (row + column).to(slots.dtype)


class GranulonPreTrainedModel(PreTrainedModel):
    """Base of the Granulon models: weight initialization, loading and saving."""

    config: GranulonConfig
    config_class = GranulonConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        # Initialization below respects weights that are loaded, as transformers' own models do. Custom code is not trusted
        # to, and the backbones' modules without direct parameters would not be initialized.
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in transformers, but weights that are missing are an error; a checkpoint in adapter form is assembled from the
        backbones that its config names.

        Only safetensors are read unless `use_safetensors=False` says that pickled weights are trusted.

        Args:
            backbones (`dict`, *optional*): other places of the same backbones, as in [`GranulonConfig`].

        Raises:
            OSError: weights or backbones cannot be read.
            ValueError: weights of the checkpoint are missing or do not fit its config (with `output_loading_info=True` they
                are listed instead), or the adapter does not fit its backbones, or names none.
        """
        if kwargs.get("use_safetensors") is None:  # transformers would then take pickles where there is nothing else
            kwargs["use_safetensors"] = True
        name, options = pretrained_model_name_or_path, {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        if name is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(name, *model_args, config=config, **kwargs)
        place = {key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key)} | options
        if not isinstance(config, PreTrainedConfig):
            held = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}  # a config takes no "auto"
            rest = {key: value for key, value in kwargs.items() if key not in place | held}
            config, rest = cls.config_class.from_pretrained(config or name, return_unused_kwargs=True, **place, **rest)
            kwargs = rest | place | held
        references = (getattr(config, "auto_map", None) or {}).values()
        if foreign := {str(ref).partition("--")[0] for ref in references if "--" in str(ref)} - {str(name)}:
            logger.warning(f"{name} names code of {', '.join(sorted(foreign))} as its own; {cls.__module__} is used instead.")
        adapter = find_adapter(name, **place)
        with_info = kwargs.pop("output_loading_info", False)
        if adapter is None:
            load = super().from_pretrained
            try:
                if with_info:  # whoever asks what is missing is told, as in transformers, and decides
                    return load(name, *model_args, config=config, output_loading_info=True, **kwargs)
                return load_whole(load, name, *model_args, config=config, **kwargs)
            except OSError as error:
                if not kwargs["use_safetensors"] or not find_file(name, WEIGHTS_NAME, **place):
                    raise
                raise OSError(
                    f"{name} holds pickled weights ({WEIGHTS_NAME}), which are read only where they are trusted: pass "
                    "use_safetensors=False."
                ) from error
        if config.backbones is None:
            raise ValueError(
                f"{name} holds trained weights ({ADAPTER_WEIGHTS}) and its config does not say of which backbones; say it: "
                'from_pretrained(…, backbones={"vision": {"name": …}, "text": {"name": …}}); or train with --save_full true.'
            )
        dtype = kwargs.get("dtype") or "auto"
        weights, generation_config = assemble(
            config,
            adapter,
            dtype=config.dtype if dtype == "auto" else dtype,
            use_safetensors=kwargs["use_safetensors"],
            **options,
        )
        if find_file(name, GENERATION_CONFIG_NAME, **place):
            generation_config = GenerationConfig.from_pretrained(name, **place)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder", *HUB_OPTIONS)}
        if cls.can_generate():
            kwargs.setdefault("generation_config", generation_config)
        else:  # the model without its head, whose names begin one level lower
            weights = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
        model, info = super().from_pretrained(
            None, *model_args, config=config, state_dict=weights, output_loading_info=True, **kwargs
        )
        # Places that are new here tell nothing before they are trained.
        if missing := sorted(key for key in info["missing_keys"] if not key.endswith("multi_modal_projector.position")):
            raise ValueError(f"The adapter {name} lacks {len(missing)} weights, {missing[0]} first: it is only a part of one.")
        if unknown := sorted(info["unexpected_keys"]):
            raise ValueError(f"The adapter {name} has {unknown[0]}, which this model lacks: it belongs to another one.")
        model.name_or_path = model.config.name_or_path = str(name)
        return (model, info) if with_info else model

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GranulonMultiModalProjector) and module.position is not None:
            init.zeros_(module.position)
        if isinstance(module, QueryReducer):
            init.normal_(module.queries, std=self.config.initializer_range)
        # After its layers, which come first. A controller that has not been trained takes the default level (ours).
        if isinstance(module, GranularityController):
            init.zeros_(module.fc2.weight)
            init.copy_(module.fc2.bias, module.untrained_logits(module.fc2.bias.device).repeat(module.num_prices))


class GranulonModel(GranulonPreTrainedModel):
    """A vision tower, the granularity controller, AdaTA, the projector and a decoder, without a language-modeling head.

    Raises:
        ValueError: the vision tower has no patch features, the decoder has no first block that the controller can run, or
            `relation="attention"` is asked of a tower without self-attention.
    """

    # Quantizers leave these alone, whatever else they are told to skip: they are small, and they are what is trained.
    _keep_in_fp32_modules = ["multi_modal_projector", "controller"]

    def __init__(self, config: GranulonConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.last_attention: LastAttention | None = None
        layers = config.vision_feature_layer
        width = vision_width(self.vision_tower) * (len(layers) if isinstance(layers, list | tuple) else 1)
        self.multi_modal_projector = GranulonMultiModalProjector(config, width)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.granularity_levels:
            self.controller = GranularityController(config)
            # The level is an argmax, through which no gradient passes: it is trained on its own, then frozen (paper).
            self.controller.requires_grad_(False)
            self.reducer = REDUCERS[config.reducer].build(config, width)
            if isinstance(self.reducer, nn.Module):
                self._keep_in_fp32_modules = [*self._keep_in_fp32_modules, "reducer"]
            self._attach_backbones()
        if self.language_model.config._attn_implementation == "sglang":
            self.load_weights = self._load_weights  # it is looked for by this name; other engines need none
        self.post_init()

    def _attach_backbones(self):
        """Check what the controller and the relation need of the backbones, and watch the attention that is the relation."""
        decoder = self.language_model
        first = (getattr(decoder.config, "layer_types", None) or ["full_attention"])[0]
        reachable = hasattr(decoder, "layers") and hasattr(decoder, "rotary_emb")
        if not reachable or first not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"The granularity controller cannot run the first block of {type(decoder).__name__}: it needs `rotary_emb` and "
                f"`layers` that begin with self-attention (here: {first}); use a decoder of the Llama or Qwen kind, or "
                "granularity_levels=[]."
            )
        needs = REDUCERS[self.config.reducer].needs
        if self.config.relation == "attention" or "attention" in needs:
            attention = last_self_attention(self.vision_tower)
            if attention is None and self.config.relation == "attention":
                raise ValueError(
                    f"{describe(self.vision_tower)} has no self-attention to take the relation from; use relation='cosine'."
                )
            self.last_attention = None if attention is None else LastAttention(attention)
        if "scales" not in needs:
            return
        self.patch_size = probe_vision_tower(self.config.vision_config).patch_size
        if not takes_any_size(self.config.vision_config, self.patch_size):
            others = ", ".join(name for name, reducer in REDUCERS.items() if "scales" not in reducer.needs)
            raise ValueError(
                f"{describe(self.vision_tower)} takes images of one size only, and reducer={self.config.reducer!r} needs "
                f"smaller ones; these reducers work: {others}."
            )

    # --- granularity -------------------------------------------------------------------------------------------------

    def get_granularity_probs(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        price: float | None = None,
    ) -> torch.Tensor:
        """Return p, the controller's preference among the levels, shape [B x n]. It needs no images.

        Args: those of [`GranulonModel.forward`].

        Raises:
            ValueError: the model has no levels, or no such price.
        """
        if not self.config.granularity_levels:
            raise ValueError("This model has granularity_levels=[] and therefore no controller.")
        image_mask = self._image_mask(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        question_embeds, question = self._question(inputs_embeds, image_mask, attention_mask, question_mask)
        return self._granularity_logits(question_embeds, question, price).softmax(-1)

    def _granularity_logits(self, question_embeds, question, price=None):
        index = self._price_index(price)
        if len(self.config.granularity_levels) == 1:  # nothing to choose: the question need not be read
            return question_embeds.new_zeros(len(question_embeds), 1, dtype=torch.float32)
        return self.controller(first_block_states(self.language_model, question_embeds, question), question, index)

    def _price_index(self, price: float | None) -> int:
        prices = self.config.controller_prices or []
        if price is None or price in prices:
            return 0 if price is None else prices.index(price)
        if prices:
            raise ValueError(f"price={price} is not one of the controller's: {', '.join(map(str, prices))}.")
        raise ValueError(
            f"price={price} needs a controller that was trained at prices (examples/train_controller.py --targets loss)."
        )

    def _question(self, inputs_embeds, image_mask, attention_mask, question_mask, sample=None):
        """Return embeddings [B x L x E] and a mask [B x L] that is true on the questions' tokens; one row per packed sample."""
        # By default the question is all text that is attended to.
        question = ~image_mask
        if attention_mask is not None and attention_mask.ndim == 2:
            question = question & attention_mask[:, -image_mask.shape[1] :].bool()
        if question_mask is not None:
            if question_mask.shape != image_mask.shape:
                # TRL's collators put answers behind the prompts and leave the prompts' mask as it was.
                raise ValueError(
                    f"question_mask {tuple(question_mask.shape)} must have the shape of the tokens, {tuple(image_mask.shape)}; "
                    "with TRL pass data_collator=GranulonCollator(processor), and GranulonPreferenceCollator to DPOTrainer."
                )
            question = question & question_mask.bool()
        if sample is not None:
            return unpack_questions(inputs_embeds, question, sample)
        return inputs_embeds, question

    def _level_index(self, granularity: Granularity, batch: int, device: torch.device) -> torch.Tensor:
        """Return the index of each sample's forced level, -1 where the controller decides. Shape [B]."""
        if isinstance(granularity, int):
            granularity = torch.tensor(granularity)
        if isinstance(granularity, torch.Tensor):
            if granularity.ndim > 1 or granularity.numel() not in (1, batch):
                raise ValueError(f"granularity has the shape {tuple(granularity.shape)} for a batch of {batch} samples.")
            level = granularity.to(device).expand(batch)
            # Asynchronous on a GPU: a level is data, and nothing waits for it.
            known_index = ((level >= -1) & (level < len(self.config.granularity_levels))).all()
            torch._assert_async(known_index, f"granularity must lie between -1 and {len(self.config.granularity_levels) - 1}.")
            return level
        names = [granularity] * batch if granularity is None or isinstance(granularity, str) else list(granularity)
        if len(names) != batch:
            raise ValueError(f"granularity names {len(names)} levels for a batch of {batch} samples.")
        known = self.config.level_names
        if unknown := sorted({str(name) for name in names if name is not None and name not in known}):
            levels = f"this model's levels are {', '.join(known)}" if known else "this model has no granularity levels"
            raise ValueError(f"Unknown granularity {unknown[0]!r}; {levels}.")
        return torch.tensor([-1 if name is None else known.index(name) for name in names], device=device)

    def _budget(self, visual_tokens: Budget, count: int, device: torch.device) -> torch.Tensor:
        """Return the visual tokens of each sample or image, where a call says how many. Shape [count]."""
        slots = self.config.num_semantic_slots
        if not slots:
            raise ValueError(f"visual_tokens={visual_tokens!r} was given, but this model shows all pixel tokens and no others.")
        budget = torch.as_tensor(visual_tokens, device=device)
        if budget.ndim > 1 or budget.numel() not in (1, count) or budget.dtype != torch.long:
            raise ValueError(
                f"visual_tokens must be an integer, or one for each of {count} samples; got {visual_tokens!r:.80}."
            )
        message = f"visual_tokens must lie between 1 and {slots}, the slots that this model has for them"
        if not torch.is_tensor(visual_tokens) and not ((budget >= 1) & (budget <= slots)).all():
            raise ValueError(f"{message}; got {visual_tokens!r:.80}.")
        torch._assert_async(((budget >= 1) & (budget <= slots)).all(), message)
        return budget.expand(count)

    def _level_values(self, level: torch.Tensor, key: str, default: float = 0) -> torch.Tensor:
        """Return the parameter `key` of each level index, by arithmetic on the device; the default for -1. Shape of `level`."""
        values = torch.full_like(level, default) * (level < 0)
        for index, value in enumerate(self.config.granularity_levels):
            values = values + (level == index) * value[key]
        return values

    # --- images ------------------------------------------------------------------------------------------------------

    def _run_tower(self, run, pixel_values, layer, strategy, **kwargs):
        """Return features [I x N x D], the grid, and the tower's outputs; `run` is the tower or what calls it."""
        layers = [layer] if isinstance(layer, int) else layer
        if layers is not None and not kwargs.get("output_hidden_states"):
            # Only those are kept; timm numbers what it keeps anew, so that it has to keep all.
            kwargs["output_hidden_states"] = hasattr(self.vision_tower, "timm_model") or layers
        # A convolutional tower is faster when channels come last; one with attention convolves its patches alone.
        attends = hasattr(self.config.vision_config, "num_attention_heads")
        order = torch.preserve_format if attends else torch.channels_last
        pixel_values = pixel_values.to(self.vision_tower.dtype, memory_format=order)
        outputs = run(pixel_values, return_dict=True, **kwargs)
        states = [outputs.last_hidden_state] if layers is None else [outputs.hidden_states[index] for index in layers]
        tokens, grids = zip(*(to_patch_tokens(state, self.vision_tower, pixel_values) for state in states), strict=True)
        features, (height, width) = torch.cat(tokens, dim=-1), grids[0]
        if strategy == "default":
            features = features[:, features.shape[1] - height * width :]
        return features, (height, width), outputs

    def _patch_features(self, pixel_values, layer=None, strategy=None, visual_tokens=None, **kwargs):
        """Return [`PatchFeatures`] and the tower's outputs."""
        if pixel_values.ndim == 3:
            return self._computed_features(pixel_values)
        layer = self.config.vision_feature_layer if layer is None else layer
        strategy = strategy or self.config.vision_feature_select_strategy
        scales = None
        if self._needs("scales"):
            scales, patches, outputs = self._downsampled_features(pixel_values, layer, strategy, visual_tokens, **kwargs)
        if scales is None or not self.config.compact:
            features, grid, outputs = self._run_tower(self.vision_tower, pixel_values, layer, strategy, **kwargs)
            patches = PatchFeatures(features, grid, training=self.training)
        patches.scales = scales
        if self.last_attention is not None:
            keys, weights = self.last_attention.keys(), self.last_attention.weights().mean(1)
            prefix = weights.shape[-1] - patches.features.shape[1] if strategy == "default" else 0
            patches.keys = None if keys is None else keys[:, prefix:]
            patches.attention = weights[:, 0, prefix:] if prefix else weights.mean(1)
            patches.relation = weights[:, prefix:, prefix:]
        return patches, outputs

    def _needs(self, *what: str) -> bool:
        """Whether the reducer needs one of these things."""
        return bool(self.config.granularity_levels) and not REDUCERS[self.config.reducer].needs.isdisjoint(what)

    def reusable_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features [I x N x D] that stand for these images in further calls, or the images where calls need more of them."""
        if pixel_values.ndim == 3 or self._needs("scales") or self.last_attention is not None:
            return pixel_values
        patches, _ = self._patch_features(pixel_values)
        return patches.features if patches.grid[0] == patches.grid[1] else pixel_values

    def _computed_features(self, features):
        """Return what [`_patch_features`] gave for these images before."""
        side = math.isqrt(features.shape[1])
        if side * side != features.shape[1] or self.last_attention is not None or self._needs("scales"):
            raise ValueError(
                "Features [I x N x D] stand for images on square grids only, and not with relation='attention' or a reducer "
                "that looks at more than features."
            )
        return PatchFeatures(features, (side, side), training=self.training), BaseModelOutput(last_hidden_state=features)

    def _downsampled_features(self, pixel_values, layer, strategy, visual_tokens, **kwargs):
        """Return features of images at all sizes that levels (or budgets that are data) may ask for, by side of the grid."""
        slots = self.config.num_semantic_tokens
        grid = pixel_values.shape[-2] // self.patch_size, pixel_values.shape[-1] // self.patch_size
        if visual_tokens is None:
            budgets = [min(level["beta"], slots) for level in self.config.granularity_levels]
        else:
            budgets = [visual_tokens] if isinstance(visual_tokens, int) else range(1, slots + 1)
        scales = {}
        for side in sorted({side_of(budget) for budget in budgets}):
            size = min(side, grid[0]) * self.patch_size, min(side, grid[1]) * self.patch_size
            small = nn.functional.interpolate(pixel_values, size=size, mode="bilinear", antialias=True)
            run = partial(run_resized, self.vision_tower)
            scales[side], _, outputs = self._run_tower(run, small, layer, strategy, **kwargs)
        return scales, PatchFeatures(scales[side], grid, training=self.training), outputs

    def _aggregate(self, patches, level, budget=None, num_slots=None, question=None, clusters=None) -> GranulonAggregation:
        """Return semantic tokens of images at their levels, or at budgets [I] where the level is -1."""
        num_slots = num_slots or self.config.num_semantic_tokens
        if clusters is not None:
            chosen = clusters[torch.arange(len(level), device=level.device), level.clamp(min=0)]
            aggregation = recall(patches.features, patches.grid, chosen, num_slots)
            aggregation.level = level
            return aggregation
        pools = any(one["alpha"] > 1 for one in self.config.granularity_levels)
        patches.alpha = self._level_values(level, "alpha", 1) if pools else None
        if budget is None:
            budget = self._level_values(level, "beta")
        if self.config.reducer != "adata":  # which alone may make more than it keeps
            budget = budget.clamp(max=num_slots)
        if question is not None and self._needs("question"):
            with torch.no_grad():
                projected = self.multi_modal_projector(patches.features).float()
                patches.relevance = nn.functional.cosine_similarity(projected, question.unsqueeze(1), dim=-1)
        aggregation = self.reducer(patches, budget, num_slots)
        aggregation.level = level
        return aggregation

    def aggregate(
        self, pixel_values: torch.Tensor, granularity: Granularity = None, visual_tokens: Budget = None
    ) -> GranulonAggregation:
        """Return clusters, scores and assignment maps of images, for plots and analysis.

        Args: those of [`GranulonModel.get_image_features`].

        Raises:
            ValueError: the model has no levels, a level is unknown, or there are fewer slots than tokens.
        """
        if not self.config.granularity_levels:
            raise ValueError("This model has granularity_levels=[]: there is nothing to aggregate.")
        patches, _ = self._patch_features(pixel_values, visual_tokens=visual_tokens)
        return self._aggregate(patches, *self._image_choices(granularity, visual_tokens, pixel_values))

    def _choices(self, granularity, visual_tokens, count: int, device: torch.device):
        """Return the forced level, -1 where none is, and the budget, `None` where the level says it. Each [count]."""
        level = self._level_index(granularity, count, device)
        if visual_tokens is None:
            return level, None
        if granularity is not None:
            raise ValueError("granularity and visual_tokens both say how many tokens an image gets; give one of them.")
        return level, self._budget(visual_tokens, count, device)

    def _image_choices(self, granularity, visual_tokens, pixel_values):
        level, budget = self._choices(granularity, visual_tokens, pixel_values.shape[0], pixel_values.device)
        return (torch.where(level < 0, self.controller.default_level, level) if budget is None else level), budget

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        granularity: Granularity = None,
        visual_tokens: Budget = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        num_slots: int | None = None,
        question: torch.Tensor | None = None,
        num_image_slots: torch.Tensor | None = None,
        clusters: torch.Tensor | None = None,
        **kwargs,
    ) -> GranulonImageFeatures:
        """Return the image slots: projected pixel tokens (not in the compact form), then weighted projected semantic tokens.

        Args:
            pixel_values (`torch.Tensor`): shape [I x channels x height x width].
            granularity (`str`, `list[str]` or `torch.Tensor`, *optional*): level of all images, of each image, or level
                indices of shape [I]. Defaults to the default level.
            visual_tokens (`int`, `list[int]` or `torch.Tensor`, *optional*): tokens of all or of each image instead of a
                level.
            vision_feature_layer, vision_feature_select_strategy (*optional*): override the config.
            num_slots (`int`, *optional*): semantic slots per image; K unless given.
            question (`torch.Tensor`, *optional*): mean embedding of the question that is asked of each image, shape [I x E],
                for reducers that choose by it.
            num_image_slots (`torch.Tensor`, *optional*): slots of each image that `pooler_output` has, shape [I], as the
                processor has counted them for an engine that cannot hide empty ones, which come last. All of them by default.
            clusters (`torch.Tensor`, *optional*): as in [`GranulonModel.forward`].
        """
        patches, outputs = self._patch_features(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, visual_tokens, **kwargs
        )
        slots = slot_mask = aggregation = None
        if not self.config.compact:
            height, width = patches.grid
            positions = grid_positions(height, width, pixel_values.device) if self.config.slot_position == "all" else None
            slots = self.multi_modal_projector(patches.features, positions)
        if self.config.granularity_levels:
            level, budget = self._image_choices(granularity, visual_tokens, pixel_values)
            aggregation = self._aggregate(patches, level, budget, num_slots, question, clusters)
            semantic = self.multi_modal_projector(aggregation.tokens, aggregation.positions)
            semantic = self._level_values(aggregation.level, "gamma", 1).to(semantic).view(-1, 1, 1) * semantic
            slot_mask = aggregation.keep.long()
            if slots is not None:
                slot_mask = torch.cat([torch.ones_like(slots[..., 0], dtype=torch.long), slot_mask], dim=1)
            slots = semantic if slots is None else torch.cat([slots, semantic], dim=1)
        if num_image_slots is not None:
            slots = [one[:count] for one, count in zip(slots, num_image_slots.tolist(), strict=True)]
        return GranulonImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=list(slots),
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),  # a convolutional tower has none
            slot_mask=slot_mask,
            aggregation=aggregation,
        )

    def _load_weights(self, weights) -> set[str]:
        """Load the weights of a checkpoint for SGLang, which does not rename them as transformers does (DINOv3's)."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        renamings, parameters, loaded = get_model_conversion_mapping(self), dict(self.named_parameters()), set()
        for name, weight in weights:
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            with torch.no_grad():
                getattr(parameters[name], "weight_loader", torch.Tensor.copy_)(parameters[name], weight)
            loaded.add(name)
        return loaded

    def _image_mask(self, input_ids, inputs_embeds) -> torch.Tensor:
        """Return true on image slots, shape [B x L]."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        inputs_embeds: torch.Tensor,
        image_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        granularity: Granularity = None,
        visual_tokens: Budget = None,
        price: float | None = None,
        sample: torch.Tensor | None = None,
        **kwargs,
    ) -> GranulonImageFeatures:
        """Let the question choose each sample's level, and encode all images at the level of their sample.

        Args:
            image_mask (`torch.Tensor`): true on image slots, shape [B x L].
            sample (`torch.Tensor`, *optional*): number of the packed sample that holds each token, shape [B x L]. There are
                then as many probabilities and levels as samples, instead of B.
            The others are those of [`GranulonModel.forward`].
        """
        batch = count_samples(image_mask, sample)
        forced, budget = self._choices(granularity, visual_tokens, batch, image_mask.device)
        if not self.config.granularity_levels:
            return self.get_image_features(pixel_values, return_dict=True, **kwargs)
        embeds, question = self._question(inputs_embeds, image_mask, attention_mask, question_mask, sample)
        logits = self._granularity_logits(embeds, question, price)
        # No level is the answer to NaN (of a broken checkpoint, or of DoRA on a layer of zeros). A GPU is not waited for.
        torch._assert_async(logits.isfinite().all(), "The granularity controller's logits are not numbers; check its weights.")
        level = torch.where(forced < 0, logits.argmax(-1), forced) if budget is None else forced
        # An image belongs to the sample that holds its first slot.
        slots = (image_mask.sum(1) if sample is None else sample[image_mask].bincount(minlength=batch)).cumsum(0)
        first_slot = torch.arange(pixel_values.shape[0], device=slots.device) * slots[-1] // pixel_values.shape[0]
        sample = torch.searchsorted(slots, first_slot, right=True).clamp(max=slots.shape[0] - 1)
        if self._needs("question"):
            mask = question.unsqueeze(-1)
            kwargs["question"] = (embeds.float().masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1))[sample]
        if budget is None:
            kwargs["granularity"] = level[sample]
        elif isinstance(visual_tokens, int):
            kwargs["visual_tokens"] = visual_tokens
            # The processor may have written as many placeholders, and no more.
            if self.config.compact and slots[-1] == visual_tokens * pixel_values.shape[0]:
                kwargs["num_slots"] = visual_tokens
        else:
            kwargs["visual_tokens"] = budget[sample]
        images = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        images["granularity_probs"], images["granularity"] = logits.softmax(-1), level
        return images

    def find_empty_slots(
        self, images: GranulonImageFeatures, image_mask: torch.Tensor, visual_stream: str | None = None
    ) -> torch.Tensor | None:
        """Return true on slots that a level leaves empty or that `visual_stream` hides, shape [B x L]; `None` if all are seen.

        Raises:
            ValueError: there are more or fewer image slots in `image_mask` than the images fill.
        """
        sizes = [len(slots) for slots in images.pooler_output]
        torch_compilable_check(
            image_mask.sum() == sum(sizes),
            lambda: (
                f"The images need {len(sizes)} x {sizes[0]} image slots, but the text has {image_mask.sum()} "
                "image tokens; make the inputs with the model's processor, and do not truncate them."
            ),
        )
        slot_mask = images.get("slot_mask")
        if visual_stream is not None:
            if self.config.visual_tokens != "pixel+semantic" or visual_stream not in ("pixel", "semantic"):
                raise ValueError(
                    f"visual_stream must be 'pixel' or 'semantic', of a model that shows both; got {visual_stream!r}."
                )
            pixels = torch.arange(sizes[0], device=slot_mask.device) < sizes[0] - self.config.num_semantic_slots
            slot_mask = slot_mask * (pixels if visual_stream == "pixel" else ~pixels)
        return None if slot_mask is None else torch.zeros_like(image_mask).masked_scatter(image_mask, slot_mask == 0)

    # --- forward -----------------------------------------------------------------------------------------------------

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        granularity: Granularity = None,
        visual_tokens: Budget = None,
        price: float | None = None,
        visual_stream: str | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        mm_encoder_outputs: dict | None = None,
        seq_idx: torch.Tensor | None = None,
        clusters: torch.Tensor | None = None,
        **kwargs,
    ) -> GranulonModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor`): tokens with S image placeholders per image, shape [B x L].
            pixel_values (`torch.Tensor`, *optional*): images in the order of their placeholders, shape
                [I x channels x height x width]; or their patch features [I x N x D] on a square grid, computed before.
            attention_mask (`torch.Tensor`, *optional*): 1 on real tokens, shape [B x past + L].
            position_ids (`torch.LongTensor`, *optional*): shape [B x L]; empty image slots are skipped in them.
            cache (`Cache`, *optional*): keys and values of earlier tokens.
            inputs_embeds (`torch.Tensor`, *optional*): instead of `input_ids`, shape [B x L x E].
            question_mask (`torch.Tensor`, *optional*): 1 on the tokens of the question, shape [B x L]. Without it, all
                attended text tokens count (and carry no label, in [`GranulonForConditionalGeneration`]).
            granularity (`str`, `list[str | None]` or `torch.Tensor`, *optional*): `None` lets the controller choose; a name
                forces one level; a list or a tensor of level indices [B] forces one per sample (`None` or -1: choose). Under
                `torch.compile` give indices: they are data, while every other name is compiled anew.
            visual_tokens (`int`, `list[int]` or `torch.Tensor`, *optional*): semantic tokens per image instead of a level, from
                1 to K: one number for all, or one per sample. AdaTA then clusters without pooling.
            price (`float`, *optional*): of a visual token, for a controller that was trained at several prices.
            visual_stream (`str`, *optional*): `"pixel"` hides the semantic slots, `"semantic"` the pixel slots.
            vision_feature_layer, vision_feature_select_strategy (*optional*): override the config.
            mm_encoder_outputs (`dict`, *optional*): `{"image": GranulonImageFeatures}` instead of `pixel_values`.
            seq_idx (`torch.Tensor`, *optional*): the rows hold packed samples: number of the sample that each token belongs
                to, 0, 1, 2 … from left to right, shape [B x L] (as `DataCollatorWithFlattening(return_seq_idx=True)` gives
                it). Samples do not see each other; `granularity`, probabilities and levels count samples instead of rows.
                Empty image slots and padding are then removed before the decoder and come back as zeros; `position_ids` are
                counted anew, and no cache is made (ours).
            clusters (`torch.Tensor`, *optional*): the clusters of AdaTA, found before (`record_clusters`), of each image at
                each level, shape [I x n x 2 x N]; n is 1 with `visual_tokens`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; images and their placeholders do not match; an
                unknown level; a 4D attention mask together with images; packed samples with a cache or a 4D mask.
                Placeholders without any image are left to the processor to refuse, as in LLaVA.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")

        images = (mm_encoder_outputs or {}).get("image")
        sample = None
        tokens = input_ids if input_ids is not None else inputs_embeds
        shape = tokens.shape[:2]
        if seq_idx is not None:
            if cache is not None:
                raise ValueError("Packed samples (seq_idx) are for training; give a padded batch where there is a cache.")
            if attention_mask is None:
                attention_mask = torch.ones(shape, dtype=torch.long, device=tokens.device)
            for name, value in (("seq_idx", seq_idx), ("attention_mask", attention_mask)):
                if value.shape != shape:
                    raise ValueError(f"{name} {tuple(value.shape)} must have the shape of the tokens, {tuple(shape)}.")
            position_ids, sample = None, number_samples(seq_idx)
        if pixel_values is None and (granularity is not None or visual_tokens is not None):  # nothing to choose from: check
            self._choices(granularity, visual_tokens, count_samples(tokens, sample), tokens.device)
        if pixel_values is not None or images is not None:
            image_mask = self._image_mask(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and (batch := kwargs.get("forward_batch")) is not None:
            # SGLang: one row of several requests, in which nothing can be hidden; the default level, as the processor counted.
            shown = torch.tensor([request is not None for request in batch.mm_inputs], device=image_mask.device)
            image_mask = image_mask & shown.repeat_interleave(batch.extend_seq_lens)  # without placeholders that were typed
            images = self.get_image_features(pixel_values, return_dict=True)
            if images.slot_mask is not None:
                filled = zip(images.pooler_output, images.slot_mask.bool(), strict=True)
                images = GranulonImageFeatures(pooler_output=[slots[mask] for slots, mask in filled])
        elif pixel_values is not None:
            tower = dict(
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                clusters=clusters,
            )
            images = self.encode_images(
                pixel_values,
                inputs_embeds,
                image_mask,
                attention_mask,
                question_mask,
                granularity,
                visual_tokens,
                price,
                sample,
                **tower,
            )
        if images is not None:
            hidden = self.find_empty_slots(images, image_mask, visual_stream)
            slots = torch.cat(list(images.pooler_output))
            inputs_embeds = inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), slots.to(inputs_embeds))
            if hidden is not None:
                if attention_mask is None:
                    past_length = cache.get_seq_length() if cache is not None else 0
                    attention_mask = hidden.new_ones(len(hidden), past_length + hidden.shape[1], dtype=torch.long)
                elif not torch.is_tensor(attention_mask) or attention_mask.ndim != 2:
                    raise ValueError("Images need a 2D attention_mask: slots that a level leaves empty are hidden in it.")
                attention_mask, position_ids = hide(hidden, attention_mask, position_ids)

        if sample is not None:
            outputs = self._decode_packed(inputs_embeds, attention_mask.bool(), sample, **kwargs)
        else:
            if self.config.granularity_levels and position_ids is None and getattr(attention_mask, "ndim", 0) == 2:
                # Hidden slots of earlier steps are known by the mask alone.
                position_ids = visible_positions(attention_mask)[:, -inputs_embeds.shape[1] :]
            kwargs[CACHE] = cache
            outputs = self.language_model(
                attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
            )
        seen = {} if images is None else images
        return GranulonModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=images,
            attention_mask=attention_mask if seen.get("slot_mask") is not None else None,
            **{CACHE: outputs.get(CACHE)},
            **{name: seen.get(name) for name in ("granularity_probs", "granularity", "aggregation")},
        )

    def _decode_packed(self, inputs_embeds, visible, sample, **kwargs):
        """Run the decoder on the visible tokens of all samples in one row; its states come back [B x L x E], zeros elsewhere.

        transformers keeps the samples apart where position ids start again (every attention implementation), given that
        there is neither a mask nor a cache. Flash attention and `granulon_packed` are told where they start.
        """
        sample = sample[visible]
        counts = sample.bincount()
        starts = nn.functional.pad(counts.cumsum(0), (1, 0))
        # Those of a caller are counted with the slots that are removed here.
        lengths = {f"cu_seq_lens_{part}": starts.int() for part in "qk"}
        lengths |= dict.fromkeys(("max_length_q", "max_length_k"), int(counts.max()))
        # Transformers makes no mask where there is one, which would have all pairs of a row.
        own = self.language_model.config._attn_implementation == PACKED_ATTENTION
        outputs = self.language_model(
            attention_mask=visible.new_ones(1, 1, 1, 1) if own else None,
            position_ids=(torch.arange(len(sample), device=sample.device) - starts[sample]).unsqueeze(0),
            inputs_embeds=inputs_embeds[visible].unsqueeze(0),
            **{**kwargs, **lengths, "use_cache": False},
        )

        def spread(states):
            return states.new_zeros(*visible.shape, states.shape[-1]).masked_scatter(visible.unsqueeze(-1), states)

        outputs.last_hidden_state = spread(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(spread(states) for states in outputs.hidden_states)
        return outputs


MODEL_ARGUMENTS = tuple(inspect.signature(GranulonModel.forward).parameters)[1:-1]  # without `self` and `kwargs`


def also_named(outer):
    """Let `help` and `inspect.signature` name the arguments that a function hands on to [`GranulonModel.forward`]."""
    signature, inner = inspect.signature(outer), inspect.signature(GranulonModel.forward).parameters
    *own, rest = signature.parameters.values()
    further = [inner[name].replace(kind=rest.KEYWORD_ONLY) for name in MODEL_ARGUMENTS if name not in signature.parameters]
    outer.__signature__ = signature.replace(parameters=[*own, *further, rest])
    return outer


class GranulonForConditionalGeneration(GranulonPreTrainedModel, GenerationMixin):
    """Granulon with a language-modeling head: answers questions about images at the granularity that they need.

    Example:

    ```python
    >>> from granulon_hf import variants

    >>> model, processor = variants.build("granulon-qwen2.5", tiny=True)
    >>> model.config.level_names
    ['coarse', 'middle', 'fine']
    ```"""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # The same modules by their names here: quantizers compare whole names.
    _keep_in_fp32_modules = [f"model.{name}" for name in GranulonModel._keep_in_fp32_modules]

    def __init__(self, config: GranulonConfig):
        if CACHE != "cache":
            raise ImportError(
                "Granulon needs transformers 5.24 or later outside vLLM; run: pip install -U 'transformers>=5.24'"
            )
        super().__init__(config)
        self.model = GranulonModel(config)
        self._keep_in_fp32_modules = [f"model.{name}" for name in self.model._keep_in_fp32_modules]
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        *,
        dtype: str | torch.dtype = "auto",
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        **config,
    ) -> "GranulonForConditionalGeneration":
        """Assemble a model from two pretrained backbones and a fresh projector and controller.

        Every backbone weight is read once and never held twice.

        Args:
            vision (`str`): Hub id or folder of a vision tower with patch features (of CLIP-like pairs the vision half).
            text (`str`): Hub id or folder of a decoder.
            dtype (`str` or `torch.dtype`, defaults to `"auto"`): of both backbones; `"auto"` is the text checkpoint's own.
            vision_kwargs, text_kwargs (`dict`, *optional*): passed to `from_pretrained` of the backbone (`revision`,
                `token`, `cache_dir`, `gguf_file` …).
            **config: fields of [`GranulonConfig`]. `image_token_id` is found in the tokenizer of `text` unless given.

        Raises:
            ValueError: the vision tower has no patch features, a checkpoint lacks weights, or no spare token can stand for an
                image.
        """
        vision_kwargs, text_kwargs = dict(vision_kwargs or {}), dict(text_kwargs or {})
        vision_config = AutoConfig.from_pretrained(vision, **vision_kwargs)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        grid = probe_vision_tower(vision_config)  # refused before gigabytes are read
        if "image_token_id" not in config:
            tokenizer = AutoTokenizer.from_pretrained(text, **text_kwargs)
            config["image_token_id"] = tokenizer.convert_tokens_to_ids(find_image_token(tokenizer))

        language = load_whole(AutoModelForCausalLM.from_pretrained, text, dtype=dtype, **text_kwargs)
        tower = load_whole(AutoModel.from_pretrained, vision, config=vision_config, dtype=language.dtype, **vision_kwargs)
        config.setdefault("image_seq_length", grid.height * grid.width)
        backbones = {"vision": name_backbone(vision, vision_kwargs), "text": name_backbone(text, text_kwargs)}
        config.setdefault("backbones", backbones if all(backbones.values()) else None)
        config = GranulonConfig(vision_config=tower.config, text_config=language.config, dtype=language.dtype, **config)
        return cls.from_backbones(config, tower, language)

    @classmethod
    def from_backbones(cls, config: GranulonConfig, vision_tower: PreTrainedModel, language_model: PreTrainedModel):
        """Put two loaded backbones into a model without copying them; projector and controller are initialized.

        Raises:
            ValueError: the language model does something to its logits or embeddings that would be lost.
        """
        head = language_model.get_output_embeddings()
        altered = [
            name
            for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "embedding_multiplier")
            if getattr(language_model.config, name, None) not in (None, 1)
        ] + (["lm_head.bias"] if getattr(head, "bias", None) is not None else [])
        if not hasattr(language_model.get_decoder(), "layers") or altered:
            reason = f"does more than a linear head without bias ({', '.join(altered)})" if altered else "has no layers"
            raise ValueError(f"{type(language_model).__name__} cannot be used: it {reason}, which Granulon would leave out.")
        # Built twice on purpose: the modules on "meta" are only a frame and hold no memory.
        with torch.device("meta"):
            model = cls(config)
        model.model.vision_tower = vision_tower
        model.model.language_model = language_model.get_decoder()
        model.lm_head = head
        if config.granularity_levels:
            model.model._attach_backbones()
        for name, module in model.model.named_children():
            if name in ("multi_modal_projector", "controller", "reducer"):
                module.to_empty(device=language_model.device).to(language_model.dtype)
                module.apply(model._init_weights)
        model.generation_config = copy.deepcopy(language_model.generation_config)
        model.generation_config._from_model_config = False
        model.tie_weights()
        return model.eval()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> GranulonImageFeatures:
        """See [`GranulonModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        granularity: Granularity = None,
        visual_tokens: Budget = None,
        price: float | None = None,
        **kwargs,
    ) -> GranulonImageFeatures:
        """Let the question choose the level and encode the images, once for all that follows.

        `generate` and `forward` take the result as `mm_encoder_outputs={"image": …}` instead of `pixel_values`.

        Args: those of [`GranulonModel.forward`].
        """
        embeds, image_mask = self.get_input_embeddings()(input_ids), self.model._image_mask(input_ids, None)
        return self.model.encode_images(
            pixel_values, embeds, image_mask, attention_mask, question_mask, granularity, visual_tokens, price, **kwargs
        )

    def aggregate(self, *args, **kwargs) -> GranulonAggregation:
        """See [`GranulonModel.aggregate`]."""
        return self.model.aggregate(*args, **kwargs)

    def get_granularity_probs(self, *args, **kwargs) -> torch.Tensor:
        """See [`GranulonModel.get_granularity_probs`]."""
        return self.model.get_granularity_probs(*args, **kwargs)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @also_named
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs,
    ) -> GranulonCausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor`, *optional*): answer tokens, -100 elsewhere, shape [B x L]. With `pixel_loss_weight` or
                `semantic_loss_weight` in the config, the loss also holds that of the other stream hidden.
            logits_to_keep (`int` or `torch.Tensor`): logits of the last tokens only, or of these positions.
            skip_logits (`bool`): with `labels`, compute logits at labelled positions only and return the loss alone: the same
                loss, without the vocabulary-sized rest. For training.

        The other arguments are those of [`GranulonModel.forward`].
        """
        inputs = {name: kwargs.pop(name, None) for name in MODEL_ARGUMENTS}
        inputs |= {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
        if labels is not None and inputs["question_mask"] is None and self.config.granularity_levels:
            inputs["question_mask"] = labels == -100  # the answer must never choose its own level
        if labels is not None and inputs["seq_idx"] is not None:
            labels = labels.masked_fill(sample_starts(inputs["seq_idx"]), -100)  # no sample predicts the next one's first token
        outputs = self.model(**inputs, **kwargs)
        kept = None if labels is not None and skip_logits else logits_to_keep
        logits, loss = self._logits_and_loss(outputs.last_hidden_state, labels, kept, **kwargs)
        both_shown = inputs["visual_stream"] is None and inputs["cache"] is None
        if labels is not None and outputs.aggregation is not None and both_shown:
            loss = loss + self._stream_losses(outputs, inputs, labels, kept, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return GranulonCausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def _logits_and_loss(self, states, labels, logits_to_keep, **kwargs):
        """Return logits of the states and their loss, each None where it is not asked for (no `logits_to_keep`: no logits)."""
        if logits_to_keep is None:
            return None, self._labelled_loss(states, labels, **kwargs)
        logits = self.lm_head(slice_logits_to_keep(states, logits_to_keep))
        return logits, None if labels is None else self._loss(logits, labels, **kwargs)

    def _loss(self, logits, labels, **kwargs):
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs)

    def _stream_losses(self, outputs, inputs, labels, logits_to_keep, **kwargs):
        """λ_pixel · L_pixel + λ_semantic · L_semantic, on the slots of the main pass (ours: the paper gives no procedure)."""
        total, inputs = 0.0, inputs | {"pixel_values": None, "mm_encoder_outputs": {"image": outputs.image_outputs}}
        for stream, weight in (("pixel", self.config.pixel_loss_weight), ("semantic", self.config.semantic_loss_weight)):
            if weight:
                states = self.model(**inputs | {"visual_stream": stream}, **kwargs).last_hidden_state
                total = total + weight * self._logits_and_loss(states, labels, logits_to_keep, **kwargs)[1]
        return total

    def _labelled_loss(self, hidden_states, labels, **kwargs):
        """Return the same loss from the states [B x L x E] whose next token carries a label."""
        labelled = nn.functional.pad(labels[:, 1:] != -100, (0, 1), value=False)
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)[labelled]
        if kwargs.get("num_items_in_batch") is None:  # the mean, and 0 where there is no label at all
            kwargs["num_items_in_batch"] = labelled.sum().clamp(min=1)

        def loss_of(states, targets):
            return self._loss(self.lm_head(states), None, shift_labels=targets, **kwargs)

        states = hidden_states[labelled]
        if torch.compiler.is_compiling() or len(states) <= LOSS_CHUNK:
            return loss_of(states, shifted)
        # Logits of a large batch would need more memory than the decoder: they are made again in the backward pass (ours).
        chunks = zip(states.split(LOSS_CHUNK), shifted.split(LOSS_CHUNK), strict=True)
        return sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks)

    # --- generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, **kwargs):
        """Generate as in transformers; further arguments are those of [`GranulonModel.forward`].

        In the compact form, slots that stay empty are taken out of the prompt before the language model sees it, so that a
        small budget is a short prompt (ours). They stay where someone else sees the prompt or counts its tokens: a cache that
        goes in or comes out, the caller's own criteria, processors and streamers, and lengths other than `max_new_tokens`.
        """
        if hasattr(kwargs.get("tokenizer"), "tokenizer"):  # a processor, which `transformers serve` gives for stop strings
            kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if not self._shortens(prompt, generation_config or self.generation_config, kwargs):
            return super().generate(inputs, generation_config, **kwargs)
        mask, images = kwargs["attention_mask"], (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if images is None:
            choices = ("question_mask", "granularity", "visual_tokens", "price")
            tower = ("vision_feature_layer", "vision_feature_select_strategy")
            chosen = {name: kwargs.pop(name, None) for name in (*choices, *tower)}
            images = self.encode_images(kwargs.pop("pixel_values"), prompt, mask, **chosen)
        kwargs.pop("input_ids", None)
        pad = (generation_config or self.generation_config).pad_token_id
        short, mask, images = self._drop_empty_slots(prompt, mask, images, pad)
        kwargs |= {"attention_mask": mask, "mm_encoder_outputs": {"image": images}}
        found = super().generate(short, generation_config, **kwargs)
        prompts = prompt.repeat_interleave(len(found) // len(prompt), dim=0)
        return torch.cat([prompts, found[:, short.shape[1] :]], dim=1)

    def _shortens(self, prompt, config, options) -> bool:
        """Say whether [`generate`] may take empty slots out of a prompt without anyone's notice."""
        if not self.config.compact or prompt is None or getattr(options.get("attention_mask"), "shape", None) != prompt.shape:
            return False
        images = (options.get("mm_encoder_outputs") or {}).get("image")
        given = options.get("pixel_values") is not None
        if given is (images is not None) or (images is not None and images.get("slot_mask") is None):
            return False
        asked = {name: options.get(name, getattr(config, name, None)) for name in GENERATION_LENGTHS}
        if not asked.pop("max_new_tokens") or any(asked.values()):
            return False
        if options.get("streamer") is not None and not getattr(options["streamer"], "skip_prompt", False):
            return False
        read = ("input_ids", "attention_mask", "question_mask")
        seen = (value for name, value in options.items() if torch.is_tensor(value) and name not in read)
        alone = all(options.get(name) is None for name in SEE_PROMPT)
        return alone and all(value.shape[:2] != prompt.shape for value in seen)

    def _drop_empty_slots(self, input_ids, attention_mask, images, pad_token_id):
        """Return prompts without the slots that stay empty, padded on the left, their mask, and the images of what is left."""
        image_mask = self.model._image_mask(input_ids, None)
        empty = self.model.find_empty_slots(images, image_mask)
        seen = attention_mask.bool() & ~empty
        kept = seen.long().argsort(dim=1, stable=True)[:, seen.shape[1] - int(seen.sum(1).max()) :]
        mask = seen.gather(1, kept)
        ids = input_ids.gather(1, kept).masked_fill(~mask, pad_token_id or 0)
        slots = [slots[filled] for slots, filled in zip(images.pooler_output, images.slot_mask.bool(), strict=True)]
        return ids, mask.long(), BaseModelOutputWithPooling(pooler_output=slots)

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, model_input_name, *args, **kwargs):
        """Choose the level and encode the images once, before prefill, and hide their empty slots for the whole generation.

        What follows (expansion for beams, static 4D masks, decoding steps) then sees an ordinary padded prompt. Where a cache
        goes on, what it hides stays hidden, and only images of the new part are expected.
        """
        names = ("question_mask", "granularity", "visual_tokens", "price")
        question_mask, granularity, visual_tokens, price = (model_kwargs.pop(name, None) for name in names)
        # Also where there is nothing to choose: a misspelt level is an error.
        self.model._choices(granularity, visual_tokens, inputs_tensor.shape[0], inputs_tensor.device)
        self.model._price_index(price)
        if not self.config.granularity_levels:
            return super()._maybe_prepare_encoder_kwargs_for_generation(
                inputs_tensor, model_kwargs, model_input_name, *args, **kwargs
            )
        pixel_values, stream = (model_kwargs.pop(name, None) for name in ("pixel_values", "visual_stream"))
        names = ("vision_feature_layer", "vision_feature_select_strategy")
        tower = {name: model_kwargs.pop(name, None) for name in names}
        cache = model_kwargs.get("cache")
        past = int(cache.get_seq_length()) if cache is not None else 0
        length = inputs_tensor.shape[1]
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is None:
            attention_mask = torch.ones(inputs_tensor.shape[0], length, dtype=torch.long, device=inputs_tensor.device)
        hidden = torch.zeros_like(attention_mask, dtype=torch.bool)
        earlier = getattr(cache, "hidden_slots", None)
        if past and earlier is not None:
            hidden[:, : earlier.shape[1]] = earlier
        images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if pixel_values is not None and images is not None:
            raise ValueError("You cannot pass both: raw pixels and pre-computed embeddings for input image")
        # Images without a slot mask are what this method has made before: what is empty is hidden already.
        if pixel_values is not None or (images is not None and images.get("slot_mask") is not None):
            given = model_input_name == "inputs_embeds"
            inputs_embeds = inputs_tensor if given else self.get_input_embeddings()(inputs_tensor)
            image_mask = self.model._image_mask(None if given else inputs_tensor, inputs_embeds)
            if question_mask is not None:
                question_mask = nn.functional.pad(question_mask, (length - question_mask.shape[1], 0))
            if attention_mask.shape[1] == length:  # the whole conversation was given: its first part is in the cache
                question_mask = ~image_mask if question_mask is None else question_mask  # earlier slots are no words
                image_mask = image_mask & (torch.arange(length, device=image_mask.device) >= past)
            if images is None:
                images = self.model.encode_images(
                    pixel_values,
                    inputs_embeds,
                    image_mask,
                    attention_mask,
                    question_mask,
                    granularity,
                    visual_tokens,
                    price,
                    **tower,
                )
            empty = self.model.find_empty_slots(images, image_mask, stream)
            if empty is not None:
                hidden[:, -length:] |= empty
            # Without what is empty: it is hidden from here on.
            model_kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=images.pooler_output)}
        if hidden.any():
            model_kwargs["attention_mask"], model_kwargs["position_ids"] = hide(
                hidden, attention_mask, model_kwargs.get("position_ids")
            )
            model_kwargs["hidden_slots"] = hidden
        return model_kwargs

    def _get_candidate_generator(self, *args, **kwargs):
        """Drafts (of speculative decoding, or looked up in the prompt) have no image slots: they would lack an image."""
        bar = SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device)
        kwargs["logits_processor"] = LogitsProcessorList([*kwargs["logits_processor"], bar])
        return super()._get_candidate_generator(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """The cache remembers which of its entries are hidden, for whoever goes on with it."""
        hidden = model_kwargs.pop("hidden_slots", None)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if hidden is not None and isinstance(model_kwargs.get("cache"), Cache):
            model_kwargs["cache"].hidden_slots = hidden


def hide(
    hidden: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask the `hidden` tokens [B x L] from attention, and skip them in the position ids, as if they were not there.

    The mask is [B x past + L]; position ids [B x L'] are those of the last L' tokens, counted with the hidden ones, and [B x L]
    where none are given.
    """
    length = (hidden if position_ids is None else position_ids).shape[1]
    hidden = nn.functional.pad(hidden, (attention_mask.shape[1] - hidden.shape[1], 0))
    attention_mask = attention_mask * (~hidden).to(attention_mask)
    if position_ids is None:
        return attention_mask, visible_positions(attention_mask)[:, -length:]
    return attention_mask, (position_ids - hidden.long().cumsum(-1)[:, -length:]).clamp(min=0)


def visible_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token among those that the mask lets be seen, shape [B x L]."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def sample_starts(seq_idx: torch.Tensor) -> torch.Tensor:
    """Return true on the first token of each packed sample: where `seq_idx` changes, and where a row begins."""
    return nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)


def number_samples(seq_idx: torch.Tensor) -> torch.Tensor:
    """Number the packed samples of all rows 0, 1, 2 … Shape [B x L]."""
    return (sample_starts(seq_idx).flatten().cumsum(0) - 1).view(seq_idx.shape)


def count_samples(tokens: torch.Tensor, sample: torch.Tensor | None) -> int:
    """Count the samples of a batch: its rows, or where they are packed those that [`number_samples`] has numbered."""
    return tokens.shape[0] if sample is None else int(sample[-1, -1]) + 1


__all__ = ["GranulonForConditionalGeneration", "GranulonModel", "GranulonPreTrainedModel"]
