"""Reports of texts in other scripts: columns, what cut the texts, and rows of version 0.1.0, cut as English."""

from __future__ import annotations

import csv
import json

from answered import POOR, REFERENCES, trial

from ray_peft.metrics.scores import Scores
from ray_peft.report.files import write_report
from ray_peft.tasks.llm_sft.scores import score_answers

CHINESE = [f"是的，第{number}个问题没有任何错误。" for number in range(12)]


def written(folder, rows, losses=None):
    """The report of (method, scores, answers) rows, and its csv."""
    lines = []
    for method, scores, given, references in rows:
        result = trial(method).model_copy(update={"scores": scores})
        lines.append(json.dumps(result.row()))
        place = folder / "trials" / result.trial_id
        place.mkdir(parents=True)
        answers = [{"row": i, "prediction": p, "reference": r} for i, (p, r) in enumerate(zip(given, references))]  # noqa: B905
        (place / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
        if losses:
            (place / "losses.jsonl").write_text("".join(json.dumps(one) + "\n" for one in losses[method]))
    (folder / "results.jsonl").write_text("".join(f"{line}\n" for line in lines))
    write_report(folder)
    with open(folder / "report.csv", encoding="utf-8", newline="") as file:
        return (folder / "report.md").read_text(encoding="utf-8"), list(csv.DictReader(file))


def test_chinese_rows_of_the_first_version_are_scored_again(tmp_path):
    old = Scores(eval_loss=1.0, bleu4=0.0, rouge_l=0.0, eval_rows=12, generated_rows=12)
    half = [text if number % 2 else "不知道" for number, text in enumerate(CHINESE)]
    text, table = written(tmp_path, [("none", old, half, CHINESE), ("lora", old, CHINESE, CHINESE)])
    assert [row["scores.rouge_l"] for row in table] == ["0.5", "1.0"]
    assert table[1]["scores.bleu4"] == table[1]["scores.chrf"] == "1.0"
    assert {row["scores.bleu_tokenizer"] for row in table} == {"zh"}
    assert "BLEU-4 of zh tokens and ROUGE-L of words of Unicode" in text
    assert "| chrF |" in text
    # Six of twelve rows differ: two flips of 64 are as far as that.
    assert "Take lora: ROUGE-L 1.0000 (1.000 to 1.000), shown to be better than every other method." in text


def test_english_rows_of_the_first_version_stay_as_they_are(tmp_path):
    odd = Scores(eval_loss=1.0, bleu4=0.123, rouge_l=0.456)
    _, table = written(tmp_path, [("none", odd, POOR, REFERENCES)])
    assert (table[0]["scores.bleu4"], table[0]["scores.rouge_l"], table[0]["scores.chrf"]) == ("0.123", "0.456", "")


def test_losses_of_text_have_intervals_and_short_references_a_warning(tmp_path):
    words = ["yes" if number % 3 else "no" for number in range(12)]
    losses = {
        "none": [{"row": i, "loss": 2.0 + i / 10, "tokens": 3 + i % 2} for i in range(12)],
        "lora": [{"row": i, "loss": 1.0 + i / 20, "tokens": 3 + i % 2} for i in range(12)],
    }
    rows = [
        (method, score_answers(given, words).model_copy(update={"eval_loss": loss, "eval_rows": 12}), given, words)
        for method, loss, given in (("none", 2.54, ["maybe"] * 12), ("lora", 1.27, words))
    ]
    text, _ = written(tmp_path, rows, losses)
    header = next(line for line in text.splitlines() if line.startswith("| Trial | Status | Eval loss"))
    lora = next(line for line in text.splitlines() if line.startswith("| lora | finished"))
    cell = lora.split(" | ")[header.split(" | ").index("vs base")]
    assert cell.startswith("-1.27")
    assert "\\[" in cell
    assert "BLEU-4 is 0 whatever is answered where no reference has four tokens" in text
