"""DPO, ORPO and KTO compute what TRL's trainers compute: the same losses, gradient norms and weights."""

import judged
import pytest
import tiny
import torch

LORA = {"name": "lora", "rank": 4, "lr": 0.003}
QLORA = {"name": "qlora", "rank": 4, "lr": 0.003, "compute_dtype": "float32"}
FULL = {"name": "full", "lr": 0.001, "weights": "float32"}

CASES = {
    "dpo, lora": (LORA, {}),
    "dpo, qlora": (QLORA, {}),
    "dpo, full": (FULL, {}),
    "dpo, ipo": (LORA, {"train__preference": {"loss": "ipo", "beta": 0.2}}),
    "orpo": (LORA, {"train__objective": "orpo", "train__loss": "all", "train__micro_batch_size": 8}),
    "kto, weights": (
        LORA,
        {
            "train__objective": "kto",
            "train__micro_batch_size": 8,
            "train__preference": {"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.3},
        },
    ),
}


@pytest.fixture(scope="module")
def pairs(shared):
    return tiny.write_rows(shared / "pairs.jsonl", judged.PAIRS)


@pytest.fixture(scope="module")
def labelled(shared):
    return tiny.write_rows(shared / "labelled.jsonl", judged.LABELLED)


@pytest.mark.parametrize("case", CASES)
def test_every_value_is_that_of_trl(case, tiny_model, pairs, labelled, tmp_path):
    method, changes = CASES[case]
    plain = judged.plain_spec(tiny_model, labelled if case.startswith("kto") else pairs, method, **changes)
    ours, bench = judged.trained(plain, tmp_path / "ours")
    theirs, model = judged.trained_by_trl(plain, tmp_path / "theirs")
    assert len(ours) == len(theirs) == 8
    for our_values, their_values in zip(ours, theirs, strict=True):
        for name, their_name in {"train_loss": "loss", "grad_norm": "grad_norm", "lr": "learning_rate"}.items():
            expected = pytest.approx(their_values[their_name], rel=1e-5, abs=1e-6)
            assert our_values[name] == expected, (our_values["step"], name)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    own = {name: weight for name, weight in bench.model.named_parameters() if weight.requires_grad}
    for name, weight in own.items():
        assert torch.allclose(weight, weights[name], rtol=1e-4, atol=1e-5), name
