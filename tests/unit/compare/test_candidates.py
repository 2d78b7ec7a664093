"""The methods of a comparison, with what the machine asks of them."""

import pytest

from ray_peft.compare.candidates import COMPARED, candidates
from ray_peft.spec import TrialSpec


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_method_is_a_valid_trial_at_several_rates_in_float32_on_a_cpu(name, on_gpu):
    (candidate,) = candidates([name], on_gpu=on_gpu, hidden_size=64)
    rates = []
    for factor in (1.0, 4.0):
        precision = {"precision": "bf16" if on_gpu else "fp32"}
        trial = TrialSpec.from_plain(
            {
                "model": {"name": "some/model", "dtype": "bfloat16" if on_gpu else "float32"},
                "data": {"sources": [{"recipe": "dolly", "path": "d.jsonl", "train": 64, "test": 8}]},
                "method": candidate.at(factor),
                "train": {"steps": 8, "batch_size": 8, "micro_batch_size": 8, **precision},
                "resources": {"gpus_per_worker": 1 if on_gpu else 0},
            }
        )
        rates.append([stage.lr for _, stage in trial.method.parts()])
        for _, stage in trial.method.parts():
            plain = stage.plain()
            assert on_gpu or plain.get("weights", "float32") == "float32"
            assert on_gpu or plain.get("compute_dtype", "float32") == "float32"
            if plain.get("name") in ("galore", "fira", "apollo"):
                assert plain["rank"] == 16  # a quarter of the model's width
    assert rates[1] == pytest.approx([4 * rate for rate in rates[0]], rel=0.05)
