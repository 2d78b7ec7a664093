"""Plots of losses over steps, of memory and of time, as SVG text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from ray_peft.report.curves import Points, extreme_points, finite, mean_points, thinned
from ray_peft.report.digits import fixed
from ray_peft.report.document import Figure
from ray_peft.report.drawing import canvas_of, legend, seed_note, svg_of, unit_styles
from ray_peft.report.material import Material
from ray_peft.report.palette import FAINT, INK, PAPER, SERIES, Style
from ray_peft.report.table import Phase, Row, SeedGroup

if TYPE_CHECKING:
    from ray_peft.report.drawing import Axes

_PHASES: tuple[tuple[Phase, str, str], ...] = (
    ("load_s", "load", SERIES[4]),
    ("train_s", "training", SERIES[0]),
    ("evaluate_s", "evaluate", SERIES[5]),
    ("save_s", "save", SERIES[3]),
)


def losses(material: Material) -> list[Figure]:
    """Training and held-out loss of every trial over its steps."""
    units = material.main_units
    rows = [row for unit in units for row in unit.rows]
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
    drawn = unit_styles(units)
    with canvas_of(2.9 * len(panels), units) as canvas:
        several = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, curves) in zip(several, panels, strict=True):
            for unit, style in zip(units, drawn, strict=True):
                of_seeds = [curves[row.trial_id] for row in unit.rows if curves[row.trial_id]]
                # A seed that stopped early would end the mean there.
                finished = [curves[row.trial_id] for row in unit.finished if curves[row.trial_id]]
                _band(axes, finished or of_seeds, style)
                _line(axes, thinned(mean_points(finished or of_seeds)), style)
            axes.set_title(title)
            _mark_boundaries(axes, material, units)
        seeds = "; bands: from the least to the greatest seed" if any(len(unit.rows) > 1 for unit in units) else ""
        several[-1].set_xlabel("Optimizer step" + seeds)
        entries = [
            (unit.label, style)
            for unit, style in zip(units, drawn, strict=True)
            if any(curves[row.trial_id] for _, curves in panels for row in unit.rows)
        ]
        legend(canvas, entries, marker=False)
        return [Figure(name="losses", title="Loss over steps" + _shown(material), svg=svg_of(canvas))]


def resources(material: Material) -> list[Figure]:
    """Bars of peak memory and of time; a unit is the mean over its seeds, which are dots."""
    figures = []
    memory = [unit for unit in material.main_units if any(row.peak_memory_gib is not None for row in unit.rows)]
    if memory:
        figures.append(Figure(name="memory", title="Peak memory" + _shown(material), svg=_memory_bars(memory)))
    timed = [unit for unit in material.main_units if any(_phase_sum(row) for row in unit.finished)]
    if timed:
        figures.append(Figure(name="time", title="Time" + _shown(material), svg=_time_bars(timed)))
    return figures


def _band(axes: Axes, of_seeds: Sequence[Points], style: Style) -> None:
    """From the least to the greatest loss of the seeds."""
    edges = extreme_points(of_seeds) if len(of_seeds) > 1 else ()
    if edges:
        steps, low, high = zip(*thinned(edges), strict=True)
        axes.fill_between(steps, low, high, color=style.colour, alpha=0.18, linewidth=0)


def _shown(material: Material) -> str:
    """What a plot of a large sweep leaves out."""
    left_out = len(material.units) - len(material.main_units)
    return f" (the chosen settings; {left_out} others are in report.csv)" if left_out else ""


def _line(axes: Axes, points: Points, style: Style) -> None:
    if points:
        axes.plot(
            *zip(*points, strict=True), color=style.colour, linestyle=style.line, linewidth=1.7,
            marker=style.marker if len(points) < 8 else None, markersize=4,
        )  # fmt: skip


def _mark_boundaries(axes: Axes, material: Material, units: Sequence[SeedGroup]) -> None:
    ends: dict[int, list[str]] = {}
    for unit in units:
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
    with canvas_of(0.9 + 0.42 * len(units), ()) as canvas:
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
        return svg_of(canvas)


def _time_bars(units: Sequence[SeedGroup]) -> str:
    with canvas_of(1.3 + 0.42 * len(units), ()) as canvas:
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
        return svg_of(canvas)


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
    axes.set_xlabel(label + seed_note(units))
