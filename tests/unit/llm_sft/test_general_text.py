"""The loss on a general text, beside that on the held-out rows."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from untracked import run

from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.general_text import PASSAGES, general_rows


def test_the_rows_are_the_text_in_pieces_that_fit(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = general_rows(tokenizer, 96)
    assert max(map(len, rows["input_ids"])) == 96
    assert rows["input_ids"] == rows["labels"]
    whole = "".join(tokenizer.decode(ids) for ids in rows["input_ids"])
    assert len(whole) > 0.99 * len("".join(PASSAGES))
    assert max(map(len, general_rows(tokenizer, 4096)["input_ids"])) == 256


def test_the_loss_is_that_of_transformers_and_training_on_something_else_changes_it(tiny_model, questions, tmp_path):
    settings = {"evaluation__general_text": True, "evaluation__generate": False}
    none = {"name": "none"}
    base, _ = run(TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, none, **settings)), tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in general_rows(AutoTokenizer.from_pretrained(tiny_model), 96)["input_ids"]:
            ids = torch.tensor([ids])
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert base.scores.general_loss == pytest.approx(total / tokens, rel=1e-4)
    tuned, _ = run(TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, **settings)), tmp_path / "b")
    assert tuned.scores.general_loss != pytest.approx(base.scores.general_loss, rel=1e-4)
    plain, _ = run(TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, none)), tmp_path / "c")
    assert plain.scores.general_loss is None
