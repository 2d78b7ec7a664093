"""Held-out rows one by one: who is right alone, what all missed, and pages that stay small."""

import json
import re

from answered import POOR, REFERENCES, WORSE, material, trial
from page import Page

from ray_peft.report import rowwise
from ray_peft.report.content import build
from ray_peft.report.document import Paragraph, Questions, Table
from ray_peft.report.facts import comparison
from ray_peft.report.material import Material
from ray_peft.report.rowwise import row_by_row
from ray_peft.report.webpage import to_html

HALF = [*REFERENCES[:20], *WORSE[20:]]
OTHER = [*WORSE[:10], *REFERENCES[10:30], *WORSE[30:]]


def blocks(found, kind):
    return [block for block in row_by_row(found) if isinstance(block, kind)]


def test_counts_of_who_is_right_by_hand():
    (table,) = blocks(material([(trial("none"), WORSE), (trial("lora"), HALF), (trial("full"), OTHER)]), Table)
    counts = {line[0]: line[1:] for line in table.lines}
    # full: rows 10 to 29; lora: rows 0 to 19; of 40.
    first, second = [line[0] for line in table.lines][:2]
    assert {first, second} == {"lora", "full"}
    assert counts[first] == ("50.0 %", "10", "0", "0", "20")
    assert counts[second] == ("50.0 %", "10", "10", "10", "10")
    assert counts["none"] == ("0.0 %", "0", "20", "0", "20")


def test_rows_stand_with_their_answers_first_where_systems_differ():
    compared = material([(trial("none"), POOR), (trial("lora"), [*POOR[:39], REFERENCES[39]])])
    compared = Material(title="t", results=compared.results, answers=compared.answers, prompts={39: "Which cat?"})
    (questions,) = blocks(compared, Questions)
    assert len(questions.questions) == 40
    first = questions.questions[0]
    assert (first.number, first.prompt, first.reference) == (39, "Which cat?", REFERENCES[39])
    assert dict(zip(questions.systems, first.scores, strict=True)) == {"lora": 1.0, "none": 0.5}
    text = to_html(build(compared))
    assert len(re.findall(r'<details data-scores="', text)) == 40
    assert f'data-scores="{" ".join(f"{score:g}" for score in first.scores)}"' in text


def test_long_answers_are_cut_and_many_are_left_out(monkeypatch):
    monkeypatch.setattr(rowwise, "BUDGET", 5_000)
    compared = material([(trial("none"), POOR), (trial("lora"), ["x" * 5_000 for _ in REFERENCES])])
    (questions,) = blocks(compared, Questions)
    said = " ".join(block.text for block in blocks(compared, Paragraph))
    assert f"{40 - len(questions.questions)} others are left out" in said
    assert 0 < len(questions.questions) < 10
    assert "[4400 more characters in answers.jsonl]" in " ".join(questions.questions[0].answers)


def test_any_two_trials_can_be_laid_side_by_side():
    compared = material([(trial("lora", seed=1), POOR), (trial("lora", seed=2), POOR), (trial("full"), POOR)])
    (block,) = comparison(compared.rows)
    settings = dict(block.settings)
    assert set(settings["seed"]) == {"1", "2", "42"}
    assert "method.rank" in settings
    assert None in settings["method.rank"]
    assert comparison(compared.rows[:1]) == []
    page = to_html(build(compared))
    data = re.search(r'<div class="comparison" data-settings="([^"]*)"', page)[1].replace("&quot;", '"')
    assert json.loads(data)["trials"] == list(block.trials)
    Page(page)


def test_hostile_labels_and_answers_stay_data():
    bad = "</script><script>alert(1)</script>\"'&"
    compared = material([(trial("none"), [bad] * 40), (trial("lora", model={"tokenizer": bad}), POOR)])
    text = to_html(build(compared))
    assert text.count("<script") == 1
    Page(text)
