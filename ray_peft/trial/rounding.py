"""Whether two losses of the same weights differ by rounding alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ray_peft.errors import TrialFailed

ROUNDING = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
"""Largest difference of two losses of at most 1, and share of larger ones, by the coarsest dtype on either side.

Some ten times what was measured: SmolLM2-135M in bfloat16 went from 1.8373 to 1.8382 in a merge (0.05 %), a tiny
Llama in float32 by 1e-6. A wrong merge is far off: 5.24 became 38.44."""


def allowed(loss: float, dtypes: Iterable[str]) -> float:
    """The largest difference from `loss` that rounding explains, with numbers of `dtypes` on either side."""
    return max(ROUNDING[dtype] for dtype in dtypes) * max(1.0, abs(loss))


def check_same_loss(before: float, after: float, dtypes: Iterable[str], what: str) -> None:
    """Refuse weights whose loss is another one than before.

    Args:
        before: held-out loss of the model as it was trained.
        after: the same, of the weights that are to stand for it.
        dtypes: all in which either of them is held or computed.
        what: what was done in between, to begin a sentence with.

    Raises:
        TrialFailed: they differ by more than rounding, or one is not finite.
    """
    kinds = sorted(dtypes)
    limit = allowed(before, kinds)
    if math.isfinite(before) and math.isfinite(after) and abs(after - before) <= limit:
        return
    raise TrialFailed(
        f"{what} changed the held-out loss from {before:.4f} to {after:.4f}, and rounding ({', '.join(kinds)}) "
        f"explains {limit:.4f} at most: these weights are not the trained model, so they are not kept"
    )
