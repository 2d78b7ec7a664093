"""A sweep's folder: killed writers, broken lines, spreadsheets, files that are whole or absent."""

import csv
import json
import logging

import pytest

from ray_peft.errors import DataError
from ray_peft.foundation import whole as atomic
from ray_peft.metrics.scores import Scores
from ray_peft.report.csvfile import write_csv
from ray_peft.report.files import write_report
from ray_peft.report.flat import flatten
from ray_peft.spec import TrialSpec
from ray_peft.store.results_file import read_results
from ray_peft.trial.result import Provenance, TrialResult, Usage


def trial(method="lora", *, path="a.jsonl", **more):
    spec = TrialSpec.from_plain(
        {
            "model": {"name": "org/tiny"},
            "data": {"sources": [{"recipe": "alpaca", "path": path, "train": 90, "test": 0.5}]},
            "method": {"name": method},
            "train": {"steps": 10},
        }
    )
    return TrialResult(**({"trial_id": spec.trial_id, "status": "finished", "spec": spec} | more))


def line(result):
    return json.dumps(result.row(), ensure_ascii=False) + "\n"


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_later_line_of_a_trial_replaces_the_earlier(tmp_path):
    first, second = trial(status="failed", error="x"), trial(scores=Scores(eval_loss=float("inf")))
    (tmp_path / "results.jsonl").write_text(line(first) + line(trial("none")) + "\n" + line(second))
    assert read_results(tmp_path) == [second, trial("none")]


@pytest.mark.parametrize("end", range(1, 400, 7))
def test_a_line_cut_by_a_kill_is_passed_over(tmp_path, caplog, end):
    whole = line(trial(error="模型\u2028\x85", status="failed"))
    cut = whole.encode()[:end]
    (tmp_path / "results.jsonl").write_bytes(line(trial("none")).encode() + cut)
    with caplog.at_level(logging.WARNING):
        assert read_results(tmp_path) == [trial("none")]
    assert "line 2, the last one, is incomplete" in caplog.text


def test_a_whole_last_line_without_its_end_counts(tmp_path, caplog):
    (tmp_path / "results.jsonl").write_text(line(trial()).rstrip("\n"))
    assert read_results(tmp_path) == [trial()]
    assert not caplog.records


def test_line_ends_of_unicode_do_not_split_a_line(tmp_path):
    result = trial(status="failed", error="a\u2028b\x85c\x0bd")
    (tmp_path / "results.jsonl").write_text(line(result), encoding="utf-8")
    assert read_results(tmp_path) == [result]


def test_a_broken_line_elsewhere_is_an_error_that_names_it(tmp_path):
    (tmp_path / "results.jsonl").write_text(line(trial("none")) + '{"trial_id": "lo\n' + line(trial()))
    with pytest.raises(DataError, match=r"results\.jsonl: line 2: not valid JSON"):
        read_results(tmp_path)


def test_a_last_line_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"trial_id": "lora-1"}\n')
    with pytest.raises(DataError, match=r"results\.jsonl: line 1: status: Field required"):
        read_results(tmp_path)


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(DataError, match="give the folder that a sweep wrote"):
        write_report(tmp_path)


def test_a_sweep_stopped_before_its_first_result_has_a_report(tmp_path):
    (tmp_path / "sweep.json").write_text('{"name": "n", "planned": ["lora-1"]}')
    markdown, page, table = write_report(tmp_path)
    assert "No trial has a result." in markdown.read_text()
    assert "- lora-1" in markdown.read_text()
    assert "<li>lora-1</li>" in page.read_text()
    assert not (tmp_path / "plots").exists()
    assert read_csv(table) == []
    assert table.read_text() == "trial_id,label,status\n"


def test_an_empty_file_is_an_empty_sweep(tmp_path):
    (tmp_path / "results.jsonl").touch()
    assert read_results(tmp_path) == []
    assert len(write_report(tmp_path)) == 3


def test_a_broken_plan_is_an_error(tmp_path):
    (tmp_path / "results.jsonl").touch()
    (tmp_path / "sweep.json").write_text('{"name": 3}')
    with pytest.raises(DataError, match=r"sweep\.json: name: "):
        write_report(tmp_path)


def test_the_whole_folder(tmp_path):
    results = [trial("none", scores=Scores(rouge_l=0.5)), trial("lora", scores=Scores(rouge_l=0.75))]
    (tmp_path / "results.jsonl").write_text("".join(map(line, results)))
    (tmp_path / "sweep.json").write_text(
        json.dumps(
            {
                "name": "grid",
                "description": "Which?",
                "notes": ["9 rows"],
                "planned": [*(result.trial_id for result in results), "galore-1"],
                "new": 1,
            }
        )
    )
    for result, prediction in zip(results, ("a b", "a b c d"), strict=True):
        folder = tmp_path / "trials" / result.trial_id
        folder.mkdir(parents=True)
        answers = [{"row": row, "prediction": prediction, "reference": "a b c d"} for row in (2, 0, 1)]
        # Cut by a kill, like any other file that grows.
        (folder / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers) + '{"row": 3, "pre')
        sample = {"row": 0, "source_dataset": "s", "prompt": "q", "reference": "a b c d", "answer": prediction}
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    paths = write_report(tmp_path)
    assert paths == [tmp_path / name for name in ("report.md", "report.html", "report.csv")]
    text = paths[0].read_text()
    assert text.startswith("# grid\n\nWhich?\n\n")
    for wanted in ("- 9 rows", "- galore-1", "**Answer: lora**", "+0.2500 (+50.0 %) \\[+0.3333, +0.3333\\]"):
        assert wanted in text
    assert write_report(tmp_path) == paths  # over the old files
    assert paths[0].read_text() == text
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


def test_rows_that_the_search_space_no_longer_names_are_left_out(tmp_path):
    results = [trial("none"), trial("lora")]
    (tmp_path / "results.jsonl").write_text("".join(map(line, results)))
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "grid", "planned": [results[0].trial_id]}))
    report = write_report(tmp_path)[0].read_text()
    assert results[0].trial_id in report
    assert results[1].trial_id not in report


def test_csv_reads_back_equal(tmp_path):
    results = [
        trial(
            "lora",
            path='/data/模型, "a"\r\n|.jsonl',
            usage=Usage(train_s=0.1 + 0.2, tokens_per_s=-1.5),
            provenance=Provenance(versions={"torch": "2.11.0"}, hostname="=cmd()"),
            error="-1\rtwo\nlines",
            status="failed",
        ),
        trial("none", scores=Scores(eval_loss=-2.5e-7), error="@x", mlflow_run_id="+1"),
    ]
    path = tmp_path / "report.csv"
    write_csv(results, path)
    by_id = {row["trial_id"]: row for row in read_csv(path)}
    assert list(by_id) == [results[1].trial_id, results[0].trial_id]
    for result in results:
        found, wanted = by_id[result.trial_id], flatten(result.row())
        for key, value in wanted.items():
            cell = found[key]
            if value is None:
                assert cell == ""
            elif isinstance(value, str):
                assert cell == (f"'{value}" if value[:1] in {"=", "+", "-", "@"} else value)
            else:
                assert json.loads(cell) == value
        assert all(found[key] == "" for key in set(found) - set(wanted) - {"label"})
    assert by_id[results[0].trial_id]["provenance.hostname"] == "'=cmd()"
    assert by_id[results[0].trial_id]["usage.tokens_per_s"] == "-1.5"


def test_csv_columns_begin_with_the_comparison(tmp_path):
    write_csv([trial("none"), trial("lora")], tmp_path / "r.csv")
    columns = list(read_csv(tmp_path / "r.csv")[0])
    assert columns[:4] == ["trial_id", "label", "status", "scores.eval_loss"]
    assert {"spec.method.rank", "spec.data.sources.0.path", "usage.peak_reserved_gib"} <= set(columns)
    assert len(set(columns)) == len(columns)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    atomic.write_text(path, "old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_line_ends_and_lone_surrogates_can_be_written(tmp_path):
    atomic.write_text(tmp_path / "a", "a\r\nb\n\udc80")
    assert (tmp_path / "a").read_bytes() == b"a\r\nb\n\\udc80"
