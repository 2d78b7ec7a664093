"""What the recommendation says, and what it says cannot be said."""

from answered import NEARLY, POOR, REFERENCES, WORSE, material, trial

from ray_peft.report.advice import advice
from ray_peft.report.document import Bullets, Heading, Paragraph, Table
from ray_peft.trial.result import Provenance


def said(found):
    """Lists and paragraphs before the rules as one text, and the tables' lines by their first header."""
    blocks = advice(found)
    rules = blocks.index(Heading("Rules of the recommendation"))
    texts = [item for block in blocks[:rules] if isinstance(block, Bullets) for item in block.items]
    texts += [block.text for block in blocks[:rules] if isinstance(block, Paragraph)]
    return "\n".join(texts), {block.header[0]: block.lines for block in blocks if isinstance(block, Table)}


def test_budgets_and_ties():
    text, tables = said(
        material(
            [
                (trial("none", memory=0.5), POOR),
                (trial("full", memory=9.0), REFERENCES),
                (trial("lora", memory=4.0), REFERENCES),
                (trial("qlora", memory=2.0), NEARLY),
                (trial("galore", memory=3.0), WORSE),
            ]
        )
    )
    assert "Take lora: ROUGE-L 1.0000 (1.000 to 1.000); no method is shown to be better than it, and full" in text
    assert "Of these lora takes the least memory (4.00 GiB) and the least training time (40.0 s)." in text
    assert (
        "shown to be better: full and lora; shown to be worse: galore; "
        "no difference that these rows can show: qlora." in text
    )
    # qlora is tied with the base, which is cheaper; galore is worse: neither is ever recommended.
    assert tables["Peak memory at hand"] == (
        ("from 0.50 GiB to under 4.00 GiB", "none (no fine-tuning)", "qlora: 2.00 GiB"),
        ("from 4.00 GiB on", "lora", "full: 9.00 GiB"),
    )
    assert tables["Training time at hand"][-1] == ("from 40.0 s on", "lora", "full: 90.0 s")


def test_a_budget_begins_where_the_pick_changes_and_not_at_what_the_pick_needs():
    """The dearest row is shown to be better than the cheapest, which leaves the one between them."""
    middle = [*REFERENCES[:-3], *POOR[-3:]]
    text, tables = said(
        material(
            [
                (trial("qlora", memory=2.0), NEARLY),
                (trial("lora", memory=4.0), middle),
                (trial("full", memory=9.0), REFERENCES),
            ]
        )
    )
    needs = {"qlora": 2.0, "lora": 4.0, "full": 9.0}
    for line in tables["Peak memory at hand"]:
        begin = float(line[0].split()[1])
        assert begin >= needs[line[1]]
    ends = [line[0].split(" to under ")[1] for line in tables["Peak memory at hand"][:-1]]
    assert ends == [
        line[0].removeprefix("from ").split(" to ")[0].removesuffix(" on") for line in tables["Peak memory at hand"][1:]
    ]


def test_one_row():
    text, tables = said(material([(trial("lora", memory=1.0), POOR)]))
    assert text.startswith("Only one row is finished and scored, so there is nothing to compare it with.")
    assert not tables


def test_no_base():
    text, _ = said(material([(trial("lora"), POOR), (trial("full"), REFERENCES)]))
    assert "Whether fine-tuning helps cannot be said" in text
    assert "Take full: ROUGE-L 1.0000 (1.000 to 1.000), shown to be better than every other method." in text


def test_no_answers():
    text, _ = said(material([(trial("none", loss=2.0), None), (trial("lora", loss=1.0), None)]))
    assert "No answers are on file" in text
    assert "Take lora: held-out loss 1.0000, lower by more than 1% than every other method." in text
    assert "Against the model without fine-tuning: lower loss: lora." in text


def test_only_failed_rows():
    failed = trial("lora", status="failed"), trial("full", status="out_of_memory", memory=22.5)
    text, tables = said(material([(result, None) for result in failed]))
    assert text.startswith("No trial finished, so nothing can be recommended.")
    assert "Ran out of memory here, so no candidate: full: 22.50 GiB." in text
    assert not tables


def test_tied_rows_of_which_each_is_cheaper_in_its_way():
    slow = trial("lora", memory=1.0)
    slow = slow.model_copy(update={"usage": slow.usage.model_copy(update={"train_s": 99.0})})
    text, _ = said(material([(slow, POOR), (trial("full", memory=5.0), POOR)]))
    assert "lora takes the least memory (1.00 GiB); full takes the least training time (50.0 s)." in text


def test_every_model_has_its_own_base():
    other = {"name": "org/other"}
    text, _ = said(
        material(
            [
                (trial("none"), POOR),
                (trial("lora"), REFERENCES),
                (trial("none", model=other), REFERENCES),
                (trial("lora", model=other), POOR),
            ]
        )
    )
    assert "shown to be better: lora model=tiny; shown to be worse: lora model=other." in text


def test_costs_of_several_machines_are_not_compared():
    made = [Provenance(device=device) for device in ("A", "B")]
    text, tables = said(
        material(
            [
                (trial("lora", memory=1.0, provenance=made[0]), POOR),
                (trial("full", memory=2.0, provenance=made[1]), REFERENCES),
            ]
        )
    )
    assert "Training time: there is no recommendation" in text
    assert list(tables) == ["Peak memory at hand"]


def test_few_rows_are_said_to_be_few():
    text, _ = said(material([(trial("none"), POOR[:9]), (trial("lora"), REFERENCES[:9])], REFERENCES[:9]))
    assert "Answered rows: 9. So few may hold none of the rare cases that decide which one is better." in text


def test_the_rules_are_printed():
    rules = advice(material([(trial("lora"), POOR)]))[-1]
    assert any("A difference that is not shown never decides" in rule for rule in rules.items)


def test_a_resumed_trial_is_said_and_one_whose_costs_are_lost_decides_no_budget():
    resumed = trial("lora", memory=4.0).model_copy(update={"resumed_from_step": 6})
    rows = [(trial("none", memory=0.5), POOR), (trial("full", memory=9.0), REFERENCES)]
    text, tables = said(material([*rows, (resumed, REFERENCES)]))
    assert (
        "Interrupted, then continued from a checkpoint: lora (from step 6). Time, tokens and peaks are those of" in text
    )
    assert "Peak memory at hand" in tables
    lost = resumed.model_copy(update={"usage": resumed.usage.model_copy(update={"complete": False})})
    text, tables = said(material([*rows, (lost, REFERENCES)]))
    assert "Training time: there is no recommendation, since a trial went on from a checkpoint of version" in text
    assert not tables
