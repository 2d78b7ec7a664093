"""The methods that are compared, and the learning rates that are tried for each: equally many around its default."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_peft.errors import SpecError
from ray_peft.foundation import dotted
from ray_peft.methods import METHODS
from ray_peft.methods.base import Method
from ray_peft.methods.projected_gradients import ProjectedGradients

USUAL = ("full", "lora", "qlora", "galore")
"""Compared unless others are named."""

FACTORS = {3: (1.0, 4.0, 16.0), 5: (0.1, 0.3, 1.0, 3.0, 10.0), 7: (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)}
"""By how many rates are tried: what a method's default rate is multiplied by, spread evenly in its logarithm. Three are
tried where there is time for few steps, which want higher rates than the defaults, made for whole epochs."""

FACTORS_OF_PAIRS = {**FACTORS, 3: FACTORS[5][::2]}
"""The same where preferences are learned, which take lower rates than answers do: those of the paper of DPO and of
TRL's DPOTrainer (1e-6) are a twentieth of the usual ones of full tuning."""

_KINDS: dict[str, type[Method]] = {
    kind.model_fields["name"].default: kind for kind in METHODS if "llm_sft" in kind.tasks
}


def _needs_nothing(kind: type[Method]) -> bool:
    """Whether a method needs neither settings nor a base in 4 bits, as `loftq` does."""
    if any(field.is_required() for field in kind.model_fields.values()):
        return False
    method = kind.from_plain({"name": kind.model_fields["name"].default})
    return all(stage.why_not_plain() is None for _, stage in method.parts())


COMPARED = [name for name, kind in _KINDS.items() if name not in ("none", "ensemble") and _needs_nothing(kind)]
"""Methods that need nothing but their name."""


@dataclass(frozen=True)
class Candidate:
    """A method, with the settings that it has in all its trials."""

    name: str
    settings: dict[str, Any]
    """Without its learning rates."""

    def at(self, factor: float) -> dict[str, Any]:
        """The method with its default rate times `factor`; of several stages, the rate of each."""
        plain = {"method": copy.deepcopy({"name": self.name, **self.settings})}
        for key, stage in _KINDS[self.name].from_plain(plain["method"]).parts():
            dotted.put(plain, f"{key}.lr", rounded(stage.lr * factor), add=True)
        return plain["method"]


def rounded(rate: float) -> float:
    """A rate of two digits."""
    return float(f"{rate:.2g}")


def check_names(names: Sequence[str]) -> None:
    """Refuse names of methods that cannot be compared.

    Raises:
        SpecError: no such method, or one is named twice.
    """
    for name in names:
        if name not in COMPARED:
            near = difflib.get_close_matches(name.lower(), COMPARED, n=1)
            raise SpecError(
                f"--methods: must be some of {', '.join(COMPARED)} (found {name!r})"
                f"{f'; did you mean {near[0]}?' if near else ''}"
            )
    if len(set(names)) < len(names):
        raise SpecError(f"--methods: name each method once (found {', '.join(names)})")


def candidates(names: Sequence[str], *, on_gpu: bool, hidden_size: int | None) -> list[Candidate]:
    """The named methods, with what the machine asks of them.

    Args:
        names: of methods.
        on_gpu: whether they train on a GPU, in bfloat16, or on a CPU, in float32.
        hidden_size: of the model; None where it is not known.
    """
    return [Candidate(name, _settings(name, on_gpu=on_gpu, hidden_size=hidden_size)) for name in names]


def _settings(name: str, *, on_gpu: bool, hidden_size: int | None) -> dict[str, Any]:
    if name == "qlora_galore":
        parts = ("qlora", "galore")
        own = {part: _settings(part, on_gpu=on_gpu, hidden_size=hidden_size) for part in parts}
        return {part: settings for part, settings in own.items() if settings}
    fields = _KINDS[name].model_fields
    settings: dict[str, Any] = {key: "float32" for key in ("weights", "compute_dtype") if key in fields and not on_gpu}
    projects = issubclass(_KINDS[name], ProjectedGradients)
    if projects and hidden_size is not None and hidden_size < 2 * fields["rank"].default:
        settings["rank"] = max(1, hidden_size // 4)  # the default rank would be hardly any restriction
    return settings
