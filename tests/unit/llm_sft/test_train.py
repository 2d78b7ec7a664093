"""What is compared is comparable: micro-batches change nothing, resuming changes nothing, seeds repeat."""

import json

import pytest
import tiny

from ray_peft.errors import TrialFailed
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.task import LlmSft

METHODS = [  # in float32, so that equal means equal
    {"name": "full", "lr": 0.003, "weights": "float32"},
    {"name": "lora", "rank": 4, "lr": 0.01},
    {"name": "qlora", "rank": 4, "lr": 0.01, "compute_dtype": "float32"},
    {"name": "galore", "rank": 4, "lr": 0.01, "update_proj_gap": 3, "weights": "float32"},
]


class Killed(Exception):
    """Stands for a trial that ends in mid-training."""


def trained(tiny_model, questions, folder, method=None, killed_at=None, **changes):
    """Training losses of a trial, its bench, its outcome and its log."""
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, method, **changes))
    bench = LlmSft().load(spec, "cpu")
    log = []

    def report(metrics, step):
        log.append({"step": step, **metrics})
        if step == killed_at:
            raise Killed

    (stage, steps), *_ = spec.method.stages(bench.total_steps())
    bench.attach(stage)
    outcome = bench.train(stage, steps, 0, folder, report)
    return [line["train_loss"] for line in log if "train_loss" in line], bench, outcome, log


def test_the_loss_falls_and_real_tokens_are_counted(tiny_model, questions, tmp_path):
    losses, bench, outcome, _ = trained(tiny_model, questions, tmp_path, train__steps=15)
    assert losses[-1] < losses[0] - 0.5
    rows = bench.data.train
    epoch = sum(len(ids) for ids in rows["input_ids"])
    assert outcome.steps == 15
    assert outcome.tokens == pytest.approx(epoch * 3, rel=0.01)  # 15 steps of 8 rows are three passes over 40 rows


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["name"])
def test_micro_batches_do_not_change_what_is_computed(tiny_model, questions, tmp_path, method):
    whole, *_ = trained(tiny_model, questions, tmp_path / "a", method, train__micro_batch_size=8)
    parts, *_ = trained(tiny_model, questions, tmp_path / "b", method, train__micro_batch_size=1)
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("method", [*METHODS, {"name": "full", "lr": 0.003}], ids=lambda m: str(list(m.values())))
def test_a_resumed_trial_goes_on_as_if_nothing_had_happened(tiny_model, questions, tmp_path, method):
    changes = {"train__steps": 8, "train__checkpoint_every": 4}
    whole, *_ = trained(tiny_model, questions, tmp_path / "a", method, **changes)
    with pytest.raises(Killed):
        trained(tiny_model, questions, tmp_path / "b", method, killed_at=6, **changes)
    rest, _, outcome, _ = trained(tiny_model, questions, tmp_path / "b", method, **changes)
    assert outcome.resumed_from_step == 4
    assert outcome.steps == 8
    assert rest == pytest.approx(whole[4:], rel=1e-4)


def test_the_seed_decides_adapters_and_order_and_repeats(tiny_model, questions, tmp_path):
    first, *_ = trained(tiny_model, questions, tmp_path / "a")
    again, *_ = trained(tiny_model, questions, tmp_path / "b")
    other, *_ = trained(tiny_model, questions, tmp_path / "c", seed=2)
    assert again == first
    assert other != first


def test_every_method_sees_the_same_rows_in_the_same_order(tiny_model, questions, tmp_path):
    firsts = {
        method["name"]: trained(tiny_model, questions, tmp_path / method["name"], method, train__steps=1)[0][0]
        for method in METHODS
        if method["name"] != "qlora"  # its base is another one
    }
    assert max(firsts.values()) == pytest.approx(min(firsts.values()), rel=1e-6)


@pytest.mark.parametrize(("steps", "rows_there"), [(10, 40), (14, 33)])
def test_a_hybrid_s_stages_go_through_the_rows_as_one_stage_does(tiny_model, questions, tmp_path, steps, rows_there):
    stages = {"qlora": METHODS[2], "galore": METHODS[3]}
    seen = {}
    for method in (METHODS[0], {"name": "qlora_galore", "switch_at": 0.5, **stages}):
        train = {"train__steps": steps, "train__batch_size": 10, "train__micro_batch_size": 5}
        plain = tiny.plain_spec(tiny_model, questions, method, **train)
        plain["data"]["sources"][0]["train"] = rows_there
        spec = TrialSpec.from_plain(plain)
        bench, rows, done = LlmSft().load(spec, "cpu"), [], 0
        bench.model.register_forward_pre_hook(
            lambda module, args, kwargs, rows=rows: rows.extend(kwargs["input_ids"].tolist()), with_kwargs=True
        )
        for index, (stage, count) in enumerate(spec.method.stages(bench.total_steps())):
            bench.attach(stage)
            done += bench.train(
                stage, count, done, tmp_path / f"{spec.trial_id}{index}", lambda metrics, step: None
            ).steps
            if index == 0 and method["name"] == "qlora_galore":
                bench.merge(stage)
        real = [[token for token in row if token != 258] for row in rows]
        seen[method["name"]] = [row for row in real if row]  # without the rows that fill an epoch's last batch
    partial = steps // -(-rows_there // 10)  # epochs that end in a batch of fewer rows
    assert len(seen["full"]) == 10 * steps - partial * (-rows_there % 10)
    assert seen["qlora_galore"] == seen["full"]


def test_loss_on_all_tokens_trains_more_tokens(tiny_model, questions, tmp_path):
    answers, *_ = trained(tiny_model, questions, tmp_path / "a", train__steps=1)
    every, *_ = trained(tiny_model, questions, tmp_path / "b", train__steps=1, train__loss="all")
    assert every != answers


def test_a_diverging_loss_ends_the_trial_with_step_and_way_out(tiny_model, questions, tmp_path):
    with pytest.raises(TrialFailed, match="is nan at step .* lower method.lr"):
        trained(
            tiny_model, questions, tmp_path, {"name": "full", "lr": 1e30, "max_grad_norm": None}, train__steps=6,
            train__schedule="constant",
        )  # fmt: skip


@pytest.mark.parametrize("clip", [1.0, None])
def test_an_infinite_gradient_ends_the_trial_and_no_checkpoint_keeps_it(tiny_model, questions, tmp_path, clip):
    spec = TrialSpec.from_plain(
        tiny.plain_spec(
            tiny_model, questions, {"name": "lora", "rank": 4, "max_grad_norm": clip}, train__steps=6,
            train__checkpoint_every=1, train__micro_batch_size=8, train__log_every=6,
        )
    )  # fmt: skip
    bench = LlmSft().load(spec, "cpu")
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    bench.attach(stage)
    passes = iter(range(1, 100))
    weight = next(parameter for parameter in bench.model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda gradient: gradient * (float("inf") if next(passes) == 3 else 1.0))
    with pytest.raises(TrialFailed, match=r"gradient's norm is (inf|nan) at step 3 \(lora, .*precision fp32\)"):
        bench.train(stage, steps, 0, tmp_path, lambda metrics, step: None)
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_an_infinite_gradient_of_layerwise_galore_ends_the_trial_too(tiny_model, questions, tmp_path):
    method = {"name": "galore", "rank": 4, "layerwise": True, "max_grad_norm": None}
    plain = tiny.plain_spec(
        tiny_model, questions, method, train__steps=3, train__micro_batch_size=8, train__log_every=9
    )
    bench = LlmSft().load(TrialSpec.from_plain(plain), "cpu")
    ((stage, steps),) = bench.spec.method.stages(3)
    bench.attach(stage)
    passes = iter(range(1, 100))
    bench.model.model.norm.weight.register_hook(lambda g: g * (float("inf") if next(passes) == 3 else 1.0))
    with pytest.raises(TrialFailed, match="gradient's norm is nan at step 3"):
        bench.train(stage, steps, 0, tmp_path, lambda metrics, step: None)


def test_evaluations_in_between_are_reported_and_not_timed(tiny_model, questions, tmp_path):
    _, _, outcome, log = trained(tiny_model, questions, tmp_path, train__eval_every=2)
    assert [line["step"] for line in log if "eval_loss" in line] == [2]
    assert len(outcome.eval_losses) == 1


def test_gradient_checkpointing_changes_no_loss(tiny_model, questions, tmp_path):
    plain, *_ = trained(tiny_model, questions, tmp_path / "a")
    recomputed, *_ = trained(tiny_model, questions, tmp_path / "b", train__gradient_checkpointing=True)
    assert recomputed == pytest.approx(plain, rel=1e-5)


def test_saved_adapters_have_the_dtype_asked_for_and_load_again(tiny_model, questions, tmp_path):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    _, bench, *_ = trained(tiny_model, questions, tmp_path / "run", train__save_dtype="float32")
    bench.save(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    ids = torch.arange(10)[None]
    bench.model.eval()
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, bench.model(ids).logits, atol=1e-5)


def test_saved_weights_are_written_once_in_the_dtype_asked_for(tiny_model, questions, tmp_path):
    from safetensors.torch import load_file

    _, bench, *_ = trained(tiny_model, questions, tmp_path / "run", {"name": "full"})
    bench.save(tmp_path / "weights")
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    assert "lm_head.weight" not in tensors  # tied to the embedding
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "weights" / "tokenizer.json").is_file()


def test_epochs_count_their_last_partial_step(tiny_model, questions):
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, train__steps=None, train__epochs=2.0))
    assert LlmSft().total_steps(spec, 41) == 12
