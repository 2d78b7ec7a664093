"""The registry of methods: one file each, one entry here."""

from typing import Annotated, get_args

from pydantic import Field

from ray_peft.methods.base import Method
from ray_peft.methods.full import FullFineTuning
from ray_peft.methods.galore import GaLore
from ray_peft.methods.lora import LoRA
from ray_peft.methods.none import Untouched
from ray_peft.methods.qlora import QLoRA
from ray_peft.methods.qlora_galore import QLoRAThenGaLore

AnyMethod = Annotated[Untouched | FullFineTuning | LoRA | QLoRA | GaLore | QLoRAThenGaLore, Field(discriminator="name")]

METHODS: tuple[type[Method], ...] = get_args(get_args(AnyMethod)[0])
"""Every registered method, in the order in which reports list them."""
