"""report.html: a document as one file that needs no other: plots, small pictures and one script are in it."""

import json
import re
from collections.abc import Sequence
from html import escape
from typing import assert_never

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
    Question,
    Questions,
    Section,
    Table,
)
from ray_peft.report.palette import VARIABLES
from ray_peft.report.script import POLICY, SCRIPT
from ray_peft.report.stylesheet import CSS

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ID = re.compile(r'(?<=\sid=")|(?<=url\(#)|(?<=xlink:href="#)')
_NOT_NEEDED = re.compile(r"<metadata>.*?</metadata>|<style\b.*?</style>|<!--.*?-->", re.DOTALL)
_SIZE = re.compile(r' (?:width|height)="[^"]*"')
_COLOUR = re.compile("|".join(VARIABLES))


def to_html(document: Document) -> str:
    """The file's text."""
    anchored = [(section, f"s{number}") for number, section in enumerate(document.sections)]
    main = [(section, anchor) for section, anchor in anchored if not section.appendix]
    appendix = [(section, anchor) for section, anchor in anchored if section.appendix]
    links = [f'<a href="#{anchor}">{_text(section.title)}</a>\n' for section, anchor in main]
    links += ['<a href="#appendix">Appendix</a>\n'] if appendix else []
    body = [
        f"<h1>{_text(document.title)}</h1>",
        *(_block(block) for block in document.head),
        f'<nav aria-label="Sections">\n{"".join(links)}</nav>' if links else "",
        *(_section(section, anchor) for section, anchor in main),
        '<div id="appendix">\n<p><strong>Appendix</strong></p>' if appendix else "",
        *(_folded_section(section, anchor) for section, anchor in appendix),
        "</div>" if appendix else "",
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{_text(document.title)}</title>",
            f"<style>\n{CSS}\n</style>",
            "</head>",
            "<body>",
            *(part for part in body if part),
            f"<script>\n{SCRIPT}\n</script>",
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
    return "\n".join([f'<section id="{anchor}">', f"<h2>{_text(section.title)}</h2>", *_blocks(section), "</section>"])


def _folded_section(section: Section, anchor: str) -> str:
    summary = f"<summary><h2>{_text(section.title)}</h2></summary>"
    return "\n".join([f'<details class="appendix" id="{anchor}">', summary, *_blocks(section), "</details>"])


def _blocks(section: Section) -> list[str]:
    blocks = []
    prompts = 0
    for block in section.blocks:
        blocks.append(_block(block, unfolded=not prompts))
        prompts += isinstance(block, Prompt)
    return blocks


def _block(block: Block, *, unfolded: bool = True) -> str:  # noqa: C901  # one case a kind of block
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
            wide = ' class="wide"' if block.wide else ""
            return f"<figure{wide}>\n{inline_svg(block)}\n<figcaption>{_text(block.title)}</figcaption>\n</figure>"
        case Prompt():
            return _prompt(block, unfolded=unfolded)
        case Gallery():
            return _gallery(block)
        case Questions():
            return _questions(block)
        case Comparison():
            settings = json.dumps({"trials": block.trials, "settings": block.settings}, separators=(",", ":"))
            return f'<div class="comparison" data-settings="{_text(settings)}"></div>'
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
    # What can be scrolled must be reached by the keyboard; a table that fits must not be in its way.
    box, kind = ("<div", ' class="fits"') if block.fits else ('<div class="scroll" tabindex="0"', "")
    table = f"{box}><table{kind}>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
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


def _questions(block: Questions) -> str:
    systems = _text(json.dumps(block.systems))
    rows = "\n".join(_question(question, block.systems) for question in block.questions)
    return (
        f'<div class="questions" data-systems="{systems}" data-measure="{_text(block.measure)}" '
        f'data-right="{block.right_from:g}">\n<div class="list" tabindex="0">\n{rows}\n</div>\n</div>'
    )


def _question(question: Question, systems: Sequence[str]) -> str:
    """One row: what was given, then every answer with its score."""
    scores = " ".join(f"{score:g}" for score in question.scores)
    start = question.reference if question.prompt is None else question.prompt
    texts = [("Prompt", question.prompt)] if question.prompt is not None else []
    texts += [("Reference", question.reference)]
    texts += [
        (f"{label}: {score:.3f}", answer)
        for label, score, answer in zip(systems, question.scores, question.answers, strict=True)
    ]
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(text)}</dd></div>" for name, text in texts)
    return (
        f'<details data-scores="{scores}"><summary>Row {question.number}: {_text(_shortened(start, 70))}</summary>'
        f"<dl>{cells}</dl></details>"
    )


def _card(title: str, text: str) -> str:
    # A line end right after <pre> is not shown, so each text brings one.
    return f'<div class="card"><h4>{_text(title)}</h4><pre>\n{_text(text)}</pre></div>\n'


def _shortened(text: str, most: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3].rstrip()}..."
