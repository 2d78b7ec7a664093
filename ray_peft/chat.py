"""A conversation with several trials at once: the same questions, and the answers side by side in the terminal."""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ray_peft.errors import DataError
from ray_peft.spec import TrialSpec
from ray_peft.store import tracking
from ray_peft.store.consent import check_consent
from ray_peft.tasks.base import MemberModel

NARROWEST = 24
"""Columns of a terminal that a model needs for its answers; on a narrower one they stand one below the other."""
GAP = 2
NEW, QUIT = "/new", "/quit"


def chat(
    trials: Sequence[str],
    lines: Iterable[str],
    say: Callable[[str], None],
    *,
    tracking_uri: str,
    base: bool,
    max_new_tokens: int,
    width: int,
    trust_remote_code: bool = False,
) -> None:
    """Answer one question after the other.

    Args:
        trials: ids of trials, or of their MLflow runs.
        lines: what the user types: questions, `/new` for new conversations, `/quit`.
        say: prints the answers.
        tracking_uri: the MLflow store.
        base: whether the untouched base of the first trial answers, too.
        max_new_tokens: most tokens of an answer.
        width: columns of the terminal.
        trust_remote_code: run Python code that a run's spec trusts; without it such a run is refused.

    Raises:
        TrackingError: a trial or its weights are missing.
        SpecError: a trial trains no language model that answers.
        ModelError: weights cannot be loaded.
    """
    from ray_peft.tasks.llm_sft.talk import Talk

    with tempfile.TemporaryDirectory(prefix="ray_peft_chat_") as scratch:
        members: list[MemberModel[TrialSpec]] = []
        for place, trial in enumerate(trials):
            run_id = tracking.find_run(tracking_uri, trial)
            spec = tracking.load_spec(tracking_uri, run_id)
            check_consent(spec, run_id, trust_remote_code=trust_remote_code)
            weights = None
            if spec.method.name != "none":
                weights = tracking.fetch(tracking_uri, run_id, "adapter", Path(scratch) / str(place))
            members.append(MemberModel(spec, weights))
        names = [f"{member.spec.trial_id} ({member.spec.method.name})" for member in members]
        if base:
            members.append(MemberModel(members[0].spec.changed({"method": {"name": "none"}}), None))
            names.append("the untouched base")
        talk = Talk(members, _device(), max_new_tokens)
        for line in lines:
            question = line.strip()
            if question == QUIT:
                return
            if question == NEW:
                talk.forget()
            elif question:
                try:
                    say("\n".join(side_by_side(names, talk.answers(question), width)))
                except DataError as error:
                    say(f"error: {error}")


def side_by_side(names: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
    """Texts in columns under their names, or one below the other where columns would be too narrow."""
    column = (width - GAP * (len(texts) - 1)) // len(texts)
    if len(texts) > 1 and column < NARROWEST:
        return [
            line for name, text in zip(names, texts, strict=True) for line in (f"-- {name}", *_wrapped(text, width), "")
        ]
    cells = [
        [*_wrapped(name, column), "-" * min(column, columns(name)), *_wrapped(text, column)]
        for name, text in zip(names, texts, strict=True)
    ]
    height = max(map(len, cells))
    rows = zip(*([*lines, *[""] * (height - len(lines))] for lines in cells), strict=True)
    return [(" " * GAP).join(cell + " " * (column - columns(cell)) for cell in row).rstrip() for row in rows]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many columns, broken at spaces where there are any."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            while columns(word) > width:  # a long word, or a script without spaces
                room = width - columns(line) - bool(line)
                head = _head(word, room if room > 1 else width)
                line, lines = ("", [*lines, f"{line} {head}".strip()]) if room > 1 else ("", [*lines, line, head])
                word = word[len(head) :]
            if line and columns(line) + 1 + columns(word) > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
        lines.append(line)
    return lines


def _head(word: str, width: int) -> str:
    """As many characters as fit into so many columns; at least one."""
    end = 1
    while end < len(word) and columns(word[: end + 1]) <= width:
        end += 1
    return word[:end]


def columns(text: str) -> int:
    """Columns of a terminal that a text takes: Chinese characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"
