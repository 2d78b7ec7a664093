"""Benchmarks of lm-eval: what is refused before anything starts, and what a tiny local task says of real models."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest
import tiny
from cramped import holds

from ray_peft.errors import DataError, SpecError
from ray_peft.metrics.scores import Scores
from ray_peft.spec import TrialSpec
from ray_peft.store.tracking.rows import final_metrics
from ray_peft.tasks.base import MemberModel, Scored
from ray_peft.tasks.llm_sft import benchmarks
from ray_peft.tasks.llm_sft.task import LlmSft
from ray_peft.trial import trial
from ray_peft.trial.result import TrialResult

LORA = {"name": "lora", "rank": 4, "lr": 0.05}
CHOICE = r"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: words.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "<|im_start|>user\nWhat comes after {{{{word}}}}?<|im_end|>\n\
  <|im_start|>assistant\nAfter {{{{word}}}} comes"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
unsafe_code: {unsafe}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
GENERATED = """
task: after_generated
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "What comes after {{word}}?"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: afters
task: [after_word, after_generated]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
GROUP_WITH_CODE = "{group: afters_and_code, task: [afters, after_code]}"
HUB = """
task: from_the_hub
dataset_path: some/where
output_type: multiple_choice
test_split: test
doc_to_text: "{{word}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
"""
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files of one's own, with their rows beside them; nothing in them names this machine's folders."""
    own = tmp_path_factory.mktemp("own_tasks")
    (own / "after_word.yaml").write_text(CHOICE.format(name="after_word", unsafe="false"))
    (own / "after_code.yaml").write_text(CHOICE.format(name="after_code", unsafe="true"))
    (own / "after_generated.yaml").write_text(GENERATED)
    (own / "afters.yaml").write_text(GROUP)
    (own / "afters_and_code.yaml").write_text(GROUP_WITH_CODE)
    (own / "from_the_hub.yaml").write_text(HUB)
    rows = []
    for shift in range(1, 11):
        for word, after in zip(WORDS, WORDS[1:], strict=False):
            nonsense = "".join(chr((ord(letter) - 97 + shift) % 26 + 97) for letter in after)
            choices = [after, nonsense][:: 1 if shift % 2 else -1]
            rows.append({"word": word, "choices": choices, "label": choices.index(after)})
    tiny.write_rows(own / "words.jsonl", rows)
    return own


class Kept:
    """A tracker that keeps the result."""

    def __init__(self) -> None:
        self.result = None

    def start(self, spec):
        return "run"

    def record(self, result):
        self.result = result
        return result

    def log(self, metrics, step): ...
    def artifact(self, path, folder, *, remove=False): ...
    def table(self, rows, artifact_file): ...


def asks(model, questions, method=None, changes=None, **asked):
    plain = tiny.plain_spec(model, questions, method, **(changes or {}))
    plain["evaluation"]["benchmarks"] = asked
    return TrialSpec.from_plain(plain)


def test_lm_eval_is_not_needed_unless_asked_for(tiny_model, questions, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    benchmarks.check(TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions)))


def test_a_missing_lm_eval_says_how_to_install_it(tiny_model, questions, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SpecError, match=r'evaluation.benchmarks: .*pip install "ray-peft\[benchmarks\]"'):
        LlmSft().inspect(asks(tiny_model, questions, tasks=["arc_easy"]))


def test_results_are_read_by_task_and_metric(caplog):
    found = benchmarks.collect(
        {
            "mmlu": {"name": "mmlu", "sample_len": 40, "acc,none": 0.25, "acc_stderr,none": 0.02, "alias": "mmlu"},
            "gsm8k": {
                "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A",
                "exact_match,flexible-extract": 0.75, "exact_match_stderr,flexible-extract": 0.1, "sample_len": 4,
            },
            "humaneval": {"pass@1,create_test": 0.125, "pass@1_stderr,create_test": "N/A", "sample_len": 8},
            "broken": {"acc,none": float("nan"), "sample_len": 1},
        }
    )  # fmt: skip
    assert found == (
        {
            "mmlu/acc": 0.25, "gsm8k/exact_match/strict-match": 0.5, "gsm8k/exact_match/flexible-extract": 0.75,
            "humaneval/pass@1": 0.125,
        },
        {"mmlu/acc": 0.02, "gsm8k/exact_match/flexible-extract": 0.1},
        {"mmlu/acc": 40, "gsm8k/exact_match/strict-match": 4, "gsm8k/exact_match/flexible-extract": 4,
         "humaneval/pass@1": 8},
    )  # fmt: skip
    assert "broken/acc is nan" in caplog.text


def test_a_missing_folder_of_tasks_is_refused(tiny_model, questions):
    with pytest.raises(SpecError, match=r"evaluation.benchmarks.include_path: /no/such: no such folder"):
        benchmarks.check(asks(tiny_model, questions, tasks=["after_word"], include_path="/no/such"))


def test_an_unknown_task_names_those_like_it():
    known = ["arc_challenge", "arc_easy", "mmlu", "mmlu_law"]
    said = benchmarks._unknown_task("mmlu_lew", known)
    assert "evaluation.benchmarks.tasks: mmlu_lew: lm-eval knows 4 tasks" in said
    assert "did you mean mmlu_law" in said
    assert "did you mean arc_easy, arc_challenge?" in benchmarks._unknown_task("arc", known)
    assert "no name is like it" in benchmarks._unknown_task("zzz", known)


def test_code_is_found_below_groups_and_tags():
    index = {
        "code": SimpleNamespace(cfg={"task": "code", "unsafe_code": True}, tags=set()),
        "safe": SimpleNamespace(cfg={"task": "safe"}, tags=set()),
        "group": SimpleNamespace(
            cfg={"group": "group", "task": ["safe", {"task": "code", "num_fewshot": 2}]}, tags=set()
        ),
        "tag": SimpleNamespace(cfg=None, tags={"safe", "group"}),
    }
    assert [benchmarks._unsafe_task(index, name) for name in index] == ["code", None, "code", "code"]


@pytest.mark.slow  # lm-eval reads its 15,000 task files, once in a process
@pytest.mark.parametrize(
    ("task", "error", "says"),
    [
        ("after_wort", SpecError, r"after_wort: lm-eval knows \d\d,\d{3} tasks.*did you mean after_word"),
        ("arc_eazy", SpecError, r"did you mean arc_easy"),
        ("humaneval", SpecError, r"humaneval executes the code .*allow_code_execution: true \(found false\)"),
        ("after_code", SpecError, r"after_code executes the code"),
        ("from_the_hub", DataError, r"from_the_hub cannot be loaded: .*\(some/where\).*HF_HUB_OFFLINE is set"),
        ("mmlu", DataError, r"mmlu cannot be loaded: ConnectionError: Couldn't reach 'cais/mmlu'.*\(cais/mmlu\)"),
        ("afters_and_code", SpecError, r"afters_and_code holds after_code, which executes"),
        ("afters,after_word", SpecError, r"afters and after_word both hold task after_word"),
    ],
)
def test_tasks_that_cannot_run_are_refused_before_anything_starts(task, error, says, tiny_model, questions, folder):
    with pytest.raises(error, match=says):
        benchmarks.check(asks(tiny_model, questions, tasks=task.split(","), include_path=str(folder)))


@pytest.mark.slow
def test_base_and_lora_are_scored_on_a_task_of_one_s_own(tiny_model, questions, folder, tmp_path):
    here, rows = os.getcwd(), {}
    for method, steps in [({"name": "none"}, 1), (LORA, 40), ({"name": "qlora", "rank": 4}, 1), ({"name": "full"}, 1)]:
        asked = {"tasks": ["after_word"], "include_path": str(folder)}
        spec = asks(tiny_model, questions, method, {"train__steps": steps}, **asked)
        tracker = Kept()
        row = trial.run(spec, trial.Place(tmp_path / method["name"], "cpu"), tracker, lambda metrics, step: None)
        assert row.status == "finished", row.error
        assert tracker.result == row
        assert row.scores.eval_loss is not None
        assert row.scores.benchmark_rows == {"after_word/acc": 100}
        assert 0 <= row.scores.benchmark_stderr["after_word/acc"] <= 0.0503  # sqrt(0.25 / 99)
        assert "lm-eval" in row.provenance.versions
        assert TrialResult.from_plain(row.row()) == row
        logged = final_metrics(row)
        assert logged["scores.benchmarks.after_word/acc"] == row.scores.benchmarks["after_word/acc"]
        rows[method["name"]] = row.scores.benchmarks["after_word/acc"]
    assert rows["lora"] > rows["none"] + 0.1, "the questions are those that LoRA was trained on"
    assert (os.getcwd(), os.environ.get("DISABLE_MULTIPROC")) == (here, None)


@pytest.mark.slow
def test_a_benchmark_that_fails_leaves_the_scores_before_it(tiny_model, questions, folder, tmp_path):
    spec = asks(tiny_model, questions, {"name": "none"}, tasks=["from_the_hub"], include_path=str(folder))
    row = trial.run(spec, trial.Place(tmp_path, "cpu"), Kept(), lambda metrics, step: None)
    assert row.status == "failed"
    assert "from_the_hub cannot be loaded" in row.error
    assert row.scores.eval_loss is not None


@pytest.mark.slow
def test_the_model_answers_in_the_trial_s_precision_and_is_left_as_it_was(tiny_model, questions, folder):
    import torch

    asked = {"tasks": ["after_word", "after_generated"], "include_path": str(folder), "limit": 4}
    for precision in ("bf16", "fp32"):
        spec = asks(tiny_model, questions, {"name": "none"}, {"train__precision": precision}, **asked)
        bench = LlmSft().load(spec, "cpu")
        bench.model.train()
        side, seen = bench.tokenizer.padding_side, set()
        bench.model.register_forward_pre_hook(
            lambda model, args, seen=seen: seen.add((torch.is_autocast_enabled("cpu"), model.training))
        )
        scores = bench.benchmark(Scored(Scores(bleu4=0.5))).scores
        assert seen == {(precision == "bf16", False)}
        assert scores.bleu4 == 0.5
        assert scores.benchmark_rows == {"after_word/acc": 4, "after_generated/exact_match": 4}
        assert bench.model.training
        assert bench.tokenizer.padding_side == side


@pytest.mark.slow
def test_where_memory_runs_out_fewer_questions_are_asked_at_a_time(tiny_model, questions, folder):
    import torch

    asked = {"tasks": ["after_word", "after_generated"], "include_path": str(folder), "limit": 12}
    bench = LlmSft().load(asks(tiny_model, questions, {"name": "none"}, **asked), "cpu")
    free = bench.benchmark(Scored(Scores()))
    with holds(bench.model.model, 3) as seen:
        assert bench.benchmark(Scored(Scores())) == free
        assert bench.lowered == {"evaluation.benchmarks.batch_size": 2}
        tried = [rows for rows in seen if rows > 3]
        assert tried == [8, 4]
        assert bench.benchmark(Scored(Scores())) == free
        assert [rows for rows in seen if rows > 3] == tried, "what was lowered stays so"
    with holds(bench.model.model, 0), pytest.raises(torch.OutOfMemoryError):
        bench.benchmark(Scored(Scores()))


@pytest.mark.slow
def test_an_accuracy_is_the_share_of_questions_whose_answer_is_likelier(tiny_model, questions, folder):
    import torch

    asked = {"tasks": ["after_word"], "include_path": str(folder)}
    bench = LlmSft().load(asks(tiny_model, questions, {"name": "none"}, **asked), "cpu")
    right = 0
    rows = [json.loads(line) for line in (folder / "words.jsonl").read_text().splitlines()]
    for row in rows:
        chances = []
        prompt = f"<|im_start|>user\nWhat comes after {row['word']}?<|im_end|>\n<|im_start|>assistant\n"
        start = bench.tokenizer.encode(f"{prompt}After {row['word']} comes")
        for choice in row["choices"]:
            ids = torch.tensor([start + bench.tokenizer.encode(f" {choice}")])  # lm-eval's delimiter
            with torch.no_grad():
                logs = torch.log_softmax(bench.model(ids).logits[0, len(start) - 1 : -1], dim=-1)
            chances.append(logs.gather(1, ids[0, len(start) :, None]).sum().item())
        right += chances[row["label"]] > chances[1 - row["label"]]
    assert bench.benchmark(Scored(Scores())).scores.benchmarks == {"after_word/acc": right / len(rows)}


@pytest.mark.slow
def test_code_runs_only_with_leave(tiny_model, questions, folder):
    asked = {"tasks": ["after_code"], "include_path": str(folder), "limit": 4, "allow_code_execution": True}
    bench = LlmSft().load(asks(tiny_model, questions, {"name": "none"}, **asked), "cpu")
    assert set(bench.benchmark(Scored(Scores())).scores.benchmarks) == {"after_code/acc"}
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


@pytest.fixture(scope="module")
def trained(shared, questions, folder):
    """An ensemble's spec, and its members after training with their weights on disk."""
    model = tiny.build_model(shared / "asked-llama", talkative=True)
    method = {
        "name": "ensemble",
        "members": [{"method": LORA}, {"method": LORA, "seed": 9}, {"method": {"name": "none"}}],
    }
    plain = asks(
        model, questions, {"name": "none"}, {"train__steps": 12, "train__save_dtype": "float32"},
        tasks=["afters"], include_path=str(folder), limit=24,
    ).plain()  # fmt: skip
    plain["method"] = method
    plain["data"]["sources"][0] |= {"validation": 6}
    spec = TrialSpec.from_plain(plain)
    members = []
    for member in spec.members():
        bench = LlmSft().load(member, "cpu")
        for stage, steps in member.method.stages(bench.total_steps()):
            place = shared / "asked_members" / member.trial_id
            bench.attach(stage)
            bench.train(stage, steps, 0, place / "stage1", lambda metrics, step: None)
            bench.save(place / "adapter")
        members.append((MemberModel(member, place / "adapter" if member.method.name == "lora" else None), bench))
    return spec, members


@pytest.mark.slow
def test_an_ensemble_of_one_weight_answers_as_that_member(trained):
    spec, members = trained
    ensemble = LlmSft().load_ensemble(spec, [member for member, _ in members], "cpu")
    alone = [bench.benchmark(Scored(Scores())) for _, bench in members]
    assert set(alone[0].scores.benchmarks) == {"afters/acc", "after_word/acc", "after_generated/exact_match"}
    assert alone[0].scores.benchmarks != alone[1].scores.benchmarks
    for place, scores in enumerate(alone):
        ensemble.weights = [1.0 if place == other else 0.0 for other in range(3)]
        assert ensemble.benchmark(Scored(Scores())) == scores


@pytest.mark.slow
def test_the_mixture_is_that_of_the_probabilities(trained):
    import torch

    from ray_peft.tasks.llm_sft.ensemble import _mixed_log_probs

    spec, members = trained
    ensemble = LlmSft().load_ensemble(spec, [member for member, _ in members], "cpu")
    ensemble.weights = [0.5, 0.2, 0.3]
    ids = torch.tensor([[87, 104, 97, 116]])
    with torch.no_grad():
        mixed = _mixed_log_probs(ensemble._weighted_members(), ids).exp()
        alone = [torch.softmax(bench.model.eval()(ids).logits, dim=-1) for _, bench in members]
    expected = 0.5 * alone[0] + 0.2 * alone[1] + 0.3 * alone[2]
    assert torch.allclose(mixed, expected, atol=1e-5)
    assert torch.allclose(mixed.sum(-1), torch.ones(1, 4), atol=1e-5)
    assert ensemble.benchmark(Scored(Scores())).scores.benchmark_rows["after_word/acc"] == 24
