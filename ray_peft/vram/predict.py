"""Predicted peaks: their parts, the settings that decide them, and their cache on disk."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ray_peft.foundation.cache import cache_folder
from ray_peft.foundation.units import GIB
from ray_peft.foundation.whole import write_text
from ray_peft.methods.badam import BAdam
from ray_peft.methods.base import OF_TRAINING, Method, Stage
from ray_peft.methods.lora import LowRankAdapter
from ray_peft.methods.matrix_weights import MatrixWeights
from ray_peft.methods.muon import Muon
from ray_peft.methods.projected_gradients import ProjectedGradients
from ray_peft.methods.qlora_galore import QLoRAThenGaLore
from ray_peft.methods.turns import LayersInTurn
from ray_peft.spec import TrialSpec
from ray_peft.vram.pool import SEGMENT
from ray_peft.vram.shape import ModelShape

GATHERED = "gathered"
"""Kind of bytes of weights, and of their gradients, that a worker of a spread model holds whole for a moment."""
PASS, UPDATE = "segments of a pass", "segments of an update"
"""Kinds of bytes that are no part of the peak: what the allocator reserves for each if both have a pool of their own,
as they do where passes are recorded."""
RESIDENT = ("weights", "quantization", "adapters", "gradients", "optimizer", "projectors")
"""Kinds of bytes that stay from step to step."""

RECORDED_SLACK = 0.06
"""Share that the allocator reserves beyond what is predicted of its pools, where passes are recorded: 57 of 61
cells on an H200 needed at most 0.057, the others had begun with segments that were partly used."""

_NO_MEMORY: dict[type[Any], frozenset[str]] = {
    Stage: OF_TRAINING,
    LowRankAdapter: frozenset({"alpha"}),
    MatrixWeights: frozenset({"eps"}),
    ProjectedGradients: frozenset({"scale", "update_proj_gap"}),
    Muon: frozenset({"momentum", "nesterov", "rounds"}),
    LayersInTurn: frozenset({"every"}),
    BAdam: frozenset({"order"}),
    QLoRAThenGaLore: frozenset({"switch_at"}),
}
"""Settings that change numbers, but not how many there are, by the class that has them: another method's setting of
the same name may decide memory."""


@dataclass(frozen=True)
class Prediction:
    """Bytes on one GPU."""

    components: dict[str, int]
    """By kind, at the peak; they add up to `peak_allocated`."""
    peak_allocated: int
    """Peak of tensors in training, as `torch.cuda.max_memory_allocated` counts; without training, the weights."""
    peak_reserved: int
    """Peak of the allocator's segments in training."""
    evaluation: int | None
    """Peak of tensors outside of training, at most: while held-out rows are scored and answered, or images encoded,
    scored and made; None where nothing can say."""
    fixed_rows: float | None = None
    """The constant time of a recorded pass, as the number of rows that take as long. None where passes are not
    recorded, so that the host takes most of a pass's time."""

    @property
    def needed(self) -> int:
        """Bytes that the trial needs in training and evaluation, without the CUDA context."""
        return max(self.peak_reserved, self.evaluation or 0)

    def gib(self) -> dict[str, float]:
        """All of it in GiB, flat, as it is stored beside what is measured."""
        sizes = {"peak_allocated_gib": self.peak_allocated, "peak_reserved_gib": self.peak_reserved}
        sizes |= {"evaluation_gib": self.evaluation} if self.evaluation is not None else {}
        sizes |= {f"{kind}_gib": size for kind, size in self.components.items()}
        return {name: round(size / GIB, 4) for name, size in sizes.items()}


def segments(size: int, slack: float) -> int:
    """Bytes of the allocator's segments that hold `size` bytes of tensors, and a share of them besides."""
    return -(-int(size * (1 + slack)) // SEGMENT) * SEGMENT


def recorded_segments(step: Counter[str], scoring: int, beside: int, slack: float = 0.0) -> int:
    """Bytes of the allocator's segments where passes are recorded: what stays, and the pools of passes and updates.

    Args:
        step: its components; PASS and UPDATE are taken out of them.
        scoring: bytes that scoring between two steps takes, in the pool of the passes; 0 without.
        beside: bytes of what else stays.
        slack: share of all of it that is reserved besides, in addition to `RECORDED_SLACK`.
    """
    pools = max(step.pop(PASS), scoring) + step.pop(UPDATE)
    return segments(sum(step[kind] for kind in RESIDENT) + pools + beside, RECORDED_SLACK + slack)


def evaluating(step: Counter[str], scoring: Counter[str]) -> Counter[str]:
    """Components while the held-out loss is measured between two steps: the optimizer keeps its state."""
    resident = [kind for kind in RESIDENT if kind != "gradients"]
    added = Counter(buffers=scoring["scoring"], **{GATHERED: scoring[GATHERED]})
    return Counter({kind: step[kind] for kind in resident}) + added


def common(spec: TrialSpec, stage: Stage | None, shape: ModelShape, longest: int) -> list[object]:
    """What decides the memory of every task's trial; `longest` is the size of a row, in tokens or pixels."""
    model = spec.model.plain()
    return [
        shape.config,
        decides_memory(stage or spec.method),
        [model[key] for key in ("dtype", "quantization", "attention")],
        *([len(model["new_tokens"])] if model["new_tokens"] else []),
        longest,
    ]


def decides_memory(method: Method) -> dict[str, object]:
    """The settings of a method without those that only change numbers."""
    struck = frozenset().union(*(names for kind, names in _NO_MEMORY.items() if isinstance(method, kind)))
    return {key: value for key, value in method.plain().items() if key not in struck}


_lock = threading.RLock()
_known: dict[str, Counter[str]] = {}


def cached(decides: list[object], code: tuple[Path, ...], compute: Callable[[], Counter[str]]) -> Counter[str]:
    """The result of `compute`, from memory or disk if it was computed before.

    Args:
        decides: all that the result depends on, as JSON-like data.
        code: the files of a task that compute it.
        compute: takes seconds.
    """
    key = hashlib.sha256(json.dumps([*decides, _digest(code)], sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder() / "predicted" / f"{key}.json"
    with _lock:
        if key not in _known:
            if file.is_file():
                _known[key] = Counter(json.loads(file.read_text(encoding="utf-8")))
            else:
                _known[key] = compute()
                with contextlib.suppress(OSError):  # a cache that others keep may be read-only, or full
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_text(file, json.dumps(_known[key]))
        return _known[key].copy()


@cache
def _digest(code: tuple[Path, ...]) -> str:
    """A digest of all that computes a prediction: this package, the methods, a task's `code`, the libraries."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    parts = [file for part in ("vram", "methods", "reach") for file in sorted((package / part).rglob("*.py"))]
    for file in (*parts, *code):
        digest.update(file.read_bytes())
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "galore-torch", "diffusers"):
        digest.update(importlib.metadata.version(name).encode())
    return digest.hexdigest()
