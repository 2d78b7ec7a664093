"""Every task's trial, told apart by `task`; a trial that names none is `llm_sft`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag

from ray_peft.errors import SpecError
from ray_peft.methods.base import Task
from ray_peft.spec.base import TrialSpec
from ray_peft.spec.llm_sft import LlmTrialSpec
from ray_peft.spec.text_to_image import ImageTrialSpec

SPECS: dict[Task, type[TrialSpec]] = {"llm_sft": LlmTrialSpec, "text_to_image": ImageTrialSpec}


def task_of(plain: Any) -> Any:
    """The task that a trial or its plain data names."""
    return plain.get("task", "llm_sft") if isinstance(plain, dict) else getattr(plain, "task", "llm_sft")


def spec_type(plain: object) -> type[TrialSpec]:
    """The class of the trial that plain data describes.

    Raises:
        SpecError: no such task.
    """
    task = task_of(plain)
    if task not in SPECS:
        raise SpecError(f"task: must be one of {', '.join(SPECS)} (found {task!r})")
    return SPECS[task]


if TYPE_CHECKING:
    AnyTrialSpec = TrialSpec
else:
    AnyTrialSpec = Annotated[
        Annotated[LlmTrialSpec, Tag("llm_sft")] | Annotated[ImageTrialSpec, Tag("text_to_image")],
        Discriminator(task_of),
    ]
