"""The states of all random generators of this process: saved in checkpoints, and restored from them."""

from __future__ import annotations

import random
from typing import Any


def random_state(device: str) -> dict[str, Any]:
    """The states of torch's generators on the CPU and the trial's GPU, of Python's and of NumPy's.

    Holds tensors, numbers and tuples only, as `torch.load` takes them without unpickling foreign classes.
    """
    import numpy
    import torch

    kind, keys, *rest = numpy.random.get_state()  # noqa: NPY002  # libraries draw from the global one
    state = {
        "cpu": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], *rest),
    }
    return state if device == "cpu" else state | {"cuda": torch.cuda.get_rng_state(device)}


def draw_from(state: dict[str, Any], device: str) -> None:
    """Continue the random numbers where `random_state` was called. A pass that is recorded afterwards does so, too.

    Args:
        state: what `random_state` returned; those of version 0.1.0 lack Python's and NumPy's.
        device: "cpu" or "cuda:N".
    """
    import numpy
    import torch

    torch.set_rng_state(state["cpu"].cpu())
    if "python" in state:
        random.setstate(state["python"])
    if "numpy" in state:
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))  # noqa: NPY002
    if device != "cpu" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
