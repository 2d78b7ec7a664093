"""A canvas for plots and what all of them share, from fonts to the SVG text; the only module that knows matplotlib."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ray_peft.report.palette import FAINT, GRID, INK, PAPER, Style, styles
from ray_peft.report.table import SeedGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Canvas

WIDTH, WIDE = 7.0, 12.0
"""Inches: of a plot beside others, and of one as wide as a page."""
_LEGEND_WIDTH = 88
"""Characters of legend that fit side by side."""
_Place: TypeAlias = Literal["outside lower left", "outside right upper"]
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "ray_peft",
    "svg.fonttype": "path",  # the same picture wherever it is shown
    "text.parse_math": False,  # a label may hold a dollar sign
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.color": PAPER,
}


@contextmanager
def canvas_of(height: float, legend: Sequence[SeedGroup], *, width: float = WIDTH) -> Iterator[Canvas]:
    """A figure of so many inches, and more for the legend of the units."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    labels = [wrapped(unit.label) for unit in legend]
    lines = sum(label.count("\n") + 1 for label in labels) if labels else 0
    with rc_context(_SETTINGS):
        yield Canvas(
            figsize=(width, height + 0.2 * -(-lines // (_columns(labels) if labels else 1))), layout="constrained"
        )


def legend(
    canvas: Canvas, entries: Sequence[tuple[str, Style]], *, marker: bool = True, place: _Place = "outside lower left"
) -> None:
    """Outside of the axes, so that it covers nothing; at the right as one narrow column."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=style.colour, linewidth=1.7, linestyle="none" if marker else style.line,
               marker=style.marker if marker else None,
               label=textwrap.fill(label, 30) if "right" in place else wrapped(label))
        for label, style in entries
    ]  # fmt: skip
    columns = 1 if "right" in place else _columns([wrapped(label) for label, _ in entries])
    canvas.legend(handles=handles, loc=place, ncols=columns)


def colour_legend(canvas: Canvas, colours: Mapping[str, str]) -> None:
    """A patch of each colour with its name, below the axes."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    canvas.legend(handles=handles, loc="outside lower left", ncols=min(8, len(handles)))


def unit_styles(units: Sequence[SeedGroup]) -> list[Style]:
    """A style for each unit; a single unit without fine-tuning stands out."""
    bases = [place for place, unit in enumerate(units) if unit.is_base]
    return styles(len(units), base=bases[0] if len(bases) == 1 else None)


def seed_note(units: Sequence[SeedGroup]) -> str:
    """What an axis says where units have several seeds."""
    return "; each seed and their mean" if any(len(unit.rows) > 1 for unit in units) else ""


def svg_of(canvas: Canvas) -> str:
    """The same text for the same data: no date, no version."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def wrapped(label: str) -> str:
    """A label of a legend below the axes."""
    return textwrap.fill(label, _LEGEND_WIDTH - 6, break_on_hyphens=False)


def _columns(labels: Sequence[str]) -> int:
    return max(1, min(4, len(labels), _LEGEND_WIDTH // (max(map(len, labels)) + 6)))
