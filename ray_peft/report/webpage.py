"""report.html: a document as one file that needs no other; plots and small pictures are in it, scripts are not."""

import re
from html import escape
from typing import assert_never

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
from ray_peft.report.palette import VARIABLES
from ray_peft.report.stylesheet import CSS

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ID = re.compile(r'(?<=\sid=")|(?<=url\(#)|(?<=xlink:href="#)')
_NOT_NEEDED = re.compile(r"<metadata>.*?</metadata>|<style\b.*?</style>|<!--.*?-->", re.DOTALL)
_SIZE = re.compile(r' (?:width|height)="[^"]*"')
_COLOUR = re.compile("|".join(VARIABLES))


def to_html(document: Document) -> str:
    """The file's text."""
    links = "".join(
        f'<a href="#s{number}">{_text(section.title)}</a>\n' for number, section in enumerate(document.sections)
    )
    body = [
        f"<h1>{_text(document.title)}</h1>",
        *(_block(block) for block in document.head),
        f'<nav aria-label="Sections">\n{links}</nav>' if links else "",
        *(_section(section, f"s{number}") for number, section in enumerate(document.sections)),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(document.title)}</title>",
            f"<style>\n{CSS}\n</style>",
            "</head>",
            "<body>",
            *(part for part in body if part),
            "</body>",
            "</html>",
            "",
        ]
    )


def inline_svg(figure: Figure) -> str:
    """The plot as an element of the page: colours are the page's variables, ids are its own, the width is free."""
    svg = _NOT_NEEDED.sub("", figure.svg[figure.svg.index("<svg") :]).strip()
    start, end, body = svg.partition(">")
    svg = _ID.sub(f"{figure.name}-", body)
    svg = _COLOUR.sub(lambda match: f"var({VARIABLES[match.group()]})", svg)
    return f'{_SIZE.sub("", start)} role="img" aria-label="{_text(figure.title)}"{end}{svg}'


def _text(text: str) -> str:
    """Any text as a reader is to see it; control characters, which a page may not hold, become a mark."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", escape(text))


def _section(section: Section, anchor: str) -> str:
    blocks = []
    prompts = 0
    for block in section.blocks:
        blocks.append(_block(block, unfolded=not prompts))
        prompts += isinstance(block, Prompt)
    return "\n".join([f'<section id="{anchor}">', f"<h2>{_text(section.title)}</h2>", *blocks, "</section>"])


def _block(block: Block, *, unfolded: bool = True) -> str:
    match block:
        case Heading():
            return f"<h3>{_text(block.text)}</h3>"
        case Paragraph():
            return f"<p>{_text(block.text)}</p>"
        case Bullets():
            return "<ul>\n" + "".join(f"<li>{_text(item)}</li>\n" for item in block.items) + "</ul>"
        case Code():
            return f'<pre class="code">{_text(block.text)}</pre>'
        case Table():
            return _table(block)
        case Figure():
            return f"<figure>\n{inline_svg(block)}\n<figcaption>{_text(block.title)}</figcaption>\n</figure>"
        case Prompt():
            return _prompt(block, unfolded=unfolded)
        case Gallery():
            return _gallery(block)
        case _:
            assert_never(block)


def _table(block: Table) -> str:
    kinds = [' class="text"' if place < block.text_columns else "" for place in range(len(block.header))]
    header = "".join(
        f'<th scope="col"{kind}>{_text(cell)}</th>' for cell, kind in zip(block.header, kinds, strict=True)
    )
    lines = []
    for line in block.lines:
        first, *others = zip(line, kinds, strict=True)
        cells = f'<th scope="row"{first[1]}><div>{_text(first[0])}</div></th>'
        lines.append(cells + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in others))
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    table = (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{header}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )
    return f"<details><summary>{len(lines)} lines</summary>\n{table}\n</details>" if block.folded else table


def _gallery(block: Gallery) -> str:
    header = "".join(f'<th scope="col" class="text">{_text(cell)}</th>' for cell in block.header)
    lines = "\n".join(
        f'<tr><th scope="row" class="text"><div>{_text(name)}</div></th>'
        + "".join(f'<td class="text">{_picture(picture)}</td>' for picture in pictures)
        + "</tr>"
        for name, pictures in block.lines
    )
    return (
        f'<div class="scroll gallery" tabindex="0"><table>\n<thead><tr>{header}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody>\n</table></div>"
    )


def _picture(picture: Picture | None) -> str:
    if picture is None:
        return "-"
    if picture.jpeg is None:
        return f"not found: {_text(picture.file)}"
    return f'<img src="data:image/jpeg;base64,{picture.jpeg}" alt="{_text(picture.alt)}">'


def _prompt(block: Prompt, *, unfolded: bool) -> str:
    """A prompt with its reference, and the answers as cards beside each other, or below where the page is narrow."""
    question = _card("Prompt", block.prompt) + _card("Reference", block.reference)
    answers = "".join(_card(label, answer) for label, answer in block.answers)
    return (
        f"<details{' open' if unfolded else ''}><summary>{_text(block.title)}: {_text(_shortened(block.prompt))}"
        f'</summary>\n<div class="given">\n{question}</div>\n<div class="answers">\n{answers}</div>\n</details>'
    )


def _card(title: str, text: str) -> str:
    # A line end right after <pre> is not shown, so each text brings one.
    return f'<div class="card"><h4>{_text(title)}</h4><pre>\n{_text(text)}</pre></div>\n'


def _shortened(text: str, most: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3].rstrip()}..."
