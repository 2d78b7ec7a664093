"""The conversation that a recipe makes of a row, and the reasons why it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

Turn = dict[str, Any]
"""{"role": "user" | "assistant" | "tool", "content": text}, as chat templates take it. A turn of the assistant may also
have `tool_calls` and one of REASONING; a turn of a tool `name` and `tool_call_id`."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The fields under which data sets keep what was thought before an answer."""


@dataclass(frozen=True)
class Conversation:
    """Turns that start with the user and end with the assistant; or `text` alone."""

    turns: tuple[Turn, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant may call, as chat templates take them."""
    untrained: frozenset[int] = frozenset()
    """Indices of the assistant's turns that carry no loss (`weight: 0`); of a pair, of both sides."""
    rejected: tuple[Turn, ...] = ()
    """Of a pair, the turns of the side that is worse than `turns`; none of other rows."""
    desirable: bool | None = None
    """Whether the answer is good; None of rows that do not say it."""

    @property
    def is_plain(self) -> bool:
        """Whether any chat template shows all of it: it holds only text of users and of the assistant."""
        turns = (*self.turns, *self.rejected)
        return not self.tools and all(turn["role"] != "tool" and len(turn) == 2 for turn in turns)

    def sides(self) -> list[Conversation]:
        """Of a pair, the chosen and the rejected conversation; else the conversation itself."""
        return [replace(self, turns=turns, rejected=()) for turns in (self.turns, self.rejected) if turns] or [self]

    def plain(self) -> dict[str, Any]:
        """JSON-like data: the row in the form of the recipe `messages`, `preference` or `text`."""
        if self.text is not None:
            return {"text": self.text}
        sides = [
            [{**turn, "weight": 0} if index in self.untrained else turn for index, turn in enumerate(turns)]
            for turns in (self.turns, self.rejected)
        ]
        more = {"tools": list(self.tools)} if self.tools else {}
        if self.rejected:
            return {"chosen": sides[0], "rejected": sides[1], **more}
        return {"messages": sides[0], **more, **({} if self.desirable is None else {"label": self.desirable})}

    def check_characters(self) -> None:
        """Refuse characters that tokenizers and files cannot hold.

        Raises:
            Unusable: a NUL character, or half of a surrogate pair.
        """
        plain = self.is_plain
        turns = [*self.turns, *self.rejected]
        all_text = self.text or "".join([turn["content"] for turn in turns])
        for text in [all_text] if plain else _texts([turns, list(self.tools)]):
            if "\0" in text:
                raise Unusable("a NUL character")
            try:
                text.isascii() or text.encode("utf-8")
            except UnicodeEncodeError:
                raise Unusable("a lone surrogate, which is half a character") from None


class WrongShape(Exception):
    """A row lacks what its recipe reads; the text names the field."""

    def __init__(self, text: str, reason: str | None = None) -> None:
        super().__init__(text)
        self.reason = reason or text
        """The same without what differs from row to row: under it such rows are counted where they are skipped."""


class Unusable(Exception):
    """A row of the right shape that cannot be trained on; the text is the reason under which it is counted."""


def _texts(value: object) -> Iterator[str]:
    values = [value]
    while values:
        inner = values.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, Mapping):
            values += [*inner, *inner.values()]
        elif isinstance(inner, list):
            values += inner
