"""The training recipe of the supplement as pieces of transformers' Trainer."""

from granulon_hf.errors import GranulonError
from granulon_hf.training.arguments import DataArguments, ModelArguments, RecipeArguments, parse
from granulon_hf.training.stages import STAGES, set_stage
from granulon_hf.training.trainer import GranulonTrainer, TrainingFailed, TrainingStopped

__all__ = [
    "STAGES",
    "DataArguments",
    "GranulonTrainer",
    "ModelArguments",
    "RecipeArguments",
    "GranulonError",
    "TrainingFailed",
    "TrainingStopped",
    "parse",
    "set_stage",
]
