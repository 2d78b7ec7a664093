"""The section on judged rows: accuracies with their intervals, and which differences to the best are shown."""

import pytest

from ray_peft.metrics.scores import RowReward, Scores
from ray_peft.report.document import Table
from ray_peft.report.preferences import preferences
from ray_peft.report.table import rows
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import Provenance, TrialResult, Usage

ROWS = 60


def trial(rank: int, right: int, **scores: float) -> tuple[TrialResult, list[RowReward]]:
    """A trial that rates `right` of 60 pairs the right way round."""
    plain = {
        "model": {"name": "org/tiny"},
        "data": {"sources": [{"recipe": "preference", "path": "a.jsonl", "train": 900, "test": ROWS}]},
        "method": {"name": "lora", "rank": rank},
        "train": {"steps": 10, "objective": "dpo"},
    }
    rewards = [RowReward(row=row, margin=0.5 if row < right else -0.25) for row in range(ROWS)]
    margin = sum(entry.margin for entry in rewards) / ROWS
    spec = TrialSpec.from_plain(plain)
    result = TrialResult(
        trial_id=spec.trial_id, spec=spec, status="finished", steps=10,
        scores=Scores(reward_accuracy=right / ROWS, reward_margin=margin, **scores),
        usage=Usage(), provenance=Provenance(),
    )  # fmt: skip
    return result, rewards


def lines_of(*trials):
    results = [result for result, _ in trials]
    blocks = preferences(rows(results), {result.trial_id: rewards for result, rewards in trials})
    if not blocks:
        return []
    assert isinstance(blocks[0], Table)
    return blocks[0].lines


def test_the_best_comes_first_and_only_what_rows_show_is_a_difference():
    best, close, far = lines_of(trial(8, 27), trial(16, 55, preference_loss=0.5), trial(32, 54))
    assert (best[1], best[3], best[6]) == ("0.9167", "-", "0.5000")
    assert close[1] == "0.9000"
    assert close[3].endswith(", tied")
    assert far[3].startswith("-0.4667 [-0.5")
    assert not far[3].endswith("tied")
    assert far[4] == "0.0875"  # 27 of 60 rows of 0.5, the others of -0.25


@pytest.mark.parametrize("place", [2, 5])
def test_an_interval_holds_its_score(place):
    (line,) = lines_of(trial(8, 40))
    low, high = map(float, line[place].strip("[]").split(", "))
    assert low < float(line[place - 1]) < high


def test_without_judged_rows_there_is_no_section():
    result, _ = trial(8, 40)
    unscored = result.model_copy(update={"scores": Scores(eval_loss=1.0)})
    assert preferences(rows([unscored]), {}) == []
