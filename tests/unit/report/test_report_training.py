"""Tables of a whole sweep's report, by value."""

import json
import re
import shutil

import pytest

from ray_peft.cli import main
from ray_peft.report.files import write_report


@pytest.fixture(scope="session")
def text(swept):
    return (swept / "report.md").read_text(encoding="utf-8")


def tables(text, section):
    """The tables of a section as lists of lines, the header first."""
    body = text.split(f"## {section}\n\n")[1].split("\n\n## ")[0]
    found = []
    for block in body.split("\n\n"):
        if block.startswith("|"):
            header, _, *lines = (re.split(r"(?<!\\) \| ", line.strip("| ")) for line in block.splitlines())
            found.append([header, *lines])
    return found


def line(table, *start):
    (found,) = [dict(zip(table[0], line, strict=True)) for line in table[1:] if line[: len(start)] == list(start)]
    return found


def test_training_metrics(text):
    (table,) = tables(text, "Training metrics")
    assert not [each for each in table if each[0].startswith("none")]
    assert line(table, "galore seed=1") == {
        "Trial": "galore seed=1",
        "Weights of the base": "bfloat16",
        "Matrix products": "bf16",
        "Arithmetic of the trained weights": "bfloat16 weights, stochastic rounding",
        "Steps": "300",
        "Training": "27.4 s",
        "Steps/s": "10.950",
        "Peak memory \\[GiB\\]": "9.33",
        "Final train loss": "1.6600",
        "Held-out loss": "1.7200",
        "On disk": "256.61 MiB",
    }
    assert line(table, "qlora seed=1")["Weights of the base"] == "4-bit nf4"


def test_losses_at_steps(text):
    (table,) = tables(text, "Loss over steps")
    assert table[0][2:] == [f"Step {step}" for step in (50, 100, 150, 200, 250, 300)]
    assert line(table, "full seed=1", "held-out")["Step 50"] == "2.1346"
    assert line(table, "galore seed=2", "training")["Step 200"] == "-"  # it failed after 150


def test_between_stages(text):
    (table,) = tables(text, "Between stages")
    assert table == [
        ["Trial", "After stage 1", "After merge 1", "Merge 1 costs", "At the end"],
        ["qlora_galore seed=1", "1.8056", "1.8067", "+0.0011", "1.7800"],
        ["qlora_galore seed=2", "1.8056", "1.8067", "+0.0011", "1.7900"],
    ]


def test_members_of_an_ensemble(text):
    (table,) = tables(text, "Ensembles")
    assert [each[1:] for each in table[1:]] == [["lora rank=16 seed=1", "0.600"], ["full seed=1", "0.400"]]


def test_storage(text):
    (table,) = tables(text, "Storage by dtype")
    assert list(line(table, "lora rank=16 seed=1").values())[1:] == [
        "4,884,480",
        "18.63 MiB",
        "9.32 MiB",
        "9.32 MiB",
        "9.36 MiB",
        "bfloat16",
    ]


def test_ties_of_the_whole_sweep(text):
    tiers, matrix, pairs = tables(text, "Which differences are shown")
    assert [cells_of_row[1] for cells_of_row in tiers[1:]] == ["1", "1", "2", "2", "2", "2", "3"]
    names = [cells_of_row[0].partition(": ")[2] for cells_of_row in matrix[1:]]
    assert names == [cells_of_row[0] for cells_of_row in tiers[1:]]
    assert matrix[0][1:] == list("ABCDEFG")
    cells = [cells_of_row[1:] for cells_of_row in matrix[1:]]
    for row in range(7):
        for column in range(7):
            one, other = cells[row][column], cells[column][row]
            assert other == one.translate(str.maketrans("+-", "-+")) or one == other == "-"
    assert len(pairs) == 1 + 21
    assert "rejects equality, corrected for all 21 pairs (Holm)" in text
    assert text.isascii()


def test_chosen_steps_come_from_the_search_space_or_the_command(tmp_path, swept, capsys):
    folder = tmp_path / "sweep"
    shutil.copytree(swept, folder)
    record = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(record | {"report": {"loss_steps": [10, 55, 1000]}}))
    write_report(folder)
    (table,) = tables((folder / "report.md").read_text(), "Loss over steps")
    assert table[0][2:] == ["Step 10", "Step 55", "Step 1,000"]
    assert line(table, "full seed=1", "training")["Step 55"].endswith(" (step 50)")
    assert line(table, "full seed=1", "training")["Step 1,000"] == "-"
    assert main(["report", str(folder), "--loss-steps", "20,300"]) == 0
    printed = capsys.readouterr().out
    for name in ("report.md", "report.html", "report.csv", "losses.svg"):
        assert f"{name}\n" in printed
    assert printed.isascii()
    (table,) = tables((folder / "report.md").read_text(), "Loss over steps")
    assert table[0][2:] == ["Step 20", "Step 300"]


@pytest.mark.parametrize("steps", ["", "0,5", "a", "1;2"])
def test_wrong_steps_are_refused(steps, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path), "--loss-steps", steps])
    assert stopped.value.code == 2
    assert "--loss-steps" in capsys.readouterr().err


def test_the_command_reports_a_killed_sweep(tmp_path, swept, capsys):
    assert main(["report", str(tmp_path)]) == 2
    shutil.copy(swept / "sweep.json", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "No trial has a result." in capsys.readouterr().out


def test_trials_that_trained_together_say_so_and_are_compared_by_neither_memory_nor_time(swept, tmp_path):
    folder = shutil.copytree(swept, tmp_path / "packed")
    rows = [json.loads(row) for row in (folder / "results.jsonl").read_text().splitlines()]
    for row in rows:
        row["pack_size"] = 2 if row["spec"]["method"]["name"] == "lora" else 1
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Trained together" in text
    assert "their seconds of training are divided by the tokens of their steps" in text
    assert "trials trained together on one base, and their peaks are those of all of them" in text
    assert "train.pack: false gives each its own" in text
    assert "Trained together" not in (swept / "report.md").read_text(encoding="utf-8")
