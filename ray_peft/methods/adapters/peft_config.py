"""Any of PEFT's adapters, by the name and the fields of its config."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from ray_peft.errors import SpecError
from ray_peft.methods.adapter import Adapter, LayerAdapter
from ray_peft.methods.config_fields import check_fields
from ray_peft.methods.kinds import config_type, known

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


class AnyAdapter(LayerAdapter):
    """An adapter of PEFT's that has no method of its own here, or other fields of one that has."""

    name: Literal["peft"] = "peft"
    adapter: str
    """PEFT's name of it in any case, such as `lokr`; see PEFT's documentation for its paper."""
    config: dict[str, Any] = {}
    """Fields of its config in PEFT, such as `{r: 8}`; `targets` and `modules_to_save` stand beside it."""

    @field_validator("adapter")
    @classmethod
    def _check_adapter(cls, name: str) -> str:
        known(name)
        return name

    @property
    def peft_kind(self) -> str:
        """PEFT's name of the config."""
        return known(self.adapter)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """The fields as they are written."""
        return dict(self.config)

    def peft_config(self, model: nn.Module, *, of: str = "the model", key: str = "method") -> PeftConfig:
        """As that of every adapter; a kind without layers has no targets."""
        check_fields(self.peft_kind, self.config, key=f"{key}.config")
        if any(field.name == "target_modules" for field in dataclasses.fields(config_type(self.peft_kind))):
            return super().peft_config(model, of=of, key=key)
        if {"targets", "modules_to_save"} & self.model_fields_set:
            raise SpecError(f"{key}.targets: PEFT's adapter {self.adapter} changes no layers, so leave targets out")
        return Adapter.peft_config(self, model, of=of, key=key)
