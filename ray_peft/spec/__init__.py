"""What one trial is: one cell of the grid method x model x data x hyperparameters. Imports neither torch nor Ray."""

from ray_peft.spec.base import ModelSpec, ResourcesSpec, TrainSpec, TrialSpec, is_local
from ray_peft.spec.llm_sft import (
    BenchmarksSpec,
    ContaminationSpec,
    DataSpec,
    EvaluationSpec,
    LlmTrainSpec,
    LlmTrialSpec,
    Recipe,
    SourceSpec,
)
from ray_peft.spec.preference import PreferenceSpec
from ray_peft.spec.text_to_image import (
    ImageDataSpec,
    ImageEvaluationSpec,
    ImageTrainSpec,
    ImageTrialSpec,
)
from ray_peft.spec.union import AnyTrialSpec

__all__ = [
    "AnyTrialSpec",
    "BenchmarksSpec",
    "ContaminationSpec",
    "DataSpec",
    "EvaluationSpec",
    "ImageDataSpec",
    "ImageEvaluationSpec",
    "ImageTrainSpec",
    "ImageTrialSpec",
    "LlmTrainSpec",
    "LlmTrialSpec",
    "ModelSpec",
    "PreferenceSpec",
    "Recipe",
    "ResourcesSpec",
    "SourceSpec",
    "TrainSpec",
    "TrialSpec",
    "is_local",
]
