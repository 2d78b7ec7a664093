"""Names that become parts of paths; those in files of others are checked before."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_REFUSED = re.compile(r"[/\\:\x00-\x1f\x7f]")
_LONGEST = 200


def one_part(name: str) -> str:
    """`name`, if it names one file or folder and nothing elsewhere.

    Raises:
        ValueError: it has separators, a drive or control characters, means a folder above, or is too long.
    """
    if not name or name.strip(". ") == "" or _REFUSED.search(name) or len(name.encode("utf-8", "replace")) > _LONGEST:
        raise ValueError("must be the name of one file or folder, not a path")
    return name


PathPart = Annotated[str, AfterValidator(one_part)]
"""Text that is one part of a path."""
