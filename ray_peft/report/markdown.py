"""report.md: a document as Markdown; plots and pictures are linked, everything else is in the file."""

from typing import assert_never
from urllib.parse import quote

from ray_peft.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Figure,
    Gallery,
    Heading,
    Paragraph,
    Picture,
    Prompt,
    Section,
    Table,
)
from ray_peft.report.escape import entry, fenced, inline, paragraphs, table


def to_markdown(document: Document) -> str:
    """The file's text."""
    parts = [f"# {inline(document.title)}", *(_block(block) for block in document.head)]
    parts += [_section(section) for section in document.sections]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    return "\n\n".join([f"## {inline(section.title)}", *(_block(block) for block in section.blocks)])


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"### {inline(block.text)}"
        case Paragraph():
            return paragraphs(block.text)
        case Bullets():
            return "\n".join(f"- {entry(item)}" for item in block.items)
        case Code():
            return fenced(block.text)
        case Table():
            header, *lines = ([inline(cell) for cell in line] for line in (block.header, *block.lines))
            return table(header, lines, text_columns=block.text_columns)
        case Figure():
            return f"![{inline(block.title)}](plots/{block.name}.svg)"
        case Prompt():
            return _prompt(block)
        case Gallery():
            lines = [[inline(name), *(_picture(picture) for picture in pictures)] for name, pictures in block.lines]
            return table([inline(cell) for cell in block.header], lines, text_columns=len(block.header))
        case _:
            assert_never(block)


def _picture(picture: Picture | None) -> str:
    return "-" if picture is None else f"![{inline(picture.alt)}]({quote(picture.file)})"


def _prompt(block: Prompt) -> str:
    parts = [("Prompt", block.prompt), ("Reference", block.reference)]
    parts += [(f"Answer: {label}", answer) for label, answer in block.answers]
    return "\n\n".join(
        [f"### {inline(block.title)}", *(f"**{inline(name)}**\n\n{fenced(text)}" for name, text in parts)]
    )
