"""Plots as SVG text: losses over steps, memory and time, quality against cost; the only module that draws."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ray_peft.report.costs import costs
from ray_peft.report.curves import finite, mean_points, thinned
from ray_peft.report.digits import fixed
from ray_peft.report.document import Figure
from ray_peft.report.material import Material
from ray_peft.report.palette import FAINT, GRID, INK, PAPER, SERIES, Style, styles
from ray_peft.report.recommend import pareto
from ray_peft.report.table import Phase, Row, SeedGroup
from ray_peft.report.ties import Family

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_WIDTH = 7.0
_LEGEND_WIDTH = 88
"""Characters of legend that fit side by side."""
_PHASES: tuple[tuple[Phase, str, str], ...] = (
    ("load_s", "load", SERIES[4]),
    ("train_s", "training", SERIES[0]),
    ("evaluate_s", "evaluate", SERIES[5]),
    ("save_s", "save", SERIES[3]),
)
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


def losses(material: Material) -> list[Figure]:
    """Training and held-out loss of every trial over its steps."""
    rows = [row for unit in material.units for row in unit.rows]
    panels = [
        (title, curves)
        for title, curves in (
            ("Training loss", {row.trial_id: finite(material.curve(row).train) for row in rows}),
            ("Held-out loss", {row.trial_id: finite(material.curve(row).held_out) for row in rows}),
        )
        if any(len(points) > 1 for points in curves.values())
    ]
    if not panels:
        return []
    drawn = _styles(material.units)
    with _canvas(2.9 * len(panels), material.units) as canvas:
        several = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, curves) in zip(several, panels, strict=True):
            for unit, style in zip(material.units, drawn, strict=True):
                of_seeds = [curves[row.trial_id] for row in unit.rows if curves[row.trial_id]]
                for points in of_seeds if len(of_seeds) > 1 else ():
                    _line(axes, thinned(points), style, faint=True)
                # A seed that stopped early would end the mean there.
                finished = [curves[row.trial_id] for row in unit.finished if curves[row.trial_id]]
                _line(axes, thinned(mean_points(finished or of_seeds)), style)
            axes.set_title(title)
            _mark_boundaries(axes, material)
        several[-1].set_xlabel("Optimizer step" + _seed_note(material.units))
        entries = [
            (unit.label, style)
            for unit, style in zip(material.units, drawn, strict=True)
            if any(curves[row.trial_id] for _, curves in panels for row in unit.rows)
        ]
        _legend(canvas, entries, marker=False)
        return [Figure(name="losses", title="Loss over steps", svg=_svg(canvas))]


def resources(material: Material) -> list[Figure]:
    """Bars of peak memory and of time; a unit is the mean over its seeds, which are dots."""
    figures = []
    memory = [unit for unit in material.units if any(row.peak_memory_gib is not None for row in unit.rows)]
    if memory:
        figures.append(Figure(name="memory", title="Peak memory", svg=_memory_bars(memory)))
    timed = [unit for unit in material.units if any(_phase_sum(row) for row in unit.finished)]
    if timed:
        figures.append(Figure(name="time", title="Time", svg=_time_bars(timed)))
    return figures


def quality_against_cost(material: Material) -> list[Figure]:
    """Quality of the rows that can be compared, over memory and over time, with the Pareto front."""
    figures = []
    families = [family for family in material.families if len(family.units) > 1]
    for number, family in enumerate(families, 1):
        needs = costs(family.units)
        end = f"_{number}" if len(families) > 1 else ""
        for name, cost_label, values, problem in (
            ("memory", "Peak memory [GiB]", needs.memory_gib, needs.memory_problem),
            ("time", "Training time [s]", needs.time_s, needs.time_problem),
        ):
            if problem is None and len({value for value in values if value is not None}) > 1:
                svg = _scatter(family, values, cost_label, material)
                title = f"Quality against {cost_label.partition(' [')[0].lower()}"
                figures.append(Figure(name=f"quality_{name}{end}", title=title, svg=svg))
    return figures


def _line(axes: Axes, points: Sequence[tuple[int, float]], style: Style, *, faint: bool = False) -> None:
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=style.colour,
            linestyle="solid" if faint else style.line,
            linewidth=0.8 if faint else 1.7,
            alpha=0.4 if faint else 1.0,
            marker=style.marker if len(points) < 8 else None,
            markersize=2.5 if faint else 4,
        )


def _mark_boundaries(axes: Axes, material: Material) -> None:
    ends: dict[int, list[str]] = {}
    for unit in material.units:
        for step in sorted({step for row in unit.rows for step in material.curve(row).boundaries}):
            ends.setdefault(step, []).append(unit.label)
    for step, labels in ends.items():
        axes.axvline(step, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
        text = f"{labels[0]}: next stage" if len(labels) == 1 else f"{len(labels)} trials: next stage"
        if len(ends) == 1:
            axes.annotate(
                text, (step, 1), xycoords=("data", "axes fraction"), xytext=(3, 2), textcoords="offset points",
                color=FAINT, fontsize=8, ha="left", va="bottom",
            )  # fmt: skip


def _memory_bars(units: Sequence[SeedGroup]) -> str:
    with _canvas(0.9 + 0.42 * len(units), ()) as canvas:
        axes = canvas.subplots()
        for place, unit in enumerate(units):
            peaks = [row.peak_memory_gib for row in unit.rows if row.peak_memory_gib is not None]
            ended = bool(unit.finished)
            bar = axes.barh(place, fmean(peaks), height=0.6, color=SERIES[0] if ended else FAINT)
            if not ended:
                bar.patches[0].set_hatch("///")
            _dots(axes, peaks, place)
            status = "" if ended else f", {unit.rows[0].status.replace('_', ' ')}"
            _note(axes, max(peaks), place, f"{fixed(fmean(peaks), 2)}{status}")
        kinds = {row.on_gpu for unit in units for row in unit.rows if row.peak_memory_gib is not None}
        kind = "allocated on one GPU while training" if kinds == {True} else "resident memory of the process"
        _finish_bars(axes, units, f"Peak memory [GiB], {kind if len(kinds) == 1 else 'on a GPU, or of the process'}")
        return _svg(canvas)


def _time_bars(units: Sequence[SeedGroup]) -> str:
    with _canvas(1.3 + 0.42 * len(units), ()) as canvas:
        axes = canvas.subplots()
        for place, unit in enumerate(units):
            left = 0.0
            for phase, name, colour in _PHASES:
                width = fmean(row.seconds(phase) or 0.0 for row in unit.finished)
                axes.barh(place, width, left=left, height=0.6, color=colour, label=name if place == 0 else None)
                left += width
            totals = [_phase_sum(row) for row in unit.finished]
            _dots(axes, totals, place)
            _note(axes, max(totals), place, fixed(left, 1))
        _finish_bars(axes, units, "Time [s]")
        canvas.legend(loc="outside lower center", ncols=len(_PHASES))
        return _svg(canvas)


def _phase_sum(row: Row) -> float:
    return sum(row.seconds(phase) or 0.0 for phase, *_ in _PHASES)


def _dots(axes: Axes, values: Sequence[float], place: int) -> None:
    """The seeds of a bar, where there are several."""
    if len(values) > 1:
        axes.plot(values, [place] * len(values), "o", color=PAPER, markeredgecolor=INK, markersize=4, clip_on=False)


def _note(axes: Axes, value: float, place: int, text: str) -> None:
    axes.annotate(text, (value, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)


def _finish_bars(axes: Axes, units: Sequence[SeedGroup], label: str) -> None:
    axes.set_yticks(range(len(units)), [textwrap.fill(unit.label, 30) for unit in units])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.25 if any(not unit.finished for unit in units) else 0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(label + _seed_note(units))


def _scatter(family: Family, needs: Sequence[float | None], cost_label: str, material: Material) -> str:
    all_styles = dict(zip((unit.label for unit in material.units), _styles(material.units), strict=True))
    points = [(place, cost) for place, cost in enumerate(needs) if cost is not None]
    sign = 1 if family.measure == "rouge_l" else -1
    with _canvas(3.7, [family.units[place] for place, _ in points]) as canvas:
        axes = canvas.subplots()
        front = pareto([cost for _, cost in points], [sign * family.values[place] for place, _ in points])
        line = [(points[index][1], family.values[points[index][0]]) for index in front]
        axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        for place, cost in points:
            unit, style = family.units[place], all_styles[family.units[place].label]
            if family.intervals:
                interval = family.intervals[place]
                axes.vlines(cost, interval.low, interval.high, color=style.colour, linewidth=1.2, alpha=0.6)
            _seed_points(axes, unit, family, cost_label, style)
            axes.plot(
                [cost], [family.values[place]], style.marker, color=style.colour, markersize=8, markeredgecolor=PAPER
            )
        axes.set_xlabel(
            cost_label + (", greatest of the seeds" if "memory" in cost_label and _seed_note(family.units) else "")
        )
        axes.set_ylabel("ROUGE-L" if sign > 0 else "Held-out loss (lower is better)")
        axes.margins(0.08, 0.12)
        axes.set_title(
            "Dashed: Pareto front of the values" + ("; bars: 95 % interval over rows" if family.intervals else ""),
            fontsize=9, color=FAINT,
        )  # fmt: skip
        _legend(canvas, [(family.units[place].label, all_styles[family.units[place].label]) for place, _ in points])
        return _svg(canvas)


def _seed_points(axes: Axes, unit: SeedGroup, family: Family, cost_label: str, style: Style) -> None:
    if len(unit.finished) < 2:
        return
    for row in unit.finished:
        cost = row.peak_memory_gib if "memory" in cost_label else row.seconds("train_s")
        quality = row.rouge_l.value if family.measure == "rouge_l" else row.eval_loss.value
        if cost is not None and quality is not None:
            axes.plot([cost], [quality], style.marker, color=style.colour, markersize=4, alpha=0.55)


def _styles(units: Sequence[SeedGroup]) -> list[Style]:
    bases = [place for place, unit in enumerate(units) if unit.is_base]
    return styles(len(units), base=bases[0] if len(bases) == 1 else None)


def _seed_note(units: Sequence[SeedGroup]) -> str:
    return "; each seed and their mean" if any(len(unit.rows) > 1 for unit in units) else ""


@contextmanager
def _canvas(height: float, legend: Sequence[SeedGroup]) -> Iterator[Canvas]:
    """A figure of so many inches, and more for the legend of the units."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    labels = [_wrapped(unit.label) for unit in legend]
    lines = sum(label.count("\n") + 1 for label in labels) if labels else 0
    with rc_context(_SETTINGS):
        yield Canvas(
            figsize=(_WIDTH, height + 0.2 * -(-lines // (_columns(labels) if labels else 1))), layout="constrained"
        )


def _legend(canvas: Canvas, entries: Sequence[tuple[str, Style]], *, marker: bool = True) -> None:
    """Below the axes, so that it covers nothing."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=style.colour, linewidth=1.7, linestyle="none" if marker else style.line,
               marker=style.marker if marker else None, label=_wrapped(label))
        for label, style in entries
    ]  # fmt: skip
    columns = _columns([_wrapped(label) for label, _ in entries])
    canvas.legend(handles=handles, loc="outside lower left", ncols=columns)


def _wrapped(label: str) -> str:
    return textwrap.fill(label, _LEGEND_WIDTH - 6, break_on_hyphens=False)


def _columns(labels: Sequence[str]) -> int:
    return max(1, min(4, len(labels), _LEGEND_WIDTH // (max(map(len, labels)) + 6)))


def _svg(canvas: Canvas) -> str:
    """The same text for the same data: no date, no version."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
