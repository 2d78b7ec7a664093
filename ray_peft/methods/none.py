"""No fine-tuning: the untouched base, evaluated as the reference row."""

from typing import ClassVar, Literal

from ray_peft.methods.base import Method, Stage, Task


class Untouched(Method):
    """Evaluate the base as it is."""

    name: Literal["none"] = "none"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft", "text_to_image"})

    def stages(self, steps: int) -> list[tuple[Stage, int]]:
        """No stages: nothing is trained."""
        return []
