"""Other architectures than Llama train, score, answer, save, merge and export; what cannot is said before."""

from __future__ import annotations

import pytest
import tiny
import tiny_architectures
import torch

from ray_peft.checks.trials import inspect_trials
from ray_peft.console import Console
from ray_peft.errors import ModelError, SpecError
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import targets
from ray_peft.tasks.llm_sft.task import LlmSft

LORA = {"name": "lora", "rank": 4, "lr": 0.01}
QLORA = LORA | {"name": "qlora", "compute_dtype": "float32"}
GALORE = {"name": "galore", "rank": 8, "lr": 0.005, "weights": "float32"}
UNTIED_EMBEDDING = LORA | {"targets": ["q_proj", "embed_tokens"]}


@pytest.fixture(scope="module")
def built(shared):
    """The folder of an architecture's tiny model."""

    def folder(architecture):
        place = shared / f"architecture-{architecture}"
        return place if place.is_dir() else tiny_architectures.build(architecture, place)

    return folder


def spec_of(folder, questions, method, **changes):
    changes = {"train__save_dtype": "float32", "train__steps": 6, **changes}
    return TrialSpec.from_plain(tiny.plain_spec(folder, questions, method, **changes))


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("gpt2", LORA),
        ("gpt2", QLORA),
        ("gpt2", GALORE),
        ("gpt_neox", LORA),
        ("opt", QLORA),
        ("mixtral", LORA),
        ("mixtral", QLORA),
        ("mixtral", GALORE),
        ("qwen3_moe", LORA),
        ("qwen2_moe", QLORA),
        ("olmoe", LORA),
        ("phi3", QLORA),
        ("llama", UNTIED_EMBEDDING),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_it_trains_answers_and_is_the_same_model_saved_merged_and_exported(
    built, questions, tmp_path, architecture, method
):
    spec = spec_of(built(architecture), questions, method)
    bench = LlmSft().load(spec, "cpu")
    router = getattr(bench.model.config, "output_router_logits", None)
    untrained = bench.eval_loss()
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    bench.attach(stage)
    bench.train(stage, steps, 0, tmp_path / "stage", lambda *_: None)
    trained = bench.eval_loss()
    assert trained < untrained - 0.03
    assert getattr(bench.model.config, "output_router_logits", None) == router
    scored = bench.evaluate()
    assert scored.scores.eval_loss == pytest.approx(trained, abs=1e-5)
    assert len(scored.answers) == 4

    bench.save(tmp_path / "saved")
    again = LlmSft().load_trained(spec, tmp_path / "saved", "cpu")
    assert again.eval_loss() == pytest.approx(trained, abs=1e-5)

    again.merge(stage)
    assert again.eval_loss() == pytest.approx(trained, abs=1e-5)
    again.export(tmp_path / "merged", "float32")
    assert LlmSft().load_trained(spec, tmp_path / "merged", "cpu").eval_loss() == pytest.approx(trained, abs=1e-5)


def test_a_model_that_asks_for_router_logits_answers_all_the_same(questions, tmp_path):
    folder = tiny_architectures.build("mixtral", tmp_path / "model", output_router_logits=True)
    bench = LlmSft().load(spec_of(folder, questions, {"name": "none"}), "cpu")
    assert len(bench.evaluate().answers) == 4
    assert bench.model.config.output_router_logits


@pytest.mark.parametrize(
    ("architecture", "method", "error", "words"),
    [
        ("gpt2", LORA | {"targets": ["q_proj"]}, ModelError, "^method.targets: q_proj is no layer of .*gpt2; .*c_fc$"),
        (
            "gpt2",
            {"name": "qlora_galore", "qlora": {"targets": ["wte"]}},
            ModelError,
            r"^method.qlora.targets: transformer.wte of .* shares its weight with lm_head",
        ),
        (
            "llama",
            {"name": "qlora_galore", "galore": {"targets": ["attn", "zzz"]}},
            SpecError,
            "^method.galore.targets: no linear layer's name contains any of zzz",
        ),
        (
            "llama",
            {"name": "ensemble", "members": [{"method": LORA}, {"method": LORA | {"targets": ["vv_proj"]}}]},
            ModelError,
            "^method.members.1.method.targets: vv_proj is no layer",
        ),
        (
            "falcon",
            QLORA,
            SpecError,
            "^method qlora: nothing of .* would be in 4 bits: .* are FalconLinear; use method lora",
        ),
    ],
    ids=["names", "hybrid adapter", "hybrid galore", "member", "nothing in 4 bits"],
)
def test_the_plan_refuses_it_before_weights_are_loaded(built, questions, architecture, method, error, words):
    validation = {"data__sources": [
        {"recipe": "prompt_completion", "path": str(questions), "train": 20, "test": 8, "validation": 4}
    ]}  # fmt: skip
    wrong = spec_of(built(architecture), questions, method, **validation)
    right = spec_of(built(architecture), questions, {"name": "none"}, **validation)
    with pytest.raises(error, match=words) as caught:
        inspect_trials([right, wrong], Console(quiet=True))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mixtral"])
def test_what_is_counted_in_4_bits_is_what_transformers_stores_so(built, questions, architecture):
    spec = spec_of(built(architecture), questions, QLORA)
    bench = LlmSft().load(spec, "cpu")
    stored = {
        name for name, module in bench.model.named_modules() if hasattr(getattr(module, "weight", 0), "quant_state")
    }
    shapes = targets.on_meta(spec.model)
    assert stored == set(targets.quantised_layers(shapes))
    counted = sum(shapes.get_submodule(name).weight.numel() for name in stored)
    assert bench.four_bit_share() == pytest.approx(counted / sum(p.numel() for p in shapes.parameters()))
    assert set(bench.storage()) == {"nf4", "float32"}


def test_a_mixture_in_4_bits_says_that_its_experts_are_not(built, questions):
    spec = spec_of(built("mixtral"), questions, QLORA)
    said = targets.check(spec)[-1]
    assert said.startswith("qlora: 10% of the weights of ")
    assert "are in 4 bits; the others stay in float32: experts.gate_up_proj (" in said
    bench = LlmSft().load(spec, "cpu")
    text = spec.method.arithmetic("float32", bench.four_bit_share())
    assert text == "frozen base, 10% of its weights in nf4 computed in float32, the others in float32, float32 adapters"


def test_notes_of_the_method_are_told_once_and_kept(built, questions, capsys):
    trials = [spec_of(built("gpt2"), questions, GALORE | {"lr": lr}) for lr in (0.001, 0.002)]
    notes = inspect_trials(trials, Console()).notes
    (said,) = [note for note in notes if note.startswith("method: ")]
    assert said in capsys.readouterr().out
    assert "of the trained weights of" in said


def test_the_shapes_are_left_as_they_are(built, questions):
    shapes = targets.on_meta(spec_of(built("llama"), questions, LORA).model)
    for method in (LORA, QLORA, GALORE, LORA | {"targets": "all-linear"}):
        targets.check(spec_of(built("llama"), questions, method))
    assert shapes is targets.on_meta(spec_of(built("llama"), questions, LORA).model)
    assert all(parameter.device == torch.device("meta") for parameter in shapes.parameters())
    assert not hasattr(shapes, "peft_config")
