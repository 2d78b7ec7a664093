"""The registry of methods that make one model: one file each, one entry here."""

from typing import TypeAlias

from ray_peft.methods.adapters.adalora import AdaLoRA
from ray_peft.methods.adapters.boft import BOFT
from ray_peft.methods.adapters.dora import DoRA
from ray_peft.methods.adapters.fourierft import FourierFT
from ray_peft.methods.adapters.gralora import GraLoRA
from ray_peft.methods.adapters.hira import HiRA
from ray_peft.methods.adapters.hra import HRA
from ray_peft.methods.adapters.ia3 import IA3
from ray_peft.methods.adapters.ln_tuning import LNTuning
from ray_peft.methods.adapters.loftq import LoftQ
from ray_peft.methods.adapters.lora_fa import LoRAFA
from ray_peft.methods.adapters.lora_plus import LoRAPlus
from ray_peft.methods.adapters.miss import MiSS
from ray_peft.methods.adapters.oft import OFT
from ray_peft.methods.adapters.olora import OLoRA
from ray_peft.methods.adapters.peft_config import AnyAdapter
from ray_peft.methods.adapters.pissa import PiSSA
from ray_peft.methods.adapters.prefix_tuning import PrefixTuning
from ray_peft.methods.adapters.prompt_tuning import PromptTuning
from ray_peft.methods.adapters.randlora import RandLoRA
from ray_peft.methods.adapters.rslora import RsLoRA
from ray_peft.methods.adapters.shira import SHiRA
from ray_peft.methods.adapters.vera import VeRA
from ray_peft.methods.apollo import APOLLO, APOLLOMini
from ray_peft.methods.badam import BAdam
from ray_peft.methods.fira import Fira
from ray_peft.methods.full import FullFineTuning
from ray_peft.methods.galore import GaLore
from ray_peft.methods.lisa import LISA
from ray_peft.methods.lora import LoRA
from ray_peft.methods.muon import Muon
from ray_peft.methods.none import Untouched
from ray_peft.methods.qlora import QLoRA
from ray_peft.methods.qlora_galore import QLoRAThenGaLore

SingleMethod: TypeAlias = (
    Untouched
    | FullFineTuning
    | LoRA
    | QLoRA
    | GaLore
    | QLoRAThenGaLore
    | Fira
    | APOLLO
    | APOLLOMini
    | Muon
    | LISA
    | BAdam
    | DoRA
    | RsLoRA
    | PiSSA
    | OLoRA
    | LoftQ
    | LoRAPlus
    | LoRAFA
    | AdaLoRA
    | VeRA
    | IA3
    | OFT
    | BOFT
    | HRA
    | MiSS
    | SHiRA
    | HiRA
    | GraLoRA
    | RandLoRA
    | FourierFT
    | LNTuning
    | PromptTuning
    | PrefixTuning
    | AnyAdapter
)
"""In the order in which reports list them."""
