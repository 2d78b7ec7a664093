"""report.md: a document as Markdown that a person can read: of a large sweep the first lines of each table.

Plots and pictures are linked. What is left out says so, and where it is.
"""

from dataclasses import dataclass
from typing import assert_never
from urllib.parse import quote

from ray_peft.report.document import (
    Block,
    Bullets,
    Code,
    Comparison,
    Document,
    Figure,
    Gallery,
    Heading,
    Paragraph,
    Picture,
    Prompt,
    Questions,
    Section,
    Table,
)
from ray_peft.report.escape import entry, fenced, inline, paragraphs, table

WHOLE, FEW = 1_000, 40
"""Lines up to which a report is not cut, if its tables have but a few lines: that of a dozen trials with samples."""
LONGEST = 400
"""Lines of a report that is cut."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How much of a document is shown; None shows all."""

    prompts: int | None = None
    """Of a section."""
    answers: int | None = None
    """Of a prompt."""
    folded: int | None = None
    """Lines of a table that pages fold."""
    lines: int | None = None
    """Lines of any other table, list or text block."""


CUTS = (
    Cut(folded=30),
    Cut(prompts=3, answers=8, folded=30),
    Cut(prompts=2, answers=4, folded=12),
    Cut(prompts=1, answers=3, folded=6, lines=24),
    Cut(prompts=0, answers=0, folded=3, lines=12),
    Cut(prompts=0, answers=0, folded=3, lines=6),
)
"""From the whole to the least: samples go first, then pairs, then the ends of tables."""


def to_markdown(document: Document) -> str:
    """The file's text: whole for a small sweep, else cut as little as keeps it within `LONGEST` lines."""
    text = _whole(document, Cut())
    tables = [block for section in document.sections for block in section.blocks if isinstance(block, Table)]
    small = all(len(block.lines) <= FEW or block.folded for block in tables)
    if text.count("\n") <= (WHOLE if small else LONGEST):
        return text
    for cut in CUTS:
        text = _whole(document, cut)
        if text.count("\n") <= LONGEST:
            break
    return text


def _whole(document: Document, cut: Cut) -> str:
    parts = [f"# {inline(document.title)}", *(_block(block, cut) for block in document.head)]
    parts += [_section(section, cut) for section in document.sections]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section, cut: Cut) -> str:
    blocks, prompts = [], 0
    for block in section.blocks:
        prompts += isinstance(block, Prompt)
        if not isinstance(block, Prompt) or cut.prompts is None or prompts <= cut.prompts:
            blocks.append(_block(block, cut))
    if cut.prompts is not None and prompts > cut.prompts:
        blocks.append(_more(prompts - cut.prompts, "prompts with their answers"))
    return "\n\n".join([f"## {inline(section.title)}", *(block for block in blocks if block)])


def _block(block: Block, cut: Cut) -> str:  # noqa: C901  # one case a kind of block
    match block:
        case Heading():
            return f"### {inline(block.text)}"
        case Paragraph():
            return paragraphs(block.text)
        case Bullets():
            items = block.items[: cut.lines]
            rest = [f"- {_more(len(block.items) - len(items), 'entries')}"] if len(items) < len(block.items) else []
            return "\n".join([*(f"- {entry(item)}" for item in items), *rest])
        case Code():
            return fenced(block.text)
        case Table():
            return _table(block, cut)
        case Figure():
            return f"![{inline(block.title)}](plots/{block.name}.svg)"
        case Prompt():
            return _prompt(block, cut)
        case Gallery():
            pictures = [[inline(name), *(_picture(picture) for picture in pictures)] for name, pictures in block.lines]
            return table([inline(cell) for cell in block.header], pictures, text_columns=len(block.header))
        case Questions():
            return f"The answers to {len(block.questions)} rows, side by side and to be filtered: report.html."
        case Comparison():
            return "" if len(block.trials) < 2 else "Any two trials, side by side: report.html."
        case _:
            assert_never(block)


def _table(block: Table, cut: Cut) -> str:
    most = cut.folded if block.folded else cut.lines
    header, *lines = ([inline(cell) for cell in line] for line in (block.header, *block.lines[:most]))
    text = table(header, lines, text_columns=block.text_columns)
    left_out = len(block.lines) - len(lines)
    return f"{text}\n\n{_more(left_out, 'lines')}" if left_out else text


def _more(number: int, what: str) -> str:
    return f"{number} more {what}: report.html and report.csv."


def _picture(picture: Picture | None) -> str:
    return "-" if picture is None else f"![{inline(picture.alt)}]({quote(picture.file)})"


def _prompt(block: Prompt, cut: Cut) -> str:
    parts = [("Prompt", block.prompt), ("Reference", block.reference)]
    parts += [(f"Answer: {label}", answer) for label, answer in block.answers[: cut.answers]]
    texts = [f"### {inline(block.title)}", *(f"**{inline(name)}**\n\n{fenced(text)}" for name, text in parts)]
    left_out = len(block.answers) - len(block.answers[: cut.answers])
    return "\n\n".join([*texts, _more(left_out, "answers")] if left_out else texts)
