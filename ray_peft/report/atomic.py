"""Files that are whole or absent: a killed process leaves the old file, never half of a new one."""

import contextlib
import os
import uuid
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, with its line ends as they are.

    A lone surrogate, which UTF-8 cannot hold, becomes its escape sequence.

    Raises:
        OSError: the system refuses; its `filename` is set.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # Not tempfile: its files are readable by their owner alone, and a report is for everybody.
        with temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:  # the system names no path for an open file
            error.filename = error.filename or str(path)
        raise
