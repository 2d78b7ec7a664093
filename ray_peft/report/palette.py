"""Colours of plots and page: told apart by colour-blind readers, in light and in dark.

Plots are drawn in the light colours; in a page each of them becomes a CSS variable, so that a dark page redraws them.
The series are those of Okabe and Ito 2008 without the yellow, which is too light on white.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

INK, FAINT, GRID, PAPER = "#1b1c1e", "#5d6066", "#dcdde1", "#ffffff"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")

Line: TypeAlias = Literal["solid"] | tuple[float, tuple[float, ...]]
"""Solid, or an offset with the lengths of dashes and gaps."""

_DARK = {
    INK: "#e8e8ea",
    FAINT: "#a6a9b0",
    GRID: "#3a3d43",
    PAPER: "#17181b",
    "#0072b2": "#4ba6e0",
    "#d55e00": "#f2803d",
    "#009e73": "#2fc496",
    "#cc79a7": "#e09cc4",
    "#56b4e9": "#a5dbfa",
    "#e69f00": "#f5bc45",
}
_LINES: tuple[Line, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = ("o", "s", "^", "D")

VARIABLES = {colour: f"--c{place}" for place, colour in enumerate(_DARK)}
"""By light colour the CSS variable that stands for it in a page."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one compared unit is drawn."""

    colour: str
    line: Line
    marker: str


def styles(number: int, *, base: int | None = None) -> list[Style]:
    """A style for each unit, all different up to 24; the base is drawn in the colour of text."""
    chosen = []
    place = 0
    for unit in range(number):
        if unit == base:
            chosen.append(Style(colour=INK, line="solid", marker="X"))
            continue
        turn, colour = divmod(place, len(SERIES))
        chosen.append(
            Style(
                colour=SERIES[colour],
                line=_LINES[turn % len(_LINES)],
                marker=_MARKERS[turn % len(_MARKERS)],
            )
        )
        place += 1
    return chosen


def css_variables(*, dark: bool) -> str:
    """Declarations of the variables."""
    return " ".join(f"{name}: {_DARK[colour] if dark else colour};" for colour, name in VARIABLES.items())
