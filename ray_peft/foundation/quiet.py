"""Other libraries' progress bars and advice, kept off the console of a process that is ours."""

from __future__ import annotations

import logging
import os
import warnings

_LEVELS = {
    "bitsandbytes": logging.ERROR,  # that a kernel of the hub is not there, which is not used either
    "torch.distributed": logging.ERROR,
    "diffusers": logging.ERROR,
    "datasets": logging.ERROR,
}
_LIBRARIES = ("transformers", "diffusers", "torch", "peft", "trl", "bitsandbytes", "accelerate", "galore_torch")


def quiet_libraries() -> None:
    """Silence what is not for the user. What matters raises, or is a row, a note or a line of our own.

    For the command line and for workers, whose process is ours; a caller's own process is left as it is. Call it before
    transformers is imported. What the user has set in the environment stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers and datasets, too
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a fork later on would warn of it
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for category in (FutureWarning, DeprecationWarning):
        for library in _LIBRARIES:
            warnings.filterwarnings("ignore", category=category, module=rf"{library}(\.|$)")
