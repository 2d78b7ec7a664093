"""A report without a format: sections of paragraphs, lists, tables, figures, answers and pictures, as plain values.

What a section says is decided once; `markdown` and `webpage` only escape and lay out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Heading:
    """A title inside a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text whose line ends stay."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list without order."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Text as it is, to be copied."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as plain text."""

    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    """Columns of words; those after them hold numbers and stand to the right."""
    folded: bool = False
    """Whether a page that can fold shows it on demand only."""
    fits: bool = False
    """Whether it has so few columns that it never needs to be scrolled sideways: long text is wrapped."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot."""

    name: str
    """Stem of its file in `plots/`."""
    title: str
    svg: str
    """The whole file."""
    wide: bool = False
    """Whether it is drawn for the whole width of a page."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One held-out prompt with what every trial answered."""

    title: str
    prompt: str
    reference: str
    answers: tuple[tuple[str, str], ...]
    """Label of a trial and its answer."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image in a file, with a small copy for pages that must not need the file."""

    file: str
    """Its path from the report's folder, with forward slashes."""
    alt: str
    """A description for readers who cannot see it."""
    jpeg: str | None
    """The small copy as JPEG in base64; None if the file could not be read."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures side by side."""

    header: tuple[str, ...]
    """Of the column of names, then of each column of pictures."""
    lines: tuple[tuple[str, tuple[Picture | None, ...]], ...]
    """Name of a line and its pictures; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One held-out row with the answers of all compared systems."""

    number: int
    """Its index in the held-out rows."""
    prompt: str | None
    """None where the trials did not keep it."""
    reference: str
    answers: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Held-out rows one by one, to be filtered by who is right."""

    measure: str
    """What `Question.scores` are."""
    systems: tuple[str, ...]
    """The labels of the systems, the best first."""
    right_from: float
    """A row counts as right from this score on, until the reader says otherwise."""
    questions: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings of trials, any two of which can be laid side by side."""

    trials: tuple[str, ...]
    """Labels."""
    settings: tuple[tuple[str, tuple[str | None, ...]], ...]
    """Name of a setting that differs, and its value in each trial; None where a trial has no such setting."""


Block: TypeAlias = Heading | Paragraph | Bullets | Code | Table | Figure | Prompt | Gallery | Questions | Comparison


@dataclass(frozen=True)
class Section:
    """A titled part of the report."""

    title: str
    blocks: tuple[Block, ...]
    appendix: bool = False
    """Whether a page that can fold shows it on demand only."""


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    head: tuple[Block, ...]
    """What stands before the first section."""
    sections: tuple[Section, ...]

    @property
    def figures(self) -> list[Figure]:
        """Its plots, in order, each once."""
        figures = [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]
        return list({figure.name: figure for figure in figures}.values())
