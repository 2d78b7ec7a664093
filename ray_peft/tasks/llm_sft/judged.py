"""Rows with a judgement: a chosen and a rejected answer to one prompt, or one answer that is desirable or not.

The layouts of public data sets are told by their fields: the prompt apart or in the answers, texts or lists of turns,
whole dialogs of "Human:" and "Assistant:" (HH-RLHF), a whole chat on both sides (UltraFeedback), `system` and
`question` (Orca DPO pairs).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray_peft.tasks.llm_sft.chat import messages
from ray_peft.tasks.llm_sft.conversation import Conversation, Turn, Unusable, WrongShape
from ray_peft.tasks.llm_sft.fields import keys, kind, text_of

_PROMPTS = ("prompt", "question")
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_LABELS: dict[object, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
"""Labels as files write them; 1 and 0 are equal to True and False."""


def preference(row: Mapping[str, Any]) -> Conversation:
    """Two answers to one prompt: chosen, rejected, and prompt or question unless both sides are whole dialogs.

    The turns that both sides begin with are the prompt; earlier answers in it are not trained on.

    Raises:
        WrongShape: a side or the prompt is missing, or is neither text nor a list of turns.
        Unusable: an empty side, equal sides, or sides that are no answers to the same prompt.
    """
    chosen, rejected = (_dialog(row, side) for side in ("chosen", "rejected"))
    if chosen.turns == rejected.turns:
        raise Unusable("chosen and rejected are equal")
    pairs = zip(chosen.turns, rejected.turns, strict=False)
    shared = next((index for index, (turn, other) in enumerate(pairs) if turn != other), None)
    if shared is None:
        raise Unusable("one side is the beginning of the other")
    if {side.turns[shared]["role"] for side in (chosen, rejected)} != {"assistant"}:
        raise Unusable("chosen and rejected answer different prompts")
    earlier = {index for index, turn in enumerate(chosen.turns[:shared]) if turn["role"] == "assistant"}
    return replace(chosen, untrained=chosen.untrained | rejected.untrained | earlier, rejected=rejected.turns)


def labelled(row: Mapping[str, Any]) -> Conversation:
    """One answer and whether it is desirable: prompt, completion, label (true or false).

    Raises:
        WrongShape: a field is missing or of another kind.
        Unusable: an empty answer.
    """
    label = row.get("label")
    plain = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(plain, bool | int | str) or plain not in _LABELS:
        reason = f"field 'label' must be true or false (found {label!r}"
        raise WrongShape(f"{reason}; the row has {keys(row)})", f"{reason})")
    answered = _dialog(row, "completion")
    earlier = {index for index, turn in enumerate(answered.turns[:-1]) if turn["role"] == "assistant"}
    return replace(answered, untrained=answered.untrained | earlier, desirable=_LABELS[plain])


def _dialog(row: Mapping[str, Any], side: str) -> Conversation:
    """The whole conversation of one side."""
    value = row.get(side)
    if isinstance(value, str):
        answer: list[Any] = _transcript(value) or [{"role": "assistant", "content": value.strip()}]
    elif isinstance(value, list):
        answer = value
    else:
        reason = f"field {side!r} must be text or a list of turns (found {kind(value)}"
        raise WrongShape(f"{reason}; the row has {keys(row)})", f"{reason})")
    if not answer or not _has_text(answer[-1]):
        raise Unusable(f"empty {side} answer")
    turns = answer if _is_whole(answer) else [*_prompt(row, side), *answer]
    dialog = messages({**row, "messages": turns, "system": row.get("system")})
    if len(dialog.turns) < 2 or _role(turns[-1]) != "assistant":
        raise Unusable(f"{side} does not end with an answer")
    return dialog


def _prompt(row: Mapping[str, Any], side: str) -> list[Any]:
    name = next((name for name in _PROMPTS if row.get(name)), None)
    if name is None:
        raise WrongShape(
            f"{side} is an answer alone, so that the row needs a field {' or '.join(map(repr, _PROMPTS))} (it has "
            f"{keys(row)})",
            f"{side} is an answer alone, without a prompt",
        )
    if isinstance(row[name], list):
        return list(row[name])
    text = text_of(row, name)
    turns = _transcript(text) or [{"role": "user", "content": text}]
    return turns[:-1] if not _has_text(turns[-1]) else turns  # HH-RLHF's prompts end with "Assistant:"


def _transcript(text: str) -> list[Turn]:
    """The turns of a text in which "Human:" and "Assistant:" speak in turn; none if it does not begin so."""
    begun = text.strip()
    marks = list(_SPEAKER.finditer(begun))
    if not marks or marks[0].start() or marks[0][1] != "Human":
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(begun)]
    return [
        {"role": _ROLES[mark[1]], "content": begun[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def _is_whole(turns: list[Any]) -> bool:
    """Whether turns begin with the prompt."""
    return _role(turns[0]) != "assistant"


def _role(turn: object) -> str:
    role = (turn.get("role") or turn.get("from") or "") if isinstance(turn, Mapping) else ""
    return "assistant" if str(role).strip().lower() in ("assistant", "gpt") else str(role)


def _has_text(turn: object) -> bool:
    if not isinstance(turn, Mapping):
        return True  # `messages` says what is wrong with it
    content = turn.get("content", turn.get("value"))
    return bool(content.strip() if isinstance(content, str) else content) or bool(turn.get("tool_calls"))
