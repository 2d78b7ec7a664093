"""A search proposes each trial once, and remembers the rows of its own space alone."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from ray_peft.checks.inspector import Inspector
from ray_peft.console import Console
from ray_peft.errors import SearchSpaceError, StorageError
from ray_peft.metrics.scores import Scores
from ray_peft.schedule.plan import plan
from ray_peft.schedule.search import Draws
from ray_peft.space.read import load
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import Provenance, TrialResult

LORA = {"name": "lora", "rank": 4, "lr": {"loguniform": [1.0e-3, 1.0e-1]}}
METHODS = {"choice": [{"name": "lora", "rank": 4, "lr": 0.01}, {"name": "galore", "rank": 8}, {"name": "none"}]}


class Search:
    """A search space, what it proposes and what it says."""

    def __init__(self, folder: Path, out: Path, plain: dict[str, Any], **settings: Any) -> None:
        plain |= {"search": {"algorithm": "optuna", **settings}}
        (folder / "search.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
        self.said: list[str] = []
        self.inspector = Inspector()
        self.draws = Draws(load(folder / "search.yaml"), self.inspector, self.said.append, out)

    def run(self, most: int = 20) -> list[TrialResult]:
        """Rows of up to so many proposals, better with each."""
        rows = []
        while len(rows) < most and (trial := self.draws.next()) is not None:
            rows.append(self.row(trial, loss=5.0 - 0.1 * len(rows)))
            self.draws.tell_row(rows[-1])
        return rows

    def row(self, trial: TrialSpec, loss: float) -> TrialResult:
        content = self.inspector.content(trial)
        made = Provenance(model_fingerprint=content.model, data_key=content.data)
        scores = Scores(eval_loss=loss)
        row = TrialResult(trial_id=trial.trial_id, status="finished", spec=trial, scores=scores, provenance=made)
        return TrialResult.model_validate_json(row.model_dump_json())


@pytest.fixture
def search(tiny_model, questions, tmp_path):
    """Builds a search on the tiny model, with results in a folder of its own unless one is named."""
    number = itertools.count()

    def build(method, samples=4, metric="eval_loss", out=None, journal=None, scheduler=None, **changes):
        out = out or tmp_path / f"out{next(number)}"
        plain = tiny.plain_spec(tiny_model, questions, **changes) | {"method": method}
        return Search(tmp_path, out, plain, samples=samples, metric=metric, journal=journal, scheduler=scheduler)

    return build


def remembered(search: Search, rows: list[TrialResult], most: int = 20) -> list[str]:
    return list(search.draws.remember(rows, most).finished)


def ids(rows: list[TrialResult]) -> list[str]:
    return [row.trial_id for row in rows]


def test_rows_of_the_same_space_are_remembered_and_not_drawn_again(search):
    first = search(LORA).run(3)
    more = search(LORA, samples=5)
    assert remembered(more, first) == ids(first)
    assert not set(ids(more.run(2))) & set(ids(first))
    assert remembered(search(LORA), first, most=2) == ids(first[:2])


QUESTIONS = {
    "longer training": (LORA, {"train__steps": 12}),
    "another setting": ({**LORA, "rank": 8}, {}),
    "other ranges": ({**LORA, "lr": {"loguniform": [1.0e-6, 1.0e-5]}}, {}),
    "other rows": (LORA, {"data__max_length": 64}),
    "another seed": (LORA, {"seed": 9}),
    "other methods": (METHODS, {}),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_rows_are_no_answer_to_another_question(search, question):
    rows = search(LORA).run(3)
    method, changes = QUESTIONS[question]
    other = search(method, **changes)
    assert remembered(other, rows) == []
    (row, *_) = other.run(1)
    assert row.trial_id not in ids(rows)


def test_wider_ranges_keep_the_rows_inside(search):
    rows = search(LORA).run(3)
    low = min(row.spec.method.lr for row in rows)
    within = search({**LORA, "lr": {"loguniform": [low * 1.0001, 0.5]}})
    assert remembered(within, rows) == [row.trial_id for row in rows if row.spec.method.lr > low * 1.0001]


def test_whole_methods_are_drawn_once_each_and_remembered(search):
    first = search(METHODS).run()
    assert sorted(row.spec.method.name for row in first) == ["galore", "lora", "none"]
    again = search(METHODS)
    assert remembered(again, first) == ids(first)
    assert again.run() == []
    assert again.draws.exhausted
    assert again.said == ["the search ends early: after 3 trials it proposes only repeats or no valid trial"]


def test_a_finite_space_is_drawn_whole_without_repeats(search):
    lora = {"name": "lora", "rank": {"randint": [1, 5]}, "targets": {"choice": [["q_proj"], ["q_proj", "v_proj"]]}}
    rows = search(lora).run(20)
    assert len({(row.spec.method.rank, row.spec.method.targets) for row in rows}) == len(rows) == 8


def test_a_trial_that_is_running_is_not_proposed_again(search):
    running = search(METHODS)
    trials = [running.draws.next() for _ in range(3)]
    assert len({trial.trial_id for trial in trials if trial is not None}) == 3
    assert running.draws.next() is None


def test_an_invalid_draw_is_passed_over_and_said_once(search, tmp_path):
    """Half of the combinations break a rule; the file's own draws happen to keep it."""
    found = search({"name": "lora", "rank": 4}, samples=1, train__batch_size={"choice": [8, 16]},
                   train__micro_batch_size={"choice": [4, 8, 16]})  # fmt: skip
    rows = found.run(20)
    assert {(row.spec.train.batch_size, row.spec.train.micro_batch_size) for row in rows} == {
        (8, 4), (8, 8), (16, 4), (16, 8), (16, 16)
    }  # fmt: skip
    (passed, _ends) = found.said
    assert passed.startswith("passed over a proposal that makes no valid trial: ")
    assert "train.batch_size (8) must be a multiple of train.micro_batch_size (16)" in passed


def test_a_choice_of_rows_is_drawn_by_their_content(search, questions, tmp_path):
    copy = tiny.write_rows(tmp_path / "copy.jsonl", tiny.QUESTIONS)
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.QUESTIONS[::-1])
    files = [[{"recipe": "prompt_completion", "path": str(path), "train": 40, "test": 8}] for path in
             (questions, copy, other, tmp_path / "missing.jsonl")]  # fmt: skip
    found = search({"name": "none"}, samples=1, data__sources={"choice": files[:3]})
    assert len(found.run()) == 2
    assert any("missing.jsonl" in line for line in _said(search, files))


def _said(search, files) -> list[str]:
    found = search({"name": "none"}, samples=1, data__sources={"choice": files})
    assert len(found.run()) == 2
    return found.said


def test_failed_trials_teach_nothing_and_are_not_drawn_again(search):
    found = search(METHODS)
    for _ in range(3):
        trial = found.draws.next()
        found.draws.tell_row(found.row(trial, 1.0).model_copy(update={"status": "failed"}))
    assert found.draws.next() is None
    rows = [found.row(trial, 1.0).model_copy(update={"status": "failed"})]
    assert remembered(search(METHODS), rows) == []


@pytest.mark.parametrize(("metric", "best"), [("eval_loss", 0), ("bleu4", 1), ("rouge_l", 2), ("chrf", 3)])
def test_the_metric_is_what_optuna_improves(search, metric, best):
    drawn = search(LORA, metric=metric, evaluation__generate=True)
    for place in range(4):
        row = drawn.row(drawn.draws.next(), loss=1.0)
        scores = Scores(**dict.fromkeys(("bleu4", "rouge_l", "chrf"), 0.5), eval_loss=0.5)
        better = {("eval_loss", "bleu4", "rouge_l", "chrf")[place]: 0.1 if place == 0 else 0.9}
        drawn.draws.tell_row(row.model_copy(update={"scores": scores.model_copy(update=better)}))
    draws = drawn.draws._study.draws()
    assert drawn.draws._study._study.best_trial.number == draws[best].number


@pytest.mark.parametrize("metric", ["bleu4", "rouge_l", "chrf"])
def test_a_metric_that_no_trial_has_is_refused(search, metric):
    says = rf"search.metric: {metric} needs evaluation.generate: true \(found false\)"
    with pytest.raises(SearchSpaceError, match=says):
        search(LORA, metric=metric, evaluation__generate=False)


def test_plan_says_that_its_draws_are_examples(search, tmp_path, capsys):
    search(LORA, samples=3)
    assert len(plan(tmp_path / "search.yaml", console=Console())) == 3
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("search: Optuna proposes 3 trials one by one")
    plan(tmp_path / "search.yaml", ["search.algorithm=random"], console=Console())
    assert "Optuna" not in capsys.readouterr().out


def journal_of(search: Search) -> Counter[str]:
    return Counter(draw.state for draw in search.draws._study.draws())


def test_a_search_goes_on_with_the_trials_that_a_kill_interrupted(search, tmp_path):
    """Its driver dies with one row told, one written that it never saw, and one trial running."""
    out = tmp_path / "out"
    killed = search(LORA, out=out)
    trials = [killed.draws.next() for _ in range(3)]
    rows = [killed.row(trial, 4.0 + place) for place, trial in enumerate(trials[:2])]
    killed.draws.tell_row(rows[0])
    again = search(LORA, out=out)
    assert remembered(again, rows) == ids(rows)
    assert again.draws.next().trial_id == trials[2].trial_id
    assert journal_of(again) == {"complete": 2, "fail": 1, "running": 1}
    assert again.draws.next().trial_id not in [trial.trial_id for trial in trials]
    assert ids(search(LORA, out=out).run(2)) == [draw.trial_id for draw in again.draws._study.draws()[-2:]]


def test_a_trial_whose_row_is_gone_runs_again(search, tmp_path):
    first = search(METHODS, out=tmp_path / "out").run()
    again = search(METHODS, out=tmp_path / "out")
    assert remembered(again, first[1:]) == ids(first[1:])
    assert ids(again.run()) == [first[0].trial_id]


def test_drivers_that_share_a_journal_run_each_trial_once(search, tmp_path):
    """Three at once on a space of twelve; then one finds nothing left, and knows the others' scores."""
    lora = {"name": "lora", "rank": {"randint": [1, 13]}}
    drivers = [search(lora, journal=str(tmp_path / "shared" / "search.journal")) for _ in range(3)]
    rows: list[list[TrialResult]] = [[], [], []]
    threads = [threading.Thread(target=lambda i=i: rows[i].extend(drivers[i].run())) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row.spec.method.rank for part in rows for row in part) == list(range(1, 13))
    assert journal_of(drivers[0])["complete"] >= 12
    late = search(lora, journal=str(tmp_path / "shared" / "search.journal"))
    assert late.draws.next() is None
    assert late.draws.exhausted


def test_a_driver_runs_none_of_what_another_one_is_running(search, tmp_path):
    journal = str(tmp_path / "search.journal")
    first, second = search(METHODS, journal=journal), search(METHODS, journal=journal)
    running = [first.draws.next(), first.draws.next()]
    (row,) = second.run()
    assert row.trial_id not in [trial.trial_id for trial in running]
    assert second.draws.exhausted


def test_invalid_draws_are_pruned(search):
    found = search({"name": "lora", "rank": 4}, samples=1, train__batch_size={"choice": [8, 16]},
                   train__micro_batch_size={"choice": [4, 8, 16]})  # fmt: skip
    assert len(found.run(20)) == 5
    assert journal_of(found)["complete"] >= 5
    assert journal_of(found)["pruned"] >= 1


@pytest.mark.parametrize("torn", [b'{"op_code":4,"wor', b"\0" * 40])
def test_a_line_that_a_kill_has_torn_costs_nothing(search, tmp_path, torn):
    out = tmp_path / "out"
    trial = search(LORA, out=out).draws.next()
    with (out / "search.journal").open("ab") as file:
        file.write(torn)
    again = search(LORA, out=out)
    assert again.draws.next().trial_id == trial.trial_id
    assert search(LORA, out=out).draws.next().trial_id == trial.trial_id


def test_a_trial_that_was_stopped_early_is_pruned_with_its_loss_and_counts_as_done(search, tmp_path):
    out = tmp_path / "out"
    first = search(LORA, out=out, scheduler="asha", train__eval_every=2)
    rows = []
    for place in range(3):
        row = first.row(first.draws.next(), 4.0)
        stopped = {"status": "stopped_early", "scores": Scores(), "steps": 2, "eval_loss_best": 5.0 + place}
        rows.append(row.model_copy(update=stopped if place < 2 else {}))
    for row in rows[1:]:
        first.draws.tell_row(row)  # the driver is killed before it hears of the first
    again = search(LORA, out=out, scheduler="asha", train__eval_every=2)
    assert remembered(again, rows) == ids(rows)
    assert journal_of(again) == {"fail": 1, "pruned": 2, "complete": 1}
    pruned = [trial for trial in again.draws._study._study.trials if trial.state.name == "PRUNED"]
    assert [trial.intermediate_values for trial in pruned] == [{2: 6.0}, {2: 5.0}]
    assert again.run(1)[0].trial_id not in ids(rows)
    plain = search(LORA, train__eval_every=2)  # without early stopping, they have to run to their end
    assert remembered(plain, rows) == ids(rows[2:])
    afresh = search(LORA, scheduler="asha", train__eval_every=2)
    assert remembered(afresh, rows) == ids(rows)
    assert journal_of(afresh) == {"pruned": 2, "complete": 1}


def test_what_is_no_journal_is_named(search, tmp_path):
    (tmp_path / "search.journal").write_text("yesterday's notes\n" * 3)
    with pytest.raises(StorageError, match=r"search\.journal: is no journal of a search .* move it away"):
        search(LORA, journal=str(tmp_path / "search.journal")).draws.next()


def test_a_journal_that_cannot_be_written_is_named(search, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"search\.journal: cannot be used"):
        search(LORA, journal=str(tmp_path / "file" / "search.journal")).draws.next()


def test_draws_on_other_content_are_another_question(search, tmp_path, questions):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.QUESTIONS)
    sources = [{"recipe": "prompt_completion", "path": str(rows), "train": 40, "test": 8}]
    found = search(LORA, out=tmp_path / "out", data__sources=sources)
    found.run(2)
    tiny.write_rows(rows, tiny.QUESTIONS[::-1])
    other = search(LORA, out=tmp_path / "out", data__sources=sources)
    other.run(1)
    assert journal_of(other) == {"complete": 1}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"algorithm": "random", "journal": "/j"}, "journal needs algorithm: optuna"),
        ({"algorithm": "optuna", "journal": "j"}, "search.journal: must be an absolute path"),
    ],
)
def test_a_journal_that_no_driver_could_share_is_refused(tmp_path, tiny_model, questions, settings, says):
    plain = tiny.plain_spec(tiny_model, questions) | {"method": LORA, "search": {"samples": 2, **settings}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    with pytest.raises(SearchSpaceError, match=says):
        load(tmp_path / "search.yaml")
