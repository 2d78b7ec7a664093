"""The section on judged rows: how often, and by how much, each trial rates the better answer higher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_peft.metrics.intervals import DifferenceInterval, Numbers, ScoreInterval, compare, interval, mean_parts
from ray_peft.metrics.scores import RowReward
from ray_peft.report.digits import MISSING, fixed
from ray_peft.report.document import Block, Paragraph, Table
from ray_peft.report.table import Row
from ray_peft.report.ties import FEWEST_ROWS
from ray_peft.report.uncertainty import Rewards

_HEADER = (
    "Trial",
    "Reward accuracy",
    "95 % interval",
    "Less that of the best",
    "Reward margin",
    "95 % interval",
    "DPO loss",
)
_TEXT = (
    "A reward is beta times the rise of an answer's log-probability in training, whatever the objective was. Reward "
    "accuracy: share of held-out pairs whose chosen answer has the higher reward; an equal one counts half, so that "
    "the untouched base has 0.5. Reward margin: mean of the chosen answer's reward less the rejected one's; it grows "
    "with beta and with the length of training, so that it orders trials of one beta alone. Of labelled rows, a reward "
    "counts as it is for desirable answers and with the other sign for others. Higher is better. In brackets: 95 % "
    'interval of the difference, row by row; "tied" if these rows do not show it, by the interval and by a permutation '
    "test that is corrected for all rows of the column. With fewer than {fewest} rows no difference is shown."
)


def preferences(compared: Sequence[Row], rewards: Rewards) -> list[Block]:
    """Reward accuracy and margin of the trials that were scored on judged rows; nothing without such rows.

    Args:
        compared: the rows of the comparison.
        rewards: of the trials that have them row by row.
    """
    scored = [row for row in compared if row.result.scores.reward_accuracy is not None]
    if not scored:
        return []
    scored.sort(key=lambda row: -(row.result.scores.reward_accuracy or 0.0))
    to_best = _to_best(scored, rewards)
    lines = tuple(_line(row, rewards.get(row.trial_id, ()), to_best) for row in scored)
    return [Table(header=_HEADER, lines=lines), Paragraph(_TEXT.format(fewest=FEWEST_ROWS))]


def _line(row: Row, rewards: Sequence[RowReward], to_best: Mapping[str, DifferenceInterval]) -> tuple[str, ...]:
    scores = row.result.scores
    return (
        row.label,
        fixed(scores.reward_accuracy, 4),
        _range(interval(_accuracy(rewards)) if rewards else None),
        _difference(to_best.get(row.trial_id), len(rewards)),
        fixed(scores.reward_margin, 4),
        _range(interval(mean_parts([entry.margin for entry in rewards])) if rewards else None),
        fixed(scores.preference_loss, 4),
    )


def _to_best(scored: Sequence[Row], rewards: Rewards) -> dict[str, DifferenceInterval]:
    """Differences in accuracy to the best trial on the same rows, by trial id."""
    pairs: dict[str, tuple[Numbers, Numbers]] = {}
    best: dict[tuple[object, ...], Row] = {}
    for row in scored:
        own = rewards.get(row.trial_id)
        if not own:
            continue
        first = best.setdefault(_same_rows(row, len(own)), row)
        if first is not row:
            pairs[row.trial_id] = _accuracy(own), _accuracy(rewards[first.trial_id])
    return dict(zip(pairs, compare(list(pairs.values())), strict=True))


def _same_rows(row: Row, count: int) -> tuple[object, ...]:
    result = row.result
    return (
        repr(result.spec.data.plain()),
        result.provenance.data_key,
        result.spec.evaluation.plain().get("split"),
        count,
    )


def _accuracy(rewards: Sequence[RowReward]) -> Numbers:
    return mean_parts([entry.right for entry in rewards])


def _range(estimate: ScoreInterval | None) -> str:
    return MISSING if estimate is None else f"[{fixed(estimate.low, 4)}, {fixed(estimate.high, 4)}]"


def _difference(difference: DifferenceInterval | None, rows: int) -> str:
    if difference is None:
        return MISSING
    ends = f"[{fixed(difference.low, 4, signed=True)}, {fixed(difference.high, 4, signed=True)}]"
    shown = difference.shown and rows >= FEWEST_ROWS
    return f"{fixed(difference.difference, 4, signed=True)} {ends}" + ("" if shown else ", tied")
