"""Trials with dropout have the same losses whatever decides their passes: micro-batch, memory, checkpoints, resumes."""

import pytest
import tiny
import tiny_architectures
import torch

from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.task import LlmSft

LORA = {"name": "lora", "rank": 4, "lr": 0.01, "dropout": 0.3}
FULL = {"name": "full", "lr": 0.002, "weights": "float32"}


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """The tiny Llama, whose adapters drop, and a GPT-2 that drops itself."""
    gpt2 = tiny_architectures.build("gpt2", tmp_path_factory.mktemp("gpt2") / "model")
    return {"lora": (tiny_model, LORA), "gpt2": (gpt2, FULL)}


@pytest.fixture(scope="module")
def train(models, questions, tmp_path_factory):
    """Trains a trial for a few steps; returns its losses, and the steps that it did."""

    def run(name, folder=None, *, most_rows=None, dies_after=None, **changes):
        model, method = models[name]
        settings = {"train__steps": 5, "train__micro_batch_size": 4} | changes
        spec = TrialSpec.from_plain(tiny.plain_spec(model, questions, method, **settings))
        bench, losses = LlmSft().load(spec, "cpu"), []
        ((stage, steps),) = spec.method.stages(bench.total_steps())
        bench.attach(stage)

        def report(metrics, step):
            losses.extend([metrics["train_loss"]] if "train_loss" in metrics else [])
            if step == dies_after:
                raise KeyboardInterrupt

        def check(module, args, kwargs):
            if most_rows is not None and len(kwargs["input_ids"]) > most_rows:
                raise torch.OutOfMemoryError("no room")

        bench.model.register_forward_pre_hook(check, with_kwargs=True)
        outcome = bench.train(stage, steps, 0, folder or tmp_path_factory.mktemp("run"), report)
        assert "drawn by the pass" not in outcome.passes
        return losses, outcome, bench.lowered

    return run


@pytest.fixture(scope="module")
def undisturbed(train):
    return {name: train(name)[0] for name in ("lora", "gpt2")}


@pytest.mark.parametrize("name", ["lora", "gpt2"])
def test_no_loss_depends_on_the_passes(train, undisturbed, tmp_path, name):
    wanted = undisturbed[name]
    for micro in (1, 8):
        assert train(name, train__micro_batch_size=micro)[0] == pytest.approx(wanted, rel=1e-5)
    for evaluated in (None, 2):
        checkpointed = train(name, train__gradient_checkpointing=True, train__eval_every=evaluated)[0]
        assert checkpointed == pytest.approx(wanted, rel=1e-5)
    halved, _, lowered = train(name, most_rows=2)
    assert lowered == {"train.micro_batch_size": 2}
    assert halved == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(KeyboardInterrupt):
        train(name, tmp_path, dies_after=4, train__checkpoint_every=2)
    rest, outcome, _ = train(name, tmp_path, train__checkpoint_every=2)
    assert outcome.resumed_from_step == 2
    assert rest == pytest.approx(wanted[2:], rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "gpt2"])
def test_the_seed_decides_what_is_dropped(train, undisturbed, name):
    assert train(name)[0] == undisturbed[name]
    assert train(name, seed=2)[0] != pytest.approx(undisturbed[name], rel=1e-4)


def test_a_model_whose_dropout_cannot_belong_to_rows_is_trained_and_says_so(models, questions, tmp_path):
    model, method = models["gpt2"]
    spec = TrialSpec.from_plain(tiny.plain_spec(model, questions, method, train__gradient_checkpointing=True))
    bench = LlmSft().load(spec, "cpu")
    bench.attach(spec.method)
    bench.model.config.layerdrop = 0.1
    outcome = bench.train(spec.method, 2, 0, tmp_path, lambda metrics, step: None)
    assert outcome.steps == 2
    assert outcome.passes.endswith(
        "; dropout is drawn by the pass: it leaves out whole layers at random (layerdrop 0.1)"
    )
