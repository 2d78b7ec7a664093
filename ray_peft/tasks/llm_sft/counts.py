"""How many rows were used, cut and left out: as numbers and as sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_peft.foundation.lists import some
from ray_peft.spec import DataSpec

_NAMED = 5
"""Row numbers in a sentence; the others are counted."""


@dataclass(frozen=True)
class SourceCounts:
    """How many rows of one source were used, cut and left out."""

    source: str
    read: int
    unusable: dict[str, int]
    train: int
    test: int
    train_cut: int
    """Training rows longer than the limit, of which the first tokens are kept."""
    train_dropped: int
    """Rows left out and replaced by the next ones drawn: over the limit, or with an answer that begins behind it."""
    test_cut: int
    """Test rows whose loss is measured on their first tokens only."""
    validation: int = 0
    validation_cut: int = 0
    """The same of validation rows."""
    validation_dropped: int = 0
    """Validation rows left out, without replacement: they repeat a test row of some source."""
    overlap_dropped: int = 0
    """Training rows left out and replaced by the next ones drawn: they repeat a held-out row of some source."""
    unscored: dict[str, list[int]] = field(default_factory=dict)
    """By split, the numbers of held-out rows that are left out: their answer begins behind the limit."""
    unsound: dict[str, int] = field(default_factory=dict)
    """Answers of training rows that are not trained on, beside others of their rows that are, by reason."""
    typed: dict[str, int] = field(default_factory=dict)
    """Special tokens in the text of rows, by token."""
    typed_rows: int = 0
    """Rows with such tokens."""
    unusable_rows: dict[str, str] = field(default_factory=dict)
    """The first unusable rows by reason, such as `rows 3, 10 and 17`."""


@dataclass(frozen=True)
class TokenFacts:
    """What must fit a model, and what the chat template does; of all rows of a data set."""

    vocabulary: int
    """Tokens that the tokenizer knows."""
    largest: int
    """The largest token number in any row or prompt."""
    largest_name: str
    pad: int
    pad_name: str
    longest: int
    """Tokens of the longest row or prompt."""
    end: str | None = None
    """What the chat template writes after an answer; empty for nothing, None where no row is a conversation."""
    lead: str = ""
    """What the chat template writes between its generation prompt and an answer."""
    dated: bool = False
    """The chat template prints the date."""


def notes(counts: Sequence[SourceCounts], data: DataSpec) -> list[str]:
    """One sentence per source: rows kept, cut, dropped and unusable."""
    sentences = []
    for source in counts:
        limit = f"{data.max_length} tokens"
        counted = (
            (source.validation, "{} validation rows"),
            (source.train_cut, f"{{}} training rows longer than {limit} cut"),
            (source.train_dropped, f"{{}} rows longer than {limit} left out"),
            (source.test_cut, f"the loss of {{}} longer held-out rows is that of their first {limit}"),
            (source.validation_dropped, "{} validation rows left out that repeat test rows"),
            (source.validation_cut, f"{{}} validation rows longer than {limit} cut"),
            (source.overlap_dropped, "{} training rows left out that repeat held-out rows"),
        )
        text = f"{source.source}: {source.train} training and {source.test} held-out rows of {source.read} read"
        text += "".join(f"; {words.format(count)}" for count, words in counted if count)
        for reason, count in sorted(source.unusable.items()):
            text += f"; {count} unusable rows ({reason})" + f": {source.unusable_rows.get(reason, '')}".rstrip(": ")
        sentences.append(text)
    return sentences


def remarks(counts: Sequence[SourceCounts], data: DataSpec, facts: TokenFacts) -> list[str]:
    """What a reader must know about how rows became tokens."""
    sentences = []
    for source in counts:
        for split, numbers in source.unscored.items():
            scored = source.test if split == "test" else source.validation
            sentences.append(
                f"{source.source}: {len(numbers)} of {len(numbers) + scored} {split} rows are unscored and left out, "
                f"since their answer begins after {data.max_length} tokens (data.max_length): {numbered(numbers)}"
            )
        for reason, count in source.unsound.items():
            sentences.append(f"{source.source}: {count} answers within training rows are not trained on ({reason})")
        if source.typed:
            tokens = ", ".join(f"{name} {count:,}x" for name, count in Counter(source.typed).most_common(_NAMED))
            became = "they stay text" if data.special_tokens == "text" else "they become control tokens"
            sentences.append(
                f"{source.source}: {source.typed_rows} rows hold special tokens as text ({tokens}); {became} "
                f"(data.special_tokens: {data.special_tokens})"
            )
    if facts.dated:
        sentences.append(
            f"the chat template prints the date: it is {data.template_date} in all rows (data.template_date)"
        )
    return sentences


def cautions(facts: TokenFacts) -> list[str]:
    """What the chat template does that makes answers worse."""
    sentences = []
    if facts.end == "":
        sentences.append(
            "the chat template writes no end mark after an answer, so the model cannot learn to stop, and every answer "
            "is as long as evaluation.max_new_tokens; name a template that ends answers in data.chat_template"
        )
    if facts.lead:
        sentences.append(
            f"the chat template begins each answer with {facts.lead!a}, which is not in its generation prompt: the "
            "model learns to write it, and it is scored as part of the answer"
        )
    return sentences


def numbered(numbers: Sequence[int]) -> str:
    """Row numbers in words: the first ones, and how many more there are."""
    return f"row{'s' if len(numbers) > 1 else ''} {some([str(number) for number in sorted(numbers)], _NAMED)}"
