"""Tasks of lm-eval question by question: what a trial keeps of them, and what the report pairs by it."""

from __future__ import annotations

import json
import shutil
from statistics import fmean

import pytest
import tiny

from ray_peft.errors import DataError
from ray_peft.report.digits import fixed
from ray_peft.report.files import write_report
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.benchmark_results import by_question
from ray_peft.trial import trial

CHOICE = r"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "<|im_start|>user\nWhat comes after {{{{word}}}}?<|im_end|>\n\
  <|im_start|>assistant\nAfter {{{{word}}}} comes"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: f1, aggregation: f1, higher_is_better: true}}
"""
LIKELY = r"""
task: likely
dataset_path: json
dataset_kwargs: {data_files: {test: many.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "After {{word}} comes"
doc_to_target: " {{choices[label]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
BY_SIZE = "{group: words, task: [many, few], aggregate_metric_list: [{metric: acc, weight_by_size: true}]}"
BY_TASK = "{group: all, task: [words, likely], aggregate_metric_list: [{metric: acc, weight_by_size: false}]}"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
PAIRED = "paired by question"
NO_MEAN = "two independent samples: no mean over questions"


class Kept:
    """A tracker that keeps the names of its files."""

    def __init__(self):
        self.files = []

    def start(self, spec):
        return "run"

    def artifact(self, path, folder, *, remove=False):
        self.files.append((path.name, folder))

    def log(self, metrics, step): ...
    def table(self, rows, artifact_file): ...

    def record(self, result):
        return result


def questions_of(shifts):
    rows = []
    for shift in shifts:
        for word, after in zip(WORDS, WORDS[1:], strict=False):
            nonsense = "".join(chr((ord(letter) - 97 + shift) % 26 + 97) for letter in after)
            choices = [after, nonsense][:: 1 if shift % 2 else -1]
            rows.append({"word": word, "choices": choices, "label": choices.index(after)})
    return rows


@pytest.fixture(scope="module")
def swept(tiny_model, questions, tmp_path_factory):
    """The folder of a sweep of two trials that were asked two groups inside each other, and what was tracked."""
    tasks, out = tmp_path_factory.mktemp("grouped_tasks"), tmp_path_factory.mktemp("asked_sweep")
    for name, shifts in (("many", range(1, 11)), ("few", range(11, 14))):
        (tasks / f"{name}.yaml").write_text(CHOICE.format(name=name))
        tiny.write_rows(tasks / f"{name}.jsonl", questions_of(shifts))
    for name, text in (("likely", LIKELY), ("words", BY_SIZE), ("all", BY_TASK)):
        (tasks / f"{name}.yaml").write_text(text)
    results, trackers = [], []
    for method, steps in (({"name": "none"}, 1), ({"name": "lora", "rank": 4, "lr": 0.05}, 40)):
        plain = tiny.plain_spec(tiny_model, questions, method, train__steps=steps)
        plain["evaluation"]["benchmarks"] = {"tasks": ["all"], "include_path": str(tasks)}
        spec, tracker = TrialSpec.from_plain(plain), Kept()
        place = trial.Place(out / "trials" / spec.trial_id, "cpu")
        results.append(trial.run(spec, place, tracker, lambda metrics, step: None))
        assert results[-1].status == "finished", results[-1].error
        trackers.append(tracker)
    (out / "results.jsonl").write_text("".join(json.dumps(result.row()) + "\n" for result in results))
    return out, results, trackers


@pytest.fixture
def copied(swept, tmp_path):
    """A copy of the sweep's folder that a test may change, and the files of its trials, the base's first."""
    out, results, _ = swept
    shutil.copytree(out, tmp_path / "out")
    return tmp_path / "out", [tmp_path / "out/trials" / one.trial_id / "benchmarks.jsonl" for one in results]


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def taken_as(folder):
    """By score, how the difference of the fine-tuned trial to the base was taken, and the difference as it stands."""
    write_report(folder)
    found = {}
    for line in (folder / "report.md").read_text().splitlines():
        cells = [cell.strip().replace("\\", "") for cell in line.strip("|").split("|")]
        if len(cells) == 7 and "/" in cells[0] and cells[1] != "none":
            found[cells[0]] = (cells[6], cells[5])
    return found


@pytest.mark.slow  # lm-eval reads its 15,000 task files, once in a process
def test_a_trial_keeps_what_each_question_was_given_and_no_text(swept):
    out, results, trackers = swept
    for result, tracker in zip(results, trackers, strict=True):
        file = out / "trials" / result.trial_id / "benchmarks.jsonl"
        lines = lines_of(file)
        assert {line["task"]: line["question"] for line in lines} == {"many": 99, "few": 29, "likely": 99}
        assert len({(line["task"], line["question"]) for line in lines}) == len(lines) == 230
        for key in ("many/acc", "few/acc", "likely/acc", "words/acc"):
            values = [line["values"][key] for line in lines if key in line["values"]]
            assert len(values) == result.scores.benchmark_rows[key]
            assert fmean(values) == pytest.approx(result.scores.benchmarks[key], rel=1e-12)
        assert all(word not in file.read_text() for word in WORDS[2:])
        assert tracker.files.count(("benchmarks.jsonl", "evaluation")) == 1
    first, second = (lines_of(out / "trials" / one.trial_id / "benchmarks.jsonl") for one in results)
    assert [line["hash"] for line in first] == [line["hash"] for line in second]
    assert [line["values"] for line in first] != [line["values"] for line in second]


@pytest.mark.slow
def test_the_report_pairs_means_over_questions_and_says_what_it_does_not(swept, copied):
    base, tuned = (result.scores.benchmarks for result in swept[1])
    found = taken_as(copied[0])
    assert {key: how for key, (how, _) in found.items()} == {
        "all/acc": PAIRED, "words/acc": PAIRED, "many/acc": PAIRED, "few/acc": PAIRED, "likely/acc": PAIRED,
        "many/f1": NO_MEAN, "few/f1": NO_MEAN, "likely/perplexity": NO_MEAN,
    }  # fmt: skip
    assert base["all/acc"] == pytest.approx(fmean(base[key] for key in ("many/acc", "few/acc", "likely/acc")))
    assert base["all/acc"] != pytest.approx((base["words/acc"] * 130 + base["likely/acc"] * 100) / 230)
    for key, (how, said) in found.items():
        sign = "[" if how == PAIRED else "+/-"
        assert said.startswith(f"{fixed(tuned[key] - base[key], 4, signed=True)} {sign}"), (key, said)
    assert "tied" not in found["many/acc"][1], "LoRA was trained on these questions"


@pytest.mark.slow
def test_rows_without_the_file_stay_readable_as_independent_samples(copied):
    folder, (base, tuned) = copied
    base.unlink()
    found = taken_as(folder)
    no_file = "two independent samples: no values by question on file"
    assert {how for key, (how, _) in found.items() if key.endswith("acc")} == {no_file}
    tuned.unlink()
    both = taken_as(folder)
    assert {how for how, _ in both.values()} == {no_file}
    assert {key: said for key, (_, said) in both.items()} == {key: said for key, (_, said) in found.items()}


@pytest.mark.slow
def test_a_question_that_is_another_one_is_not_paired(copied):
    folder, (base, _) = copied
    lines = lines_of(base)
    (changed,) = (line for line in lines if (line["task"], line["question"]) == ("few", 3))
    changed["hash"] = "0" * 32
    base.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {key: how for key, (how, _) in taken_as(folder).items()}
    others = "two independent samples: other questions"
    assert (found["few/acc"], found["words/acc"], found["all/acc"]) == (others, others, others)
    assert (found["many/acc"], found["likely/acc"]) == (PAIRED, PAIRED)


@pytest.mark.slow
def test_values_that_do_not_make_the_score_are_not_paired(copied):
    folder, (_, tuned) = copied
    lines = lines_of(tuned)
    lines[0]["values"]["many/acc"] = 0.5
    tuned.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert taken_as(folder)["many/acc"][0] == NO_MEAN
    tuned.write_text('{"task": "many"}\n')
    with pytest.raises(DataError, match=r"benchmarks.jsonl: line 1: question: Field required"):
        write_report(folder)


def test_filters_of_one_question_come_together_and_other_values_go():
    entry = {"exact_match,strict": 0.5, "exact_match,loose": 1.0, "bleu,strict": 3.0, "name": "math"}
    asked = {"doc_id": 7, "doc_hash": "a", "prompt_hash": "b", "target_hash": "c"}
    logged = [
        asked | {"filter": "strict", "metrics": ["exact_match", "bleu"], "exact_match": True, "bleu": ("text", "text")},
        asked | {"filter": "loose", "metrics": ["exact_match"], "exact_match": float("nan")},
    ]
    results = {"math": entry, "both": {"exact_match,strict": 0.5}}
    (found,) = by_question(results, {"math": logged}, {"both": ["inner"], "inner": ["math"]})
    assert (found.task, found.question) == ("math", 7)
    assert found.values == {"math/exact_match/strict": 1.0, "both/exact_match": 1.0}
    (other,) = by_question(results, {"math": [logged[0] | {"prompt_hash": "d"}]}, {})
    assert other.hash != found.hash
