"""The plot of when each trial ran."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ray_peft.report.document import Figure
from ray_peft.report.drawing import WIDE, canvas_of, colour_legend, svg_of
from ray_peft.report.palette import INK, PAPER, styles
from ray_peft.report.table import Row
from ray_peft.report.timeline import Lane

_MOST_LANES = 40


def timeline(ran: Sequence[Lane[Row]]) -> list[Figure]:
    """When each trial ran; what stays white was idle."""
    if not ran:
        return []
    shown = ran[:_MOST_LANES]
    methods = list(dict.fromkeys(method for lane in shown for span in lane.spans for method in [_method(span.trial)]))
    colours = dict(zip(methods, (style.colour for style in styles(len(methods))), strict=True))
    end = max(span.end_s for lane in ran for span in lane.spans)
    unit, seconds = ("h", 3600) if end > 7200 else ("min", 60) if end > 300 else ("s", 1)
    with canvas_of(1.3 + 0.3 * len(shown), (), width=WIDE) as canvas:
        axes = canvas.subplots()
        for place, lane in enumerate(shown):
            for method, colour in colours.items():
                spans = [span for span in lane.spans if _method(span.trial) == method]
                bars = [(span.start_s / seconds, (span.end_s - span.start_s) / seconds) for span in spans]
                # A rim tells bars apart, and would hide a bar that is hardly wider than itself.
                rims = [PAPER if width * seconds > end / 200 else colour for _, width in bars]
                axes.broken_barh(bars, (place - 0.36, 0.72), facecolors=colour, edgecolors=rims, linewidth=0.6)
            for span in lane.spans:
                if span.trial.status != "finished":
                    axes.plot([span.end_s / seconds], [place], "x", color=INK, markersize=5)
        axes.set_yticks(range(len(shown)), [textwrap.fill(lane.name, 34) for lane in shown])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, end / seconds * 1.01)
        axes.set_xlabel(f"Time since the first trial began [{unit}]; x: a trial that did not finish")
        colour_legend(canvas, colours)
        more = f": {len(shown)} of {len(ran)} lanes" if len(shown) < len(ran) else ""
        return [Figure(name="timeline", title=f"When each trial ran{more}", svg=svg_of(canvas), wide=True)]


def _method(row: Row) -> str:
    return row.result.spec.method.name
