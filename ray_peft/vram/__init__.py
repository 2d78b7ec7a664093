"""Peak bytes of a trial before it runs: its own code for one step on torch's meta device, where tensors have no data.

Neither weights nor GPU are needed. A first prediction takes seconds, since it runs the real model, method and optimizer
on shapes; it is then kept on disk for every trial that takes the same memory.
"""

from ray_peft.vram.nearest import Suggestion, choose, nearest, settings_text
from ray_peft.vram.parts import ATTACH, part_of
from ray_peft.vram.predict import Prediction, decides_memory
from ray_peft.vram.shape import ModelShape

__all__ = [
    "ATTACH", "ModelShape", "Prediction", "Suggestion", "choose", "decides_memory", "nearest", "part_of",
    "settings_text",
]  # fmt: skip
