"""Granulon for Hugging Face: ask which granularity of visual tokens helps a multimodal language model.

Importing the package registers the model family with transformers' Auto classes.
"""

from importlib.metadata import PackageNotFoundError, version

import transformers
from packaging.version import Version

MINIMUM_TRANSFORMERS = "5.24.0"
if Version(transformers.__version__) < Version(MINIMUM_TRANSFORMERS):
    raise ImportError(
        f"granulon_hf needs transformers >= {MINIMUM_TRANSFORMERS} and found {transformers.__version__}: "
        f"pip install -U 'transformers>={MINIMUM_TRANSFORMERS}'"
    )

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from granulon_hf.modeling.configuration_granulon import GranulonConfig  # noqa: E402
from granulon_hf.modeling.modeling_granulon import (  # noqa: E402
    GranulonForConditionalGeneration,
    GranulonModel,
    GranulonPreTrainedModel,
)
from granulon_hf.modeling.processing_granulon import GranulonProcessor  # noqa: E402

AutoConfig.register(GranulonConfig.model_type, GranulonConfig)
AutoModel.register(GranulonConfig, GranulonModel)
AutoModelForImageTextToText.register(GranulonConfig, GranulonForConditionalGeneration)
AutoModelForMultimodalLM.register(GranulonConfig, GranulonForConditionalGeneration)
AutoProcessor.register(GranulonConfig, GranulonProcessor)

# transformers 5 dropped this name; it is the same Auto class.
AutoModelForVision2Seq = AutoModelForImageTextToText

try:
    __version__ = version("granulon-hf")
except PackageNotFoundError:  # an uninstalled checkout
    __version__ = "0.0.0"

__all__ = [
    "AutoModelForVision2Seq",
    "GranulonConfig",
    "GranulonForConditionalGeneration",
    "GranulonModel",
    "GranulonPreTrainedModel",
    "GranulonProcessor",
]
