"""Any text inside Markdown, so that a reader of the rendered page sees the text itself."""

import re
from collections.abc import Sequence

_INLINE = re.compile(r"[\\`*\[\]<>&|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_BLOCK_START = re.compile(r"^(?:[-+=]|\d+(?=[.)]))")
_BLANKS = re.compile(r"[ \t\r\n]+")
_LINE_ENDS = re.compile(r"\r\n|[\r\n]")


def inline(text: str) -> str:
    """`text` on one line, for a heading, a list entry or a cell of a table; spaces that touch fold into one."""
    return _INLINE.sub(lambda match: f"\\{match.group()}", _BLANKS.sub(" ", text).strip(" "))


def paragraphs(text: str) -> str:
    """`text` as paragraphs; line ends stay, indentation goes."""
    return "\n".join(_at_line_start(inline(line)) for line in _LINE_ENDS.split(text)).strip("\n")


def entry(text: str) -> str:
    """`text` as the content of one list entry."""
    return _at_line_start(inline(text))


def fenced(text: str) -> str:
    """`text` as a code block, every character and line as it is."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A table of cells that are escaped already; columns from `text_columns` on hold numbers, to the right."""
    rule = [":---" if index < text_columns else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def _at_line_start(text: str) -> str:
    def escape(match: re.Match[str]) -> str:
        character = match.group()
        return f"{character}\\" if character.isdigit() else f"\\{character}"

    return _BLOCK_START.sub(escape, text)
