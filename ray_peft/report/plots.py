"""Plots as SVG text: quality against cost, losses over steps, when trials ran; the only module that draws."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ray_peft.report.costs import costs
from ray_peft.report.curves import Points, extreme_points, finite, mean_points, thinned
from ray_peft.report.digits import fixed
from ray_peft.report.document import Figure
from ray_peft.report.material import Material
from ray_peft.report.palette import FAINT, GRID, INK, PAPER, SERIES, Style, styles
from ray_peft.report.recommend import pareto
from ray_peft.report.table import Phase, Row, SeedGroup
from ray_peft.report.ties import Family, heading
from ray_peft.report.timeline import Lane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_WIDTH, _WIDE = 7.0, 12.0
_MOST_LANES = 40
_LEGEND_WIDTH = 88
"""Characters of legend that fit side by side."""
_Place: TypeAlias = Literal["outside lower left", "outside right upper"]
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
    drawn = _styles(units)
    with _canvas(2.9 * len(panels), units) as canvas:
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
        _legend(canvas, entries, marker=False)
        return [Figure(name="losses", title="Loss over steps" + _shown(material), svg=_svg(canvas))]


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


def quality_against_cost(material: Material) -> list[Figure]:
    """Quality of what can be compared, over memory and over time side by side, with the Pareto front."""
    figures = []
    families = [family for family in material.families if len(family.units) > 1]
    for number, family in enumerate(families, 1):
        needs = costs(family.units)
        panels = [
            (cost_label, values)
            for cost_label, values, problem in (
                ("Peak memory [GiB]", needs.memory_gib, needs.memory_problem),
                ("Training time [s]", needs.time_s, needs.time_problem),
            )
            if problem is None and len({value for value in values if value is not None}) > 1
        ]
        if panels:
            end = f"_{number}" if len(families) > 1 else ""
            title = f"Quality against {' and '.join(label.partition(' [')[0].lower() for label, _ in panels)}"
            title += f" ({heading(family, number, families)})" if len(families) > 1 else ""
            figures.append(Figure(name=f"quality{end}", title=title, svg=_scatter(family, panels), wide=True))
    return figures


def timeline(ran: Sequence[Lane]) -> list[Figure]:
    """When each trial ran; what stays white was idle."""
    if not ran:
        return []
    shown = ran[:_MOST_LANES]
    methods = list(dict.fromkeys(method for lane in shown for span in lane.spans for method in [_method(span.row)]))
    colours = dict(zip(methods, (style.colour for style in styles(len(methods))), strict=True))
    end = max(span.end_s for lane in ran for span in lane.spans)
    unit, seconds = ("h", 3600) if end > 7200 else ("min", 60) if end > 300 else ("s", 1)
    with _canvas(1.3 + 0.3 * len(shown), (), width=_WIDE) as canvas:
        axes = canvas.subplots()
        for place, lane in enumerate(shown):
            for method, colour in colours.items():
                spans = [span for span in lane.spans if _method(span.row) == method]
                bars = [(span.start_s / seconds, (span.end_s - span.start_s) / seconds) for span in spans]
                # A rim tells bars apart, and would hide a bar that is hardly wider than itself.
                rims = [PAPER if width * seconds > end / 200 else colour for _, width in bars]
                axes.broken_barh(bars, (place - 0.36, 0.72), facecolors=colour, edgecolors=rims, linewidth=0.6)
            for span in lane.spans:
                if span.row.status != "finished":
                    axes.plot([span.end_s / seconds], [place], "x", color=INK, markersize=5)
        axes.set_yticks(range(len(shown)), [textwrap.fill(lane.name, 34) for lane in shown])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, end / seconds * 1.01)
        axes.set_xlabel(f"Time since the first trial began [{unit}]; x: a trial that did not finish")
        from matplotlib.patches import Patch

        handles = [Patch(color=colour, label=method) for method, colour in colours.items()]
        canvas.legend(handles=handles, loc="outside lower left", ncols=min(8, len(handles)))
        more = f": {len(shown)} of {len(ran)} lanes" if len(shown) < len(ran) else ""
        return [Figure(name="timeline", title=f"When each trial ran{more}", svg=_svg(canvas), wide=True)]


def _method(row: Row) -> str:
    return row.result.spec.method.name


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


def _scatter(family: Family, panels: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    drawn = _styles(family.units)
    sign = 1 if family.measure == "rouge_l" else -1
    with _canvas(2.3, (), width=_WIDE) as canvas:
        several = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (cost_label, needs) in zip(several, panels, strict=True):
            points = [(place, cost) for place, cost in enumerate(needs) if cost is not None]
            front = pareto([cost for _, cost in points], [sign * family.values[place] for place, _ in points])
            line = [(points[index][1], family.values[points[index][0]]) for index in front]
            axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
            _passed_over(axes, family, cost_label)
            for place, cost in points:
                unit, style = family.units[place], drawn[place]
                if family.intervals:
                    interval = family.intervals[place]
                    axes.vlines(cost, interval.low, interval.high, color=style.colour, linewidth=1.4, alpha=0.7)
                _seed_points(axes, unit, family, cost_label, style)
                axes.plot(
                    [cost], [family.values[place]], style.marker, color=style.colour, markersize=7,
                    markeredgecolor=INK if place in [points[index][0] for index in front] else PAPER,
                )  # fmt: skip
            seeds = ", greatest of the seeds" if "memory" in cost_label and _seed_note(family.units) else ""
            axes.set_xlabel(cost_label + seeds)
            axes.margins(0.08, 0.12)
        several[0].set_ylabel("ROUGE-L" if sign > 0 else "Held-out loss (lower is better)")
        several[0].set_title(
            "Dashed, dark rims: Pareto front"
            + ("; bars: 95 % interval" if family.intervals else "")
            + ("; dots: other settings" if family.passed_over else ""),
            fontsize=9, color=FAINT,
        )  # fmt: skip
        _legend(
            canvas,
            [(unit.label, style) for unit, style in zip(family.units, drawn, strict=True)],
            place="outside right upper",
        )
        return _svg(canvas)


def _passed_over(axes: Axes, family: Family, cost_label: str) -> None:
    """The settings that were not chosen, as dots without intervals."""
    rows = [row for unit in family.passed_over for row in unit.finished]
    points = [
        (cost, quality)
        for row in rows
        for cost, quality in [(_cost(row, cost_label), _quality(row, family))]
        if cost is not None and quality is not None
    ]
    if points:
        axes.plot(*zip(*points, strict=True), ".", color=FAINT, markersize=3.5, alpha=0.6, zorder=0)


def _seed_points(axes: Axes, unit: SeedGroup, family: Family, cost_label: str, style: Style) -> None:
    if len(unit.finished) < 2:
        return
    for row in unit.finished:
        cost, quality = _cost(row, cost_label), _quality(row, family)
        if cost is not None and quality is not None:
            axes.plot([cost], [quality], style.marker, color=style.colour, markersize=4, alpha=0.55)


def _cost(row: Row, cost_label: str) -> float | None:
    return row.peak_memory_gib if "memory" in cost_label else row.seconds("train_s")


def _quality(row: Row, family: Family) -> float | None:
    return row.rouge_l.value if family.measure == "rouge_l" else row.eval_loss.value


def _styles(units: Sequence[SeedGroup]) -> list[Style]:
    bases = [place for place, unit in enumerate(units) if unit.is_base]
    return styles(len(units), base=bases[0] if len(bases) == 1 else None)


def _seed_note(units: Sequence[SeedGroup]) -> str:
    return "; each seed and their mean" if any(len(unit.rows) > 1 for unit in units) else ""


@contextmanager
def _canvas(height: float, legend: Sequence[SeedGroup], *, width: float = _WIDTH) -> Iterator[Canvas]:
    """A figure of so many inches, and more for the legend of the units."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    labels = [_wrapped(unit.label) for unit in legend]
    lines = sum(label.count("\n") + 1 for label in labels) if labels else 0
    with rc_context(_SETTINGS):
        yield Canvas(
            figsize=(width, height + 0.2 * -(-lines // (_columns(labels) if labels else 1))), layout="constrained"
        )


def _legend(
    canvas: Canvas, entries: Sequence[tuple[str, Style]], *, marker: bool = True, place: _Place = "outside lower left"
) -> None:
    """Outside of the axes, so that it covers nothing; at the right as one narrow column."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=style.colour, linewidth=1.7, linestyle="none" if marker else style.line,
               marker=style.marker if marker else None,
               label=textwrap.fill(label, 30) if "right" in place else _wrapped(label))
        for label, style in entries
    ]  # fmt: skip
    columns = 1 if "right" in place else _columns([_wrapped(label) for label, _ in entries])
    canvas.legend(handles=handles, loc=place, ncols=columns)


def _wrapped(label: str) -> str:
    return textwrap.fill(label, _LEGEND_WIDTH - 6, break_on_hyphens=False)


def _columns(labels: Sequence[str]) -> int:
    return max(1, min(4, len(labels), _LEGEND_WIDTH // (max(map(len, labels)) + 6)))


def _svg(canvas: Canvas) -> str:
    """The same text for the same data: no date, no version."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
