"""Every task's trial, told apart by `task`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Discriminator, Tag

from ray_peft.spec.base import TrialSpec, task_of
from ray_peft.spec.llm_sft import LlmTrialSpec
from ray_peft.spec.text_to_image import ImageTrialSpec

if TYPE_CHECKING:
    AnyTrialSpec = TrialSpec
else:
    AnyTrialSpec = Annotated[
        Annotated[LlmTrialSpec, Tag("llm_sft")] | Annotated[ImageTrialSpec, Tag("text_to_image")],
        Discriminator(task_of),
    ]
