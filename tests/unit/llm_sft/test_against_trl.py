"""Our loop computes what TRL's SFTTrainer computes: the same losses, gradient norms, rates and weights."""

import pytest
import torch
from text_training import plain_spec, trained, trained_by_two

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"name": "lora", "rank": 4, "lr": 0.01}
QLORA = {"name": "qlora", "rank": 4, "lr": 0.01, "compute_dtype": "float32"}
GALORE = {"name": "galore", "rank": 4, "lr": 0.01, "update_proj_gap": 7, "weights": "float32"}
FULL = {"name": "full", "lr": 0.003, "weights": "float32"}
HYBRID = {"name": "qlora_galore", "switch_at": 0.5, "qlora": QLORA, "galore": GALORE | {"lr": 0.001}}


CASES = {
    "lora": (LORA, {}),
    "lora, all tokens": (LORA, {"train__loss": "all"}),
    "lora, linear with warm-up": (LORA, {"train__schedule": "linear", "train__warmup_steps": 5}),
    "lora, warm-up as a share": (LORA, {"train__warmup_ratio": 0.1}),
    "lora, constant": (LORA, {"train__schedule": "constant"}),
    "lora, constant with warm-up": (LORA, {"train__schedule": "constant", "train__warmup_steps": 3}),
    "lora, whole steps": (LORA, {"train__micro_batch_size": 8}),
    "lora, logged every 7": (LORA, {"train__log_every": 7}),
    "lora, checkpointing": (LORA, {"train__gradient_checkpointing": True}),
    "lora, not clipped": (LORA | {"max_grad_norm": None}, {}),
    "qlora": (QLORA, {}),
    "galore": (GALORE, {}),
    "layerwise galore": (GALORE | {"layerwise": True, "max_grad_norm": None}, {"train__micro_batch_size": 8}),
    "full": (FULL, {}),
    "hybrid": (HYBRID, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_value_is_that_of_sfttrainer(case, tiny_model, uneven, tmp_path):
    method, changes = CASES[case]
    ours, theirs = (
        trained(plain_spec(engine, tiny_model, uneven, method, **changes), tmp_path / engine)
        for engine in ("own", "trl")
    )
    assert_equal(ours, theirs)


@pytest.mark.timeout(600)
def test_two_workers_compute_what_sfttrainer_computes_alone(tiny_model, uneven, tmp_path):
    # Workers add gradients in another order; a rate of 0.01 makes 1e-3 of that rounding within 20 steps.
    lora, qlora = LORA | {"lr": 0.002}, QLORA | {"lr": 0.002}
    methods = {"lora": lora, "qlora": qlora, "galore": GALORE, "full": FULL, "hybrid": HYBRID | {"qlora": qlora}}
    by_two = trained_by_two(
        {name: plain_spec("own", tiny_model, uneven, method) for name, method in methods.items()}, tmp_path
    )
    for name, method in methods.items():
        alone = trained(plain_spec("trl", tiny_model, uneven, method), tmp_path / name)
        assert_equal(by_two[name], alone, norms=1e-4)


def assert_equal(ours, theirs, norms=1e-5):
    """Losses and rates to 1e-5, gradient norms to `norms`, weights, and the tokens of every stage."""
    our_log, our_weights, our_tokens = ours
    their_log, their_weights, their_tokens = theirs
    assert [step for step, _ in our_log] == [step for step, _ in their_log]
    assert len(our_log) >= 5
    for (step, our_values), (_, their_values) in zip(our_log, their_log, strict=True):
        for name, tolerance in {"train_loss": 1e-5, "grad_norm": norms, "lr": 1e-5}.items():
            assert our_values[name] == pytest.approx(their_values[name], rel=tolerance, abs=1e-7), (step, name)
    for our_weight, their_weight in zip(our_weights, their_weights, strict=True):
        assert torch.allclose(our_weight, their_weight, rtol=1e-4, atol=1e-5)
    assert our_tokens == their_tokens
