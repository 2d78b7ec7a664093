"""The plots of quality against cost, which are the picture of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_peft.report.costs import costs
from ray_peft.report.document import Figure
from ray_peft.report.drawing import WIDE, canvas_of, legend, seed_note, svg_of, unit_styles
from ray_peft.report.material import Material
from ray_peft.report.palette import FAINT, INK, PAPER, Style
from ray_peft.report.recommend import pareto
from ray_peft.report.table import Row, SeedGroup
from ray_peft.report.ties import Family, heading

if TYPE_CHECKING:
    from ray_peft.report.drawing import Axes


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


def _scatter(family: Family, panels: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    drawn = unit_styles(family.units)
    sign = 1 if family.gains else -1
    with canvas_of(2.3, (), width=WIDE) as canvas:
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
            seeds = ", greatest of the seeds" if "memory" in cost_label and seed_note(family.units) else ""
            axes.set_xlabel(cost_label + seeds)
            axes.margins(0.08, 0.12)
        several[0].set_ylabel(family.measure_title + ("" if family.gains else " (lower is better)"))
        several[0].set_title(
            "Dashed, dark rims: Pareto front"
            + ("; bars: 95 % interval" if family.intervals else "")
            + ("; dots: other settings" if family.passed_over else ""),
            fontsize=9, color=FAINT,
        )  # fmt: skip
        legend(
            canvas,
            [(unit.label, style) for unit, style in zip(family.units, drawn, strict=True)],
            place="outside right upper",
        )
        return svg_of(canvas)


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
    if family.measure == "reward_accuracy":
        return row.result.scores.reward_accuracy
    return row.rouge_l.value if family.measure == "rouge_l" else row.eval_loss.value
