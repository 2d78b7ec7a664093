"""The registry of methods that make one model: one file each, one entry here."""

from typing import TypeAlias

from ray_peft.methods.full import FullFineTuning
from ray_peft.methods.galore import GaLore
from ray_peft.methods.lora import LoRA
from ray_peft.methods.none import Untouched
from ray_peft.methods.qlora import QLoRA
from ray_peft.methods.qlora_galore import QLoRAThenGaLore

SingleMethod: TypeAlias = Untouched | FullFineTuning | LoRA | QLoRA | GaLore | QLoRAThenGaLore
"""In the order in which reports list them."""
