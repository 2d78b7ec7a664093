"""`ray-peft compare` from a model and a file of rows to its answer, going on, and wrong arguments."""

import json
import os
import shutil
from collections import Counter

import pytest
import tiny

from ray_peft import cli
from ray_peft.compare import budget, command
from ray_peft.compare.budget import Shape
from ray_peft.schedule import cluster
from ray_peft.schedule.decide import Node
from ray_peft.space.read import load
from ray_peft.store.results_file import read_results

WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
ROWS = [{"instruction": f"Say {a} and {b}.", "output": f"{a} {b}."} for a in WORDS for b in WORDS]
RUNGS = ("0_speed", "1_search", "2_longer", "3_answer")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """49 rows and two that repeat them, in the current folder; a cache without speeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(budget, "SHAPES", (Shape(3, 2, 1, 6),))  # all rungs, with few trials
    return tiny.write_rows(tmp_path / "rows.jsonl", [*ROWS, *ROWS[:2]])


def test_a_comparison_is_planned_edited_run_and_gone_on_with(
    ray_cluster, tiny_model, rows, empty_database, tmp_path, capsys
):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    arguments = ["compare", str(tiny_model), "rows.jsonl", "--methods", "full,lora", "--hours", "0.5"]
    arguments += ["--metric", "eval_loss", "--out", "out", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    assert cli.main([*arguments, "--plan-only"]) == 0
    told = capsys.readouterr().out
    assert "rows: 51 of recipe alpaca, 51 usable, 2 repeat others" in told
    assert "not measured yet on" in told
    file = tmp_path / "out" / "1_search.yaml"
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"1_search.yaml", "0_speed", "compare.json"}
    assert not (tmp_path / "out" / "1_search").exists()
    trials = load(file).trials
    assert Counter(trial.method.name for trial in trials) == {"full": 3, "lora": 3}
    assert {(trial.evaluation.split, trial.evaluation.generate, trial.seed) for trial in trials} == {
        ("validation", False, 1)
    }
    text = file.read_text(encoding="utf-8")
    assert "# 3 learning rates for each method" in text
    assert "s a step measured" in text
    file.write_text(text.replace("warmup_ratio: 0.1", "warmup_ratio: 0.2"), encoding="utf-8")

    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert f"going on with out{os.sep}1_search.yaml" in told
    lines = (tmp_path / "out" / "answer.txt").read_text(encoding="utf-8").splitlines()
    assert all(line in told for line in lines)
    assert lines[0].startswith("Take ")
    assert "test rows, one seed (95 % over rows); the untouched base: loss" in lines[0]
    assert lines[-1].startswith("Train it on all rows but the test rows: ray-peft run ")
    results = {rung: read_results(tmp_path / "out" / rung) for rung in RUNGS}
    assert Counter(row.spec.method.name for row in results["2_longer"]) == {"full": 2, "lora": 2}
    answer = results["3_answer"]
    assert Counter((row.spec.method.name, row.spec.seed) for row in answer) == {
        ("none", 2): 1, ("full", 2): 1, ("lora", 2): 1
    }  # fmt: skip
    steps = [{row.steps for row in results[rung] if row.spec.method.name != "none"} for rung in RUNGS[1:]]
    assert [len(of_rung) for of_rung in steps] == [1, 1, 1]  # every method has as many
    assert min(steps[0]) < min(steps[1]) < min(steps[2])
    for rung in RUNGS[1:]:
        assert {row.spec.evaluation.split for row in results[rung]} == {"test" if rung == "3_answer" else "validation"}
        assert {row.spec.train.warmup_ratio for row in results[rung]} == {0.2}  # as it was edited
        assert all(set(row.predicted_s) >= {"evaluate_s", "wall_time_s"} for row in results[rung])
    for method in ("full", "lora"):  # the rate with the lowest validation loss of the longer trials
        of_method = [row for row in results["2_longer"] if row.spec.method.name == method]
        best = min(of_method, key=lambda row: row.scores.eval_loss)
        assert {row.spec.method.lr for row in answer if row.spec.method.name == method} == {best.spec.method.lr}
    (whole,) = load(tmp_path / "out" / "train_all.yaml").trials
    assert (whole.data.sources[0].train, whole.data.sources[0].validation) == (1.0, 0)
    assert whole.method.name == lines[0].split()[1]

    before = {rung: (tmp_path / "out" / rung / "results.jsonl").read_bytes() for rung in RUNGS}
    assert cli.main(arguments) == 0
    assert {rung: (tmp_path / "out" / rung / "results.jsonl").read_bytes() for rung in RUNGS} == before
    again = capsys.readouterr().out
    assert all(line in again for line in lines if not line.startswith("Predicted"))

    other = ["--metric", "rouge_l"]
    assert cli.main([*arguments, *other]) == 2
    assert "holds a comparison with metric 'eval_loss' (now 'rouge_l'); give another --out" in capsys.readouterr().err
    # Measured before, so nothing runs until it is refused.
    assert cli.main([*arguments, "--hours", "0.0005", "--out", "short"]) == 2
    assert "the smallest comparison of 2 methods is predicted to take" in capsys.readouterr().err
    assert not (tmp_path / "short").exists()
    assert cli.main([*arguments, "--plan-only", "--out", "second"]) == 0
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"1_search.yaml", "compare.json"}
    assert cli.main(["plan", str(file), "--gpu-memory-gib", "12"]) == 0
    planned = capsys.readouterr().out
    assert planned.count("s a step)") == 6
    assert "for 6 trials one after the other" in planned
    assert cli.main(["plan", str(file), "--gpu-memory-gib", "12", "--json", "--set", "train.batch_size=8"]) == 0
    assert [trial["predicted_s"] for trial in json.loads(capsys.readouterr().out)] == [{}] * 6


@pytest.mark.long
def test_pairs_are_compared_by_reward_accuracy(ray_cluster, tiny_model, rows, empty_database, tmp_path, capsys):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    pairs = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": f"no {place}"}
        for place, row in enumerate(ROWS)
    ]
    tiny.write_rows(tmp_path / "pairs.jsonl", pairs)
    command = ["compare", str(tiny_model), "pairs.jsonl", "--methods", "full,lora", "--hours", "0.5", "--out", "out"]
    assert cli.main([*command, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 0
    lines = (tmp_path / "out" / "answer.txt").read_text(encoding="utf-8").splitlines()
    assert "test pairs, one seed (95 % over rows); the untouched base: reward accuracy 0.5" in lines[0]
    assert "Learning rates were chosen by DPO's loss on validation pairs" in "".join(lines)
    rates = set()
    for rung in RUNGS[1:]:
        for row in read_results(tmp_path / "out" / rung):
            assert (row.status, row.spec.train.objective, row.spec.evaluation.generate) == ("finished", "dpo", False)
            assert row.scores.reward_accuracy is not None
            rates |= {row.spec.method.lr} if rung == "1_search" and row.spec.method.name == "lora" else set()
    assert rates == {2e-5, 2e-4, 2e-3}
    (whole,) = load(tmp_path / "out" / "train_all.yaml").trials
    assert whole.train.objective == "dpo"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "./tiny-lama"}, "MODEL: ./tiny-lama: no such file or folder"),
        ({"model": "tiny-lama"}, "MODEL: tiny-lama: no such file or folder"),
        ({"data": "rows.json"}, "DATA: rows.json: no such file or folder, nor a hub id such as owner/name; . holds"),
        ({"data": "few.jsonl"}, "few.jsonl: has 8 different rows that can be used, of 8; a comparison needs 48"),
        ({"data": "odd.jsonl"}, "its rows have the fields a, b, which no recipe"),
        ({"methods": "lora,loraa"}, "did you mean lora?"),
        ({"methods": "lora,lora"}, "name each method once"),
        ({"model": "rows.jsonl", "data": "MODEL"}, "MODEL: rows.jsonl: is a file; give a model's folder"),
        ({"data": "MODEL"}, "holds a model (config.json); give a file or a folder of rows; the order is: ray-peft"),
    ],
)
def test_a_typing_error_is_one_clear_error_before_anything_starts(
    tiny_model, rows, tmp_path, capsys, monkeypatch, changes, words
):
    monkeypatch.setattr(cluster.KeptConnection, "connect", lambda self: pytest.fail("Ray takes seconds to start"))
    tiny.write_rows(tmp_path / "few.jsonl", ROWS[:8])
    tiny.write_rows(tmp_path / "odd.jsonl", [{"a": "1", "b": "2"}] * 50)
    given = {"model": "MODEL", "data": "rows.jsonl", "methods": "lora"} | changes
    given |= {key: str(tiny_model) for key, value in given.items() if value == "MODEL"}
    assert cli.main(["compare", given["model"], given["data"], "--methods", given["methods"], "--out", "out"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert words in told
    assert not (tmp_path / "out").exists()


def test_a_time_in_which_nothing_can_be_measured_is_refused_at_once(tiny_model, rows, capsys, monkeypatch):
    monkeypatch.setattr(cluster.KeptConnection, "connect", lambda self: [Node(2, 0)])
    arguments = [str(tiny_model), "rows.jsonl", "--methods", "lora", "--out", "out", "--hours", "0.001"]
    assert cli.main(["compare", *arguments]) == 2
    assert "--hours 0.001: a comparison is 3 sweeps or more" in capsys.readouterr().err
    assert not os.path.exists("out")


def test_whoever_interrupts_a_comparison_is_told_how_it_goes_on(tiny_model, rows, capsys, monkeypatch):
    def interrupt(*arguments):
        os.mkdir("out")
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster.KeptConnection, "connect", lambda self: [Node(2, 0)])
    monkeypatch.setattr(command, "measure", interrupt)
    assert cli.main(["compare", str(tiny_model), "rows.jsonl", "--methods", "lora", "--out", "out"]) == 130
    told = capsys.readouterr()
    assert "finished trials are kept; the same command goes on" in told.out
    assert "interrupted" in told.err


@pytest.mark.parametrize("names", ["", ",", "lora,", "lora,,full"])
def test_an_empty_name_is_no_method(names, capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "model", "rows.jsonl", "--methods", names])
    assert "must be names with a comma between two of them" in capsys.readouterr().err
