"""transformers' common model tests on Granulon, with the tester that transformers' own LLaVA tests use."""

import unittest

import pytest
import torch

from granulon_hf import GranulonConfig, GranulonForConditionalGeneration, GranulonModel
from tests import transformers_suite

common = transformers_suite.load("test_modeling_common")
if common is None:
    pytest.skip("run `python -m tests.transformers_suite` once (make test does)", allow_module_level=True)

# The common tests tell a base model from one with a loss by transformers' own tables of class names.
common.MODEL_MAPPING_NAMES["granulon"] = "GranulonModel"
common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["granulon"] = "GranulonForConditionalGeneration"

VISION = {
    "model_type": "clip_vision_model",
    "image_size": 8,
    "patch_size": 2,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "pad_token_id": 1,
}
LEVELS = [{"name": "coarse", "alpha": 2, "beta": 3, "gamma": 1.0}, {"name": "fine", "alpha": 1, "beta": 6, "gamma": 0.5}]


class ModelTester:
    """Makes configs and inputs, in the form that the common tests ask for."""

    def __init__(self, parent, **options):
        self.parent, self.options = parent, options
        self.is_training, self.batch_size = True, 3
        self.pixel_tokens = (VISION["image_size"] // VISION["patch_size"]) ** 2
        self.slots = self.pixel_tokens + options["num_semantic_tokens"]
        self.seq_length = self.encoder_seq_length = 7 + self.slots
        self.num_hidden_layers, self.hidden_size = TEXT["num_hidden_layers"], TEXT["hidden_size"]
        self.num_attention_heads, self.vocab_size = TEXT["num_attention_heads"], TEXT["vocab_size"]

    def get_config(self):
        return GranulonConfig(
            vision_config=dict(VISION), text_config=dict(TEXT), vision_feature_layer=-1, image_token_id=0, **self.options
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        pixel_values = common.floats_tensor([self.batch_size, 3, VISION["image_size"], VISION["image_size"]])
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2) + 2
        input_ids[:, : self.slots] = config.image_token_id
        attention_mask = torch.ones_like(input_ids)
        return config, {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}

    def prepare_config_and_inputs(self):
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, inputs["pixel_values"]


@pytest.mark.filterwarnings("always::FutureWarning")  # one of them asks for it
class GranulonCommonTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (GranulonModel, GranulonForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = ModelTester(self, granularity_levels=LEVELS, num_semantic_tokens=5)

    @unittest.skip("CLIP's last layer norm is not part of its patch features; transformers skips these three for LLaVA too.")
    def test_training_gradient_checkpointing(self):
        pass

    @unittest.skip("See test_training_gradient_checkpointing.")
    def test_training_gradient_checkpointing_use_reentrant_false(self):
        pass

    @unittest.skip("See test_training_gradient_checkpointing.")
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        pass
