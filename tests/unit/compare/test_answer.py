"""The answer of a comparison, from the rows of its last sweep."""

import json
import random

import example_sweep
import pytest

from ray_peft.compare.answer import answer
from ray_peft.compare.rungs import Chosen, best
from ray_peft.report.answer import answer as report_answer
from ray_peft.report.files import read_material
from ray_peft.store.results_file import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six methods with two seeds: full, LoRA and GaLore answer alike, QLoRA and the base worse."""
    built = example_sweep.build(tmp_path_factory.mktemp("sweep") / "3_answer", rows=120)
    lines = (built / "results.jsonl").read_text().splitlines()
    (built / "results.jsonl").write_text("".join(f"{line}\n" for line in lines if '"trial_id": "ensemble' not in line))
    return built


def chosen(method, tried):
    return {method: Chosen((example_sweep.spec(method, 1),), 1.0, tried)}


def test_the_cheapest_of_those_that_none_is_shown_to_beat_is_taken(folder):
    verdict = answer(read_material(folder), {})
    text = " ".join(verdict.lines)
    assert verdict.take is not None
    assert verdict.take.method.name == "lora"  # ties with full, whose memory is greater
    assert verdict.lines[0].startswith("Take lora (learning rate 0.0002): ROUGE-L 0.")
    assert (
        "120 test rows, mean of 2 seeds (95 % over rows and seeds); the untouched base: ROUGE-L 0." in verdict.lines[0]
    )
    assert "Not shown to differ from it: " in verdict.lines[1]
    assert "full (learning rate 2e-05)" in verdict.lines[1].partition("; shown to be worse")[0]
    assert "7.40 GiB" in verdict.lines[2]
    assert "the least memory of the" in verdict.lines[2]
    assert "Caution" not in text


@pytest.mark.parametrize(("tried", "caution"), [((0.0002, 0.001), True), ((0.00004, 0.001), False)])
def test_a_rate_at_the_edge_of_those_tried_is_named(folder, tried, caution):
    verdict = answer(read_material(folder), chosen("lora", tried))
    assert ("Caution: at the edge of those tried: lora" in verdict.lines[3]) == caution


def test_settings_are_chosen_inside_each_method_by_the_loss_and_failed_trials_are_passed_over(folder):
    rows = read_results(folder)
    best_settings = best(rows, 1)
    assert "none" not in best_settings
    for method in ("full", "lora"):
        finished = [row for row in rows if row.spec.method.name == method and row.status == "finished"]
        lowest = min(finished, key=lambda row: row.scores.eval_loss)
        assert best_settings[method].trials == (lowest.spec,)
        assert best_settings[method].loss == lowest.scores.eval_loss
    assert len(best(rows, 2)["lora"].trials) == 2
    assert len(best(rows, 2)["galore"].trials) == 1  # the other one failed


def test_the_loss_decides_between_methods_whose_answers_are_not_shown_to_differ(tmp_path):
    """Twelve rows show nothing of ROUGE-L; QLoRA, which takes the least memory, has a higher loss on all of them."""
    built = example_sweep.build(tmp_path / "3_answer", rows=12)
    lines = [line for line in (built / "results.jsonl").read_text().splitlines() if '"ensemble-' not in line]
    (built / "results.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert answer(read_material(built), {}).take.method.name == "qlora"
    losses = {"full": 1.6, "lora": 1.602, "galore": 1.601, "qlora": 1.75, "qlora_galore": 1.7, "none": 2.0}
    rng = random.Random(0)
    for row in read_results(built):
        if row.status == "finished":
            mean = losses[row.spec.method.name]
            text = [{"row": n, "loss": mean + n / 10 + rng.gauss(0, 0.02)} for n in range(12)]
            path = built / "trials" / row.trial_id / "losses.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in text))
    verdict = answer(read_material(built), {})
    assert verdict.take.method.name == "lora"
    worse = verdict.lines[1].partition("worse by the loss on these rows")[2].partition("; not shown")[0]
    assert "qlora (" in worse
    assert "full" not in worse
    assert "the least memory of the 3 that none is shown to be better than" in verdict.lines[2]
    first_line, *_, against_base = report_answer(read_material(built))[:3]
    assert first_line.startswith("Take lora rank=16: ROUGE-L 0.")
    assert "By the loss of the same rows these are shown to be worse: " in first_line
    assert "shown to be better by the loss of the same rows alone: " in against_base


def test_without_a_trained_method_there_is_no_answer(folder, tmp_path):
    (tmp_path / "results.jsonl").write_text(
        "".join(
            line + "\n" for line in (folder / "results.jsonl").read_text().splitlines() if '"trial_id": "none' in line
        )
    )
    verdict = answer(read_material(tmp_path), {})
    assert verdict.take is None
    assert verdict.lines[0].startswith("No answer: ")
