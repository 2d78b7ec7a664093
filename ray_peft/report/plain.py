"""Lines for a console of any encoding: pure ASCII, no control characters."""

import textwrap
from collections.abc import Sequence

from ray_peft.report.digits import MISSING, fixed, speed, spread_text
from ray_peft.report.table import Row, Score, SeedGroup, error_line, rows, seed_groups
from ray_peft.trial.result import TrialResult

WIDTH = 118
"""Columns of the console that a table may fill."""

_ENDED = {
    "finished": "finished in",
    "stopped_early": "was stopped early after",
    "failed": "failed after",
    "out_of_memory": "ran out of memory after",
    "cancelled": "was cancelled after",
}
_GAP = "  "
_NARROWEST_LABEL = 17
"""No narrower than the header."""


def trial_line(result: TrialResult, ended: int, total: int) -> str:
    """One line for a trial that has ended, such as `[2/4] lora-1a2b3c4d finished in 61.3 s: eval loss 2.104`.

    Args:
        result: the trial.
        ended: trials that have ended, this one included.
        total: trials of the sweep.
    """
    scores = result.scores
    row = Row(label="", result=result, base=None)
    parts = [
        ("eval loss ", fixed(scores.eval_loss, 3), ""),
        ("BLEU-4 ", fixed(scores.bleu4, 4), ""),
        ("ROUGE-L ", fixed(scores.rouge_l, 4), ""),
        ("style ", fixed(scores.style_heldout, 4), ""),
        ("peak ", fixed(row.peak_memory_gib, 2), " GiB"),
    ]
    measured = ", ".join(before + text + after for before, text, after in parts if text != MISSING)
    if result.resumed_from_step is not None:
        measured = f"{measured}, resumed from step {result.resumed_from_step}".removeprefix(", ")
    outcome = measured if result.status == "finished" else error_line(result)
    start = f"[{ended}/{total}] {result.trial_id} {_ENDED[result.status]} {fixed(result.usage.wall_time_s, 1)} s"
    return ascii_line(f"{start}: {outcome}" if outcome else start)


def console_table(results: Sequence[TrialResult]) -> str:
    """The comparison in at most 118 columns: scores, differences to the base, memory, time and speed.

    Columns that no trial fills are left out. Below follow the means over seeds, and the reason of every trial that
    did not finish.
    """
    compared = rows(results)
    if not compared:
        return "No trial has a result."
    memory = {True: "GPU GiB", False: "RSS GiB"}
    kinds = {row.on_gpu for row in compared if row.peak_memory_gib is not None}
    header = ["trial", "status", "eval loss", "vs base", "BLEU-4", "vs base", "ROUGE-L", "vs base"]
    header += ["style", "vs base", "nearest"]
    header += [memory[kinds.pop()] if len(kinds) == 1 else "peak GiB", "train s", "tokens/s", "images/s", "it/s"]
    blocks = [_aligned(header, [_cells(row) for row in compared])]
    groups = seed_groups(compared)
    if groups:
        header = ["mean (min to max)", "seeds", "eval loss", "BLEU-4", "ROUGE-L", "style"]
        blocks.append(_aligned(header, [_group_cells(group) for group in groups]))
    reasons = [_reason(row) for row in compared if row.status != "finished"]
    return "\n\n".join([*blocks, *(["\n".join(reasons)] if reasons else [])])


def ascii_line(text: str) -> str:
    """`text` on one line in printable ASCII; any other character becomes its escape sequence."""
    return "".join(char if " " <= char <= "~" else char.encode("unicode_escape").decode("ascii") for char in text)


def _cells(row: Row) -> list[str]:
    return [
        row.label,
        row.status.replace("_", " "),
        *_score(row.eval_loss, 3),
        *_score(row.bleu4, 4),
        *_score(row.rouge_l, 4),
        *_score(row.style_heldout, 4),
        fixed(row.nearest_train.value, 4),
        fixed(row.peak_memory_gib, 2),
        fixed(row.seconds("train_s"), 1),
        speed(row.result.usage.tokens_per_s),
        speed(row.result.usage.images_per_s),
        fixed(row.result.usage.steps_per_s if row.of_images else None, 2),
    ]


def _score(score: Score, places: int) -> tuple[str, str]:
    return fixed(score.value, places), fixed(score.difference, places, signed=True)


def _group_cells(group: SeedGroup) -> list[str]:
    return [
        group.label,
        f"{len(group.finished)}/{len(group.rows)}",
        spread_text(group.spread(lambda row: row.eval_loss.value), 3),
        spread_text(group.spread(lambda row: row.bleu4.value), 4),
        spread_text(group.spread(lambda row: row.rouge_l.value), 4),
        spread_text(group.spread(lambda row: row.style_heldout.value), 4),
    ]


def _reason(row: Row) -> str:
    status = row.status.replace("_", " ")
    line = ascii_line(f"{row.label}: {status}: {error_line(row.result)}")
    return textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _aligned(header: list[str], lines: list[list[str]]) -> str:
    """Text columns to the left and numbers to the right; long labels go on below; empty columns are left out."""
    filled = [index for index in range(len(header)) if index < 2 or any(line[index] != MISSING for line in lines)]
    names, *body = [[line[index] for index in filled] for line in [header, *lines]]
    widths = [max(len(line[index]) for line in [names, *body]) for index in range(len(filled))]
    room = WIDTH - sum(widths[1:]) - len(_GAP) * (len(widths) - 1)
    widths[0] = min(widths[0], max(room, _NARROWEST_LABEL))
    printed = [aligned_line(names, widths), aligned_line(["-" * width for width in widths], widths)]
    for line in body:
        first, *more = textwrap.wrap(line[0], widths[0], break_on_hyphens=False, subsequent_indent="  ")
        printed += [aligned_line([first, *line[1:]], widths), *more]
    return "\n".join(printed)


def aligned_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table: the first two cells to the left, numbers to the right."""
    words = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return _GAP.join([*words, *numbers]).rstrip()
