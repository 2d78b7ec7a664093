"""The registry of tasks: one folder each, one entry here."""

from typing import Any

from ray_peft.methods.base import Task
from ray_peft.tasks.base import TaskType
from ray_peft.tasks.llm_sft.task import LlmSft
from ray_peft.tasks.text_to_image.task import TextToImage

TASKS: dict[Task, TaskType[Any]] = {"llm_sft": LlmSft(), "text_to_image": TextToImage()}
