"""Rows as long as a study allows, so that its largest batch occurs in the few steps of a benchmark."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea body information
"""
"""A token each in most vocabularies."""


def write_long_rows(path: Path, count: int, tokens: int) -> Path:
    """`count` different rows of more than `tokens` tokens as prompt and completion, to be cut there; never the same.

    The prompt takes about half of them, so that the longest prompt is long, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draw, words = random.Random(0), WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, completion = (" ".join(draw.choices(words, k=size)) for size in (tokens // 2, tokens))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return path
