"""Where prepared data is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where prepared data is kept: RAY_PEFT_CACHE, or `ray_peft` in the user's cache folder."""
    set_by_user = os.environ.get("RAY_PEFT_CACHE")
    return Path(set_by_user) if set_by_user else Path.home() / ".cache" / "ray_peft"
