"""Our loop computes what TRL's SFTTrainer computes: the same losses, gradient norms, rates and weights."""

import pytest
import tiny
import torch

from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.task import LlmSft

LORA = {"name": "lora", "rank": 4, "lr": 0.01}
QLORA = {"name": "qlora", "rank": 4, "lr": 0.01, "compute_dtype": "float32"}
GALORE = {"name": "galore", "rank": 4, "lr": 0.01, "update_proj_gap": 7, "weights": "float32"}
FULL = {"name": "full", "lr": 0.003, "weights": "float32"}
HYBRID = {"name": "qlora_galore", "switch_at": 0.5, "qlora": QLORA, "galore": GALORE | {"lr": 0.001}}
STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Rows of many lengths, in an odd number."""
    rows = [
        {"prompt": f"Say {index}." + " Please." * (index % 5), "completion": "word " * (index % 4 + 1) + str(index)}
        for index in range(60)
    ]
    return tiny.write_rows(tmp_path_factory.mktemp("uneven") / "rows.jsonl", rows)


def trained(engine, model, rows, folder, method, **changes):
    """Every logged value, the weights at the end, and what the stages took."""
    sizes = {"train__steps": STEPS, "train__batch_size": 8, "train__micro_batch_size": 2, "train__engine": engine}
    plain = tiny.plain_spec(model, rows, method, **sizes | changes)
    plain["data"]["sources"][0]["train"] = 37  # five steps an epoch, the last of five rows
    spec = TrialSpec.from_plain(plain)
    bench = LlmSft().load(spec, "cpu")
    log, outcomes, done = [], [], 0
    stages = spec.method.stages(bench.total_steps())
    for index, (stage, steps) in enumerate(stages):
        bench.attach(stage)
        outcomes.append(
            bench.train(stage, steps, done, folder / str(index), lambda metrics, step: log.append((step, metrics)))
        )
        done += steps
        if index < len(stages) - 1:
            bench.merge(stage)
    return log, [p.detach().clone() for p in bench.model.parameters() if p.requires_grad], outcomes


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
    ours, our_weights, our_outcomes = trained("own", tiny_model, uneven, tmp_path / "own", method, **changes)
    theirs, their_weights, their_outcomes = trained("trl", tiny_model, uneven, tmp_path / "trl", method, **changes)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert len(ours) >= 5
    for (step, one), (_, other) in zip(ours, theirs, strict=True):
        for name in ("train_loss", "grad_norm", "lr"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), (step, name)
    for one, other in zip(our_weights, their_weights, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert [outcome.tokens for outcome in our_outcomes] == [outcome.tokens for outcome in their_outcomes]
