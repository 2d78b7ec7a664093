"""The conversation that a recipe makes of a row, and the reasons why it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    """Indices of the assistant's turns that carry no loss (`weight: 0`)."""

    @property
    def is_plain(self) -> bool:
        """Whether any chat template shows all of it: it has nothing but what users and the assistant say."""
        return not self.tools and all(turn["role"] != "tool" and len(turn) == 2 for turn in self.turns)

    def plain(self) -> dict[str, Any]:
        """JSON-like data: the row in the form of the recipe `messages`, or of `text`."""
        if self.text is not None:
            return {"text": self.text}
        turns = [{**turn, "weight": 0} if index in self.untrained else turn for index, turn in enumerate(self.turns)]
        return {"messages": turns, **({"tools": list(self.tools)} if self.tools else {})}

    def check_characters(self) -> None:
        """Refuse characters that tokenizers and files cannot hold.

        Raises:
            Unusable: a NUL character, or half of a surrogate pair.
        """
        plain = self.is_plain
        all_text = self.text or "".join([turn["content"] for turn in self.turns])
        for text in [all_text] if plain else _texts([list(self.turns), list(self.tools)]):
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
