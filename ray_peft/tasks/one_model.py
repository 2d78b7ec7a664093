"""What the benches of all tasks share that train one model: counting its weights, restoring and merging them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic

from ray_peft.engine import checkpoint
from ray_peft.methods.base import Stage
from ray_peft.methods.optimizers import trainable
from ray_peft.tasks.base import Bench, SpecT
from ray_peft.tasks.parameters import WeightStorage, computed_in, count_parameters, load_adapter

ADAPTER_CONFIG = "adapter_config.json"
"""In a folder that holds an adapter as PEFT writes it."""


class OneModelBench(Bench, Generic[SpecT]):
    """A trial's bench around one model, which is trained, scored and saved."""

    spec: SpecT
    device: str
    model: Any
    """With the attached stage, while one is attached."""
    weight_storage: WeightStorage
    """Of the model as it was loaded."""

    def parameters(self) -> tuple[int, int]:
        """Parameters that take gradients, and all parameters of the model."""
        return count_parameters(self.model)

    def dtypes(self) -> set[str]:
        """The dtypes of its weights and of its matrix products."""
        return computed_in(self.spec, self.model)

    def storage(self) -> dict[str, int]:
        """Bytes of the model as it was loaded, by how they are held."""
        return self.weight_storage.num_bytes

    def four_bit_share(self) -> float | None:
        """Share of the model's weights that are in 4 bits; None where it is not quantised."""
        return self.weight_storage.four_bit_share if self.spec.quantization is not None else None

    def restore(self, folder: Path) -> None:
        """Load a saved adapter into the attached one."""
        load_adapter(self.model, folder, self.device)

    def start_from(self, folder: Path) -> None:
        """Give the attached stage what another trial had trained."""
        if (folder / ADAPTER_CONFIG).is_file():
            self.restore(folder)
            return
        last = checkpoint.read_last(folder)
        if last is None:
            raise ValueError("it is not there, or not whole")
        checkpoint.put_back(trainable(self.model), last[1]["parameters"])

    def merge(self, stage: Stage) -> None:
        """Fold what the stage trained into plain weights."""
        self.model = stage.merge(self.model)
