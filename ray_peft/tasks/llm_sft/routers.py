"""A mixture of experts' `output_router_logits`: on for the balancing loss of training, off for all else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SETTING = "output_router_logits"


@contextlib.contextmanager
def setting_restored(model: PreTrainedModel) -> Iterator[None]:
    """Give the setting back as it was: TRL 1.16 switches it on for good, and a saved config.json would say so."""
    config: Any = model.config.get_text_config()
    before = getattr(config, _SETTING, None)
    try:
        yield
    finally:
        if before is not None:
            setattr(config, _SETTING, before)


@contextlib.contextmanager
def switched_off(model: PreTrainedModel) -> Iterator[None]:
    """Compute no balancing loss: in generation its mask and its logits differ in length, and it fails."""
    config: Any = model.config.get_text_config()
    with setting_restored(model):
        if getattr(config, _SETTING, None) is not None:
            setattr(config, _SETTING, False)
        yield
