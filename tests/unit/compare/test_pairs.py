"""A comparison on pairs: recognised by their fields, searched by DPO's loss, answered by reward accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from ray_peft.compare.answer import answer
from ray_peft.compare.candidates import FACTORS_OF_PAIRS
from ray_peft.compare.rungs import Chosen, best, choosing_loss
from ray_peft.compare.setup import Setup, looked_at, set_up
from ray_peft.compare.space_text import written
from ray_peft.compare.speed_trials import speed_space
from ray_peft.errors import SpecError
from ray_peft.metrics.scores import RowReward, Scores
from ray_peft.report.answer import answer as of_report
from ray_peft.report.material import Material
from ray_peft.schedule.decide import Node
from ray_peft.space.read import parse
from ray_peft.spec import LlmTrialSpec, TrialSpec
from ray_peft.trial.result import Provenance, TrialResult, Usage

PAIRS = 60
Judged = tuple[TrialResult, list[RowReward]]


def trial(
    method: str, right: int, wrong_by: float = 0.5, *, seed: int = 1, train_s: float = 10.0, objective: str = "dpo",
    loss: float | None = 0.6, **settings: Any,
) -> Judged:  # fmt: skip
    """A trial that rates `right` of 60 pairs the right way round by 0.5, the others the wrong way by `wrong_by`."""
    spec = TrialSpec.from_plain(
        {
            "model": {"name": "org/tiny"},
            "data": {"sources": [{"recipe": "preference", "path": "a.jsonl", "train": 900, "test": PAIRS}]},
            "method": {"name": method, **settings},
            "train": {"steps": 10, "objective": objective},
            "evaluation": {"generate": False},
            "seed": seed,
        }
    )
    margins = [0.0 if method == "none" else 0.5 if row < right else -wrong_by for row in range(PAIRS)]
    rewards = [RowReward(row=row, margin=margin) for row, margin in enumerate(margins)]
    accuracy = sum(entry.right for entry in rewards) / PAIRS
    result = TrialResult(
        trial_id=spec.trial_id, spec=spec, status="finished", steps=10,
        scores=Scores(eval_loss=2.0, reward_accuracy=accuracy, preference_loss=loss, eval_rows=PAIRS),
        usage=Usage(train_s=train_s, peak_rss_gib=1.0), provenance=Provenance(),
    )  # fmt: skip
    return result, rewards


def material(*trials: Judged) -> Material:
    return Material(title="t", results=[r for r, _ in trials], rewards={r.trial_id: rows for r, rows in trials})


def test_the_answer_is_the_method_that_rates_more_pairs_the_right_way_round() -> None:
    compared = material(trial("none", 0), trial("lora", 55), trial("full", 33), trial("vera", 20))
    verdict = answer(compared, {"lora": Chosen((trial("lora", 55)[0].spec,), 0.6, (2e-5, 2e-3))})
    assert verdict.take is not None
    assert verdict.take.method.name == "lora"
    assert verdict.lines[0].startswith("Take lora (learning rate 0.0002): reward accuracy 0.9167 (0.8")
    assert "on 60 test pairs, one seed (95 % over rows); the untouched base: reward accuracy 0.5000" in verdict.lines[0]
    assert (
        "Shown to be worse: full (learning rate 2e-05) 0.5500 and vera (learning rate 0.004) 0.3333" in verdict.lines[1]
    )
    assert verdict.lines[3].startswith("Learning rates were chosen by DPO's loss on validation pairs")
    # A sweep's report, which answered no row either, says the same.
    assert of_report(compared)[0].startswith("Take lora: reward accuracy 0.9167")


def test_of_methods_with_equally_many_right_pairs_the_loss_decides_and_then_the_cost() -> None:
    base, sure, unsure = trial("none", 0), trial("lora", 40, 0.1), trial("full", 40, 2.0, train_s=1.0)
    verdict = answer(material(base, sure, unsure), {})
    assert verdict.take is not None
    assert verdict.take.method.name == "lora"
    losses = "Shown to be worse by DPO's loss on these pairs, for 0.564: full (learning rate 2e-05) 1.025"
    assert losses in verdict.lines[1]  # 2/3 log(1 + exp(-0.5)) + 1/3 log(1 + exp(0.1)), and with exp(2)
    alike = answer(material(base, sure, trial("full", 40, 0.1, train_s=1.0)), {})
    assert alike.take is not None
    assert alike.take.method.name == "full"


def test_settings_are_chosen_by_the_loss_of_their_objective() -> None:
    good, bad = trial("lora", 30, loss=0.55)[0], trial("lora", 50, loss=0.7, lr=1e-3)[0]
    assert best([bad, good], 1)["lora"].trials == (good.spec,)
    assert choosing_loss(trial("lora", 45, objective="orpo", loss=None)[0]) == 0.25
    assert choosing_loss(trial("lora", 45, objective="sft", loss=None)[0]) == 2.0


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"What is {number}?", "chosen": f"It is {number}.", "rejected": f"No idea what {number} may be."}
        for number in range(PAIRS)
    ]
    return tiny.write_rows(tmp_path / "pairs.jsonl", rows)


def look_at(model: Path, data: Path, metric: str | None = None) -> Setup:
    looked = looked_at(str(model), str(data), ["full", "lora"], metric)
    return set_up(looked, name="a", methods=["full", "lora"], nodes=[Node(2, 0)])


def test_pairs_are_recognised_and_learned_by_dpo(tiny_model: Path, pairs: Path) -> None:
    setup = look_at(tiny_model, pairs)
    assert (setup.look.recipe, setup.look.usable, setup.metric) == ("preference", PAIRS, "reward_accuracy")
    assert setup.look.length(0) > setup.look.answer_length(1) + len("No idea what 1 may be.")  # of the longer side
    for trial_spec in parse(written(speed_space(setup), "", {}), "speed").trials:
        assert isinstance(trial_spec, LlmTrialSpec)
        assert (trial_spec.train.objective, trial_spec.evaluation.generate) == ("dpo", False)
    assert FACTORS_OF_PAIRS[3] == (0.1, 1.0, 10.0)


@pytest.mark.parametrize("metric", ["rouge_l", "eval_loss"])
def test_a_metric_that_the_rows_cannot_have_is_refused(tiny_model: Path, pairs: Path, metric: str) -> None:
    with pytest.raises(SpecError, match=f"--metric {metric}: .*pairs.jsonl holds pairs of a chosen and a rejected"):
        look_at(tiny_model, pairs, metric)
    plain = tiny.write_rows(pairs.with_name("plain.jsonl"), tiny.QUESTIONS[:10] * 6)
    more = [{"prompt": f"Say {n}.", "completion": str(n)} for n in range(PAIRS)]
    with pytest.raises(SpecError, match="holds rows of recipe prompt_completion, no pairs; leave it out, or use --met"):
        look_at(tiny_model, tiny.write_rows(plain, more), "reward_accuracy")
    assert look_at(tiny_model, plain).metric == "rouge_l"
