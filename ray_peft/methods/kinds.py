"""PEFT's kinds of adapters (0.21), and what each cannot do here; a test runs every one of them and compares."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

_OTHER_ROWS = "it needs more than rows: {}"
_PLAIN_WEIGHTS = "it reads or changes the base's plain weights, which such a base does not have"


@dataclass(frozen=True)
class Kind:
    """What a kind of adapter cannot do, each as a reason; None where it can."""

    serves: str | None = None
    """A causal language model that is trained on rows."""
    quantised: str | None = None
    """A base that bitsandbytes stores in 4 or 8 bits."""
    merges: str | None = None
    """To be added to the base's weights."""


_PROMPT = Kind(merges="virtual tokens are no weights")
_PLAIN = Kind(quantised=_PLAIN_WEIGHTS)

KINDS: dict[str, Kind] = {
    "ADALORA": Kind(),
    "ADAMSS": _PLAIN,
    "ADAPTION_PROMPT": Kind(serves="it changes the attention of Llama, Mistral and GPT-2 alone, layer by layer"),
    "BEFT": Kind(merges="PEFT merges a bias only where the layer has one"),
    "BOFT": Kind(),
    "C3A": Kind(),
    "CARTRIDGE": Kind(serves=_OTHER_ROWS.format("a text that is compressed into a cache")),
    "CPT": Kind(serves=_OTHER_ROWS.format("examples as tokens, with the type of each")),
    "DEFT": _PLAIN,
    "DELORA": _PLAIN,
    "FOURIERFT": Kind(),
    "FROD": _PLAIN,
    "GLORA": _PLAIN,
    "GRALORA": Kind(),
    "HIRA": Kind(),
    "HRA": _PLAIN,
    "IA3": Kind(),
    "LILY": Kind(merges="its layers share matrices that depend on their input"),
    "LN_TUNING": Kind(),
    "LOHA": _PLAIN,
    "LOKR": _PLAIN,
    "LORA": Kind(),
    "MISS": Kind(),
    "MULTITASK_PROMPT_TUNING": Kind(serves=_OTHER_ROWS.format("the task of each row")),
    "OFT": Kind(),
    "OSF": _PLAIN,
    "PEANUT": _PLAIN,
    "POLY": Kind(serves=_OTHER_ROWS.format("the task of each row")),
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": _PLAIN,
    "PVERA": Kind(),
    "P_TUNING": _PROMPT,
    "RANDLORA": Kind(),
    "ROAD": Kind(),
    "SHADOW": Kind(serves="its shadow network fails in the passes of a causal language model"),
    "SHIRA": Kind(),
    "SUPERTUNING": _PLAIN,
    "TINYLORA": _PLAIN,
    "TRAINABLE_TOKENS": Kind(serves="it trains rows of the embeddings and no layer"),
    "UNILORA": Kind(quantised="PEFT 0.21 gives it no gradient there"),
    "VBLORA": Kind(),
    "VERA": Kind(),
    "WAVEFT": Kind(),
    "XLORA": Kind(serves=_OTHER_ROWS.format("trained LoRA adapters to mix")),
}
"""By PEFT's own name."""

PROMPTS = frozenset({"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"})
"""Kinds that train virtual tokens, and change no layer."""


def known(name: str) -> str:
    """PEFT's own name of a kind, in capitals.

    Raises:
        ValueError: there is none, or it cannot serve a causal language model.
    """
    kind = name.upper().replace("-", "_")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        suggestion = f", did you mean {near[0].lower()}?" if near else f"; there are {', '.join(KINDS).lower()}"
        raise ValueError(f"PEFT has no adapter {name!r}{suggestion}")
    reason = KINDS[kind].serves
    if reason is not None:
        raise ValueError(f"PEFT's adapter {name} cannot be trained here: {reason}; use another adapter")
    return kind


def config_type(kind: str) -> Any:
    """PEFT's dataclass of a kind."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
