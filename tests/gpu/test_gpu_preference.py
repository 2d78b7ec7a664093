"""On a GPU, recorded passes of pairs and labelled rows have the losses and weights of passes as they are."""

from __future__ import annotations

import judged
import pytest
import tiny

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recorded_passes_have_the_losses_of_plain_ones(objective, dropout, tiny_model, shared, tmp_path, exact):
    import torch

    pairs = tiny.write_rows(shared / "pairs.jsonl", judged.PAIRS)
    method = {"name": "lora", "rank": 4, "lr": 0.003, "dropout": dropout}
    ways = {}
    for recorded in (True, False):
        plain = judged.plain_spec(
            tiny_model, pairs, method, train__objective=objective, train__cuda_graphs=recorded,
            resources__gpus_per_worker=1,
        )  # fmt: skip
        folder = tmp_path / str(recorded)
        ways[recorded] = judged.trained(plain, folder, "cuda:0")
    (log, bench), (plain_log, plain_bench) = ways[True], ways[False]
    assert len(log) == 8
    for values, plain_values in zip(log, plain_log, strict=True):
        for name in ("train_loss", "grad_norm"):
            assert values[name] == pytest.approx(plain_values[name], rel=1e-4, abs=1e-6), (values["step"], name)
    weights = [[weight for weight in each.model.parameters() if weight.requires_grad] for each in (bench, plain_bench)]
    for weight, plain_weight in zip(*weights, strict=True):
        assert torch.allclose(weight, plain_weight, rtol=1e-3, atol=1e-4)
    assert bench.evaluate().scores.reward_margin == pytest.approx(plain_bench.evaluate().scores.reward_margin, rel=1e-3)
    assert log[-1]["passes"] == "recorded"
    assert plain_log[-1]["passes"] == "as they are, since train.cuda_graphs is false"
