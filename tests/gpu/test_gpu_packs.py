"""Recorded passes of several members have the numbers of the same trials alone."""

import pytest
import tiny
from packs import UNEQUAL, alone, check_equal, specs_of, together

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.QUESTIONS)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("places", [4, 2])
def test_recorded_passes(places, checkpointing, rows, tmp_path):
    model = tiny.build_model(tmp_path / "model")
    settings = [(method, {**changes, "train__steps": 2 * changes["train__steps"]}) for method, changes in UNEQUAL]
    specs = specs_of(model, rows, settings, train__gradient_checkpointing=checkpointing)
    for ours, spec in zip(together(specs, tmp_path, places, device="cuda:0"), specs, strict=True):
        assert ours.passes == "recorded"
        ours.log, theirs = ours.log[:6], alone(spec, tmp_path / spec.trial_id, "cuda:0")
        theirs.log = theirs.log[:6]
        check_equal(ours, theirs, close=1e-4)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_scores_and_dropout(name, rows, tmp_path):
    """Trials that end at the same step are scored together."""
    model = tiny.build_model(tmp_path / "model", talkative=name == "lora")
    four_bit = {"compute_dtype": "float32"} if name == "qlora" else {}
    settings = [
        (
            {"name": name, "rank": rank, "alpha": rank, "lr": 0.001, "dropout": dropout, **four_bit},
            {"seed": rank, "train__steps": 8},
        )
        for rank, dropout in ((4, 0.0), (8, 0.2), (3, 0.1))
    ]
    specs = specs_of(model, rows, settings, evaluation__general_text=True)
    for ours, spec in zip(together(specs, tmp_path, 3, device="cuda:0"), specs, strict=True):
        theirs = alone(spec, tmp_path / spec.trial_id, "cuda:0", outputs=True)
        assert ours.passes == "recorded"
        check_equal(ours, theirs, close=1e-4)
        assert ours.outputs is not None
        assert ours.outputs.answers == theirs.outputs.answers
        assert ours.outputs.general_loss == pytest.approx(theirs.outputs.general_loss, rel=1e-4)
