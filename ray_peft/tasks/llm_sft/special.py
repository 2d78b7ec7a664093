"""Special tokens typed in row text: they stay text, while those of the chat template stay tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_OWN, _TYPED = 0xF0000, 0x100000
"""Private characters that stand for special tokens: the template's own, and those typed in a row."""
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class NotSpecial(Exception):
    """Special tokens typed in a row cannot be told from the template's; the text is the reason."""


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """Of each token, its first character in the text, and the one behind its last."""


class SpecialTokens:
    """The special tokens of a tokenizer, and a copy of it that knows them under other names.

    A typed special token is replaced by a private character before the template writes the row. In the written text,
    the template's own special tokens get the names that the copy knows, and the private characters become text again.
    For the copy that text is not special, and the text around it is tokenised as usual.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        added |= set(tokenizer.all_special_tokens)
        # A line break or a letter that some tokenizer calls special is text that rows are full of.
        self._names = sorted((name for name in added if len(name.strip()) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or "(?!)")

    def typed(self, value: object) -> list[str]:
        """The special tokens in a text, or in all texts of a message, each as often as it is there."""
        if isinstance(value, str):
            return self._pattern.findall(value)
        if isinstance(value, Mapping):
            return [name for key, part in value.items() if key != "role" for name in self.typed(part)]
        if isinstance(value, Sequence):
            return [name for part in value for name in self.typed(part)]
        return []

    def hidden(self, value: Any) -> Any:
        """A text, or a message, in which private characters stand for special tokens.

        Raises:
            NotSpecial: the text holds private characters of its own.
        """
        if isinstance(value, str):
            if _PRIVATE.search(value):
                raise NotSpecial("private-use characters beside special tokens typed in the text")
            return self._pattern.sub(lambda match: chr(_TYPED + self._names.index(match[0])), value)
        if isinstance(value, Mapping):
            return {key: part if key == "role" else self.hidden(part) for key, part in value.items()}
        return [self.hidden(part) for part in value] if isinstance(value, list | tuple) else value

    def restored(self, text: str) -> str:
        """A text without private characters: special tokens, typed ones too, by their names."""
        return re.sub(f"[{chr(_TYPED)}-\U0010ffff]", lambda match: self._names[ord(match[0]) - _TYPED], text)

    def encode(self, text: str, cuts: Sequence[int], *, add_special_tokens: bool = False) -> tuple[Encoding, list[int]]:
        """The tokens of a text with private characters, and the new positions of places in that text.

        Args:
            text: as `hidden` texts are written by a template.
            cuts: places in `text`, ascending.
            add_special_tokens: add what the tokenizer adds to plain text, such as a token for its beginning.

        Raises:
            NotSpecial: the tokenizer makes a special token of plain letters.
        """
        parts, places, position = [""], [], 0
        for cut in (*cuts, len(text)):
            part = self._pattern.sub(lambda match: self._private_of(match[0]), text[position:cut])
            parts.append(self.restored(part))
            places.append(sum(map(len, parts)))
            position = cut
        renamed = "".join(parts)
        encoded = self._copy.encode(renamed, add_special_tokens=add_special_tokens)
        ids = [self._original.get(token, token) for token in encoded.ids]
        self._check(ids, encoded.offsets, renamed)
        return Encoding(ids, encoded.offsets), places[:-1]

    def _check(self, ids: list[int], offsets: list[tuple[int, int]], text: str) -> None:
        """Check that the special tokens are those of the template, and all of them."""
        special = {self._number(name) for name in self._names} - {self._tokenizer.unk_token_id}
        tokens = [text[begin:end] for token, (begin, end) in zip(ids, offsets, strict=True) if token in special]
        if sum(bool(_PRIVATE.search(token)) for token in tokens if token) != sum(map(bool, tokens)):
            raise NotSpecial("the tokenizer makes a special token of plain letters")

    def _number(self, name: str) -> int:
        return cast(int, self._tokenizer.convert_tokens_to_ids(name))

    def _private_of(self, name: str) -> str:
        return chr(_OWN + self._names.index(name))

    @cached_property
    def _copy(self) -> Tokenizer:
        """The tokenizer, whose special tokens are named by private characters."""
        from tokenizers import Tokenizer

        plain = json.loads(self._tokenizer.backend_tokenizer.to_str())
        names = {name: self._private_of(name) for name in self._names}
        for token in plain["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = plain["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:  # Unigram: pieces with their scores
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        plain["truncation"] = plain["padding"] = None
        return Tokenizer.from_str(json.dumps(plain))

    @cached_property
    def _original(self) -> dict[int, int]:
        """The tokenizer's number of an added token, by that of the copy, where they differ."""
        names = {self._private_of(name): name for name in self._names}
        decoder = self._copy.get_added_tokens_decoder()
        numbers = {number: self._number(names.get(token.content, token.content)) for number, token in decoder.items()}
        return {number: original for number, original in numbers.items() if number != original}
