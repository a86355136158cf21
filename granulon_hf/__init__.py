"""Granulon for Hugging Face: ask which granularity of visual tokens helps a multimodal language model.

Importing the package is enough for transformers' Auto classes to know the model family. Neither transformers nor torch is
imported for that: the names below are looked up when they are used, and the classes are registered once the Auto classes exist.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import AutoModelForImageTextToText as AutoModelForVision2Seq

    from granulon_hf.modeling.configuration_granulon import GranulonConfig
    from granulon_hf.modeling.modeling_granulon import GranulonForConditionalGeneration, GranulonModel, GranulonPreTrainedModel
    from granulon_hf.modeling.processing_granulon import GranulonProcessor

    __version__: str

__all__ = [
    "AutoModelForVision2Seq",
    "GranulonConfig",
    "GranulonForConditionalGeneration",
    "GranulonModel",
    "GranulonPreTrainedModel",
    "GranulonProcessor",
]

MINIMUM_TRANSFORMERS = "5.24.0"
_AUTO = "transformers.models.auto"
_HOMES = {
    "GranulonConfig": "granulon_hf.modeling.configuration_granulon",
    "GranulonForConditionalGeneration": "granulon_hf.modeling.modeling_granulon",
    "GranulonModel": "granulon_hf.modeling.modeling_granulon",
    "GranulonPreTrainedModel": "granulon_hf.modeling.modeling_granulon",
    "GranulonProcessor": "granulon_hf.modeling.processing_granulon",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("granulon-hf")
        except PackageNotFoundError:  # an uninstalled checkout
            return "0.0.0"
    if name == "AutoModelForVision2Seq":
        # transformers 5 dropped this name; it is the same Auto class.
        return import_module("transformers").AutoModelForImageTextToText
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "modeling":
        return import_module("granulon_hf.modeling")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _check_version() -> None:
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(MINIMUM_TRANSFORMERS):
        raise ImportError(
            f"granulon_hf needs transformers >= {MINIMUM_TRANSFORMERS} and found {transformers.__version__}: "
            f"pip install -U 'transformers>={MINIMUM_TRANSFORMERS}'"
        )


def _register() -> None:
    """Make the model family known to transformers' Auto classes."""
    import transformers

    _check_version()
    classes = {name: getattr(import_module(home), name) for name, home in _HOMES.items()}
    config, model = classes["GranulonConfig"], classes["GranulonForConditionalGeneration"]
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModel.register(config, classes["GranulonModel"], exist_ok=True)
    transformers.AutoModelForImageTextToText.register(config, model, exist_ok=True)
    transformers.AutoModelForMultimodalLM.register(config, model, exist_ok=True)
    transformers.AutoProcessor.register(config, classes["GranulonProcessor"], exist_ok=True)


class _RegisterWithAuto:
    """An import hook that registers the model family as soon as somebody has imported the Auto classes.

    transformers knows no plug-ins, and importing it here would cost every `granulon --help` seconds. Ours is registered when no
    module of transformers is half imported any more: what is registered needs most of them.
    """

    depth = 0

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith("transformers.") else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                cls.depth += 1
                try:
                    execute(module)
                finally:
                    cls.depth -= 1
                if cls.depth == 0 and _AUTO in sys.modules and cls in sys.meta_path:
                    sys.meta_path.remove(cls)
                    _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    _check_version()
if _AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithAuto)
