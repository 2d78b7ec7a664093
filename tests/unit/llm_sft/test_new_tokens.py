"""`model.new_tokens`: tokenizer and embeddings grow, and the new rows are trained, saved, merged and loaded again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_architectures
from pydantic import ValidationError

from ray_peft.errors import ModelError
from ray_peft.spec import LlmTrialSpec, TrialSpec
from ray_peft.tasks.llm_sft.task import LlmSft

TOKENS = ["<tool>", "<end of tool>"]
NEW = [259, 260]
"""Their numbers: the tiny tokenizer has 259 tokens."""
NF4 = {"quant_type": "nf4", "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def rows(shared: Path) -> Path:
    called = [
        {"prompt": row["prompt"], "completion": f"<tool>{row['completion']}<end of tool>"} for row in tiny.QUESTIONS
    ]
    return tiny.write_rows(shared / "tools.jsonl", called)


@pytest.fixture(scope="module")
def full_vocabulary(shared: Path) -> Path:
    """A model without tied embeddings, which has as many rows as its tokenizer has tokens."""
    return tiny_architectures.build("llama", shared / "full-vocabulary", vocab_size=259, tie_word_embeddings=False)


def spec_of(model: Path, rows: Path, method: dict[str, Any], **changes: Any) -> LlmTrialSpec:
    plain = tiny.plain_spec(
        model,
        rows,
        method,
        **{"model__new_tokens": TOKENS, "train__steps": 6, "train__save_dtype": "float32", **changes},
    )
    return LlmTrialSpec.from_plain(plain)


def logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0]


KINDS = [
    ("lora", None, "tied"), ("lora", None, "untied"), ("lora", NF4, "tied"), ("qlora", None, "untied"),
    ("dora", None, "tied"), ("pissa", None, "untied"), ("lora_plus", None, "tied"), ("lora_fa", None, "tied"),
    ("adalora", None, "tied"), ("loftq", NF4, "tied"), ("full", None, "tied"), ("full", None, "untied"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "storage", "ties"), KINDS, ids=["-".join([k[0], "nf4" * bool(k[1]), k[2]]) for k in KINDS]
)
def test_new_tokens_are_trained_saved_loaded_and_merged(
    name: str, storage: Any, ties: str, tiny_model: Path, full_vocabulary: Path, rows: Path, tmp_path: Path
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model if ties == "tied" else full_vocabulary
    rank = {} if name == "full" else {"rank": 4, "target_rank": 2} if name == "adalora" else {"rank": 4}
    weights = {"weights": "float32", "lr": 0.001} if name == "full" else {"lr": 0.01}
    spec = spec_of(folder, rows, {"name": name, **rank, **weights}, model__quantization=storage)
    ((stage, steps),) = spec.method.stages(6)
    bench: Any = LlmSft().load(spec, "cpu")

    # Both texts are one token each in rows, and old tokens have the scores that they had.
    assert bench.tokenizer.convert_tokens_to_ids(TOKENS) == NEW
    assert all(set(NEW) <= set(ids) for ids in bench.data.train["input_ids"])
    old = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embedding = bench.model.get_input_embeddings().weight
    assert len(embedding) == (272 if ties == "tied" else 261)
    torch.testing.assert_close(embedding[NEW], old.get_input_embeddings().weight[:259].mean(0).expand(2, -1))
    if not storage and name != "qlora":
        ids = list(range(60, 100))
        torch.testing.assert_close(logits(bench.model, ids)[:, :259], logits(old, ids)[:, :259])

    # Their rows are trained, beside an adapter nothing else of the embeddings.
    before = bench.eval_loss()
    start = {name: value.detach().clone() for name, value in bench.model.named_parameters()}
    bench.attach(stage)
    deltas = [key for key, value in bench.model.named_parameters() if value.requires_grad and "tokens_delta" in key]
    assert len(deltas) == (0 if name == "full" else 1 if ties == "tied" else 2)
    trained = [value for value in bench.model.parameters() if value.requires_grad]
    from ray_peft.tasks.llm_sft.targets import on_meta

    lines = stage.check(on_meta(spec.model), of="tiny", key="method")
    if "parameters are trained" in " ".join(lines):
        assert f"{sum(value.numel() for value in trained):,} parameters are trained" in " ".join(lines)
    bench.train(stage, steps, 0, tmp_path / "stage1", lambda *_: None)
    after = bench.eval_loss()
    assert after < before - 0.05
    for key, value in bench.model.named_parameters():
        if value.requires_grad and ("tokens_delta" in key or name == "full" and "embed" in key):
            assert not torch.equal(value[-2:], start.get(key, embedding[NEW])[-2:])
        if "embed_tokens" in key and not value.requires_grad:
            assert torch.equal(value, start["model.embed_tokens.weight"])
    ids = [*range(70, 90), *NEW, *range(90, 95)]
    scores = logits(bench.model, ids)
    answers = bench.answer(bench.data.test.select(range(2)))
    assert len(answers) == 2

    # What is saved is loaded again, by us and by libraries that know nothing of us.
    bench.save(tmp_path / "saved", "float32")
    again: Any = LlmSft().load_trained(spec, tmp_path / "saved", "cpu")
    if name != "pissa":  # which is saved for the base as it was
        assert again.eval_loss() == pytest.approx(after, rel=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").convert_tokens_to_ids(TOKENS) == NEW
    if name != "full":
        with safe_open(tmp_path / "saved" / "adapter_model.safetensors", "pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
        rows_of = {key: shape for key, shape in stored.items() if "embed_tokens" in key or "lm_head" in key}
        assert set(rows_of.values()) == {(2, 64)}
        assert len(rows_of) == len(deltas)
        if not storage and name != "qlora":
            stranger = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
            torch.testing.assert_close(logits(stranger, ids)[:, :261], scores[:, :261], atol=1e-3, rtol=1e-3)

    # Merged, it is a plain model with longer embeddings.
    bench.merge(stage)
    bench.export(tmp_path / "merged", "float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(plain, ids)[:, :261], scores[:, :261], atol=2e-3, rtol=2e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("<tool>", add_special_tokens=False) == [259]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": {"name": "vera"}},
            "PEFT trains embeddings of new tokens beside LoRA.*not beside those of method vera",
        ),
        ({"method": {"name": "prompt_tuning"}}, "not beside those of method prompt_tuning; use one of them"),
        ({"train__engine": "trl"}, "model.new_tokens are trained by train.engine: own alone"),
        ({"model__new_tokens": ["<a>", "<b>", "<a>"]}, "'<a>' is there twice"),
        ({"model__new_tokens": ["<a> "]}, "'<a> ' is empty, or begins or ends with a space"),
        ({"model__new_tokens": [""]}, "'' is empty, or begins or ends with a space"),
    ],
)
def test_what_cannot_train_new_tokens_says_so_before_anything_is_read(changes: Any, message: str) -> None:
    changes = dict(changes)
    method = changes.pop("method", {"name": "lora"})
    with pytest.raises(ValidationError, match=message):
        spec_of(Path("nowhere/at"), Path("all"), method, **changes)


def test_images_have_no_new_tokens() -> None:
    import tiny_diffusion

    plain = tiny_diffusion.plain_spec("m/m", "d/d")
    plain["model"]["new_tokens"] = ["<cat>"]
    with pytest.raises(ValidationError, match="model.new_tokens are for language models"):
        TrialSpec.from_plain(plain)


@pytest.mark.parametrize(
    ("method", "tokens", "message"),
    [
        ({"name": "lora", "targets": ["q_proj", "embed_tokens"]}, TOKENS, "method.targets: model.embed_tokens of .* "
         "cannot have an adapter while rows of it are trained for model.new_tokens"),
        ({"name": "lora"}, ["<tool>", "<|im_end|>"], "model.new_tokens: <|im_end|> is token 257 of the tokenizer"),
    ],
)  # fmt: skip
def test_a_token_or_a_layer_that_is_there_already_is_named(
    method: Any, tokens: list[str], message: str, full_vocabulary: Path, rows: Path
) -> None:
    spec = spec_of(full_vocabulary, rows, method, model__new_tokens=tokens)
    with pytest.raises(ModelError, match=re.escape(message) if ".*" not in message else message):
        LlmSft().inspect(spec)


def test_a_biased_output_layer_is_refused_beside_an_adapter(rows: Path, tmp_path: Path) -> None:
    folder = tiny_architectures.build("phi", tmp_path / "phi")
    with pytest.raises(ModelError, match="model.new_tokens: lm_head of .* has a bias, which PEFT leaves out"):
        LlmSft().inspect(spec_of(folder, rows, {"name": "lora"}))
    LlmSft().inspect(spec_of(folder, rows, {"name": "full"}))


def test_the_id_counts_new_tokens_and_is_what_it_was_without(tiny_model: Path, rows: Path) -> None:
    from ray_peft.checks.inspector import Inspector
    from ray_peft.spec.identity import settings

    method, ids = {"name": "lora"}, set()
    for tokens in ([], ["<tool>"], TOKENS):
        ids.add(Inspector().settled(spec_of(tiny_model, rows, method, model__new_tokens=tokens)).trial_id)
    assert len(ids) == 3
    assert "model" not in {
        k
        for k, v in settings(spec_of(tiny_model, rows, method, model__new_tokens=[])).items()
        if "new_tokens" in str(v)
    }


def test_the_plan_predicts_their_memory_and_names_tokens_that_no_row_holds(full_vocabulary: Path, rows: Path) -> None:
    from ray_peft.vram.cards import ANY

    method = {"name": "lora", "rank": 4}
    plain, grown = (
        spec_of(full_vocabulary, rows, method, model__new_tokens=tokens) for tokens in ([], [*TOKENS, "<x>"])
    )
    assert any("model.new_tokens: <x> is in no training row" in note for note in LlmSft().inspect(grown).notes)
    predicted: list[Any] = [LlmSft().predict(spec, ANY) for spec in (plain, grown)]
    # Three rows of 64 numbers in float32, of two layers; PEFT keeps a copy of what they were. Rounded up to 512 bytes.
    rows_of_both = 2 * 3 * 64 * 4
    for kind, copies in (("adapters", 1), ("weights", 2)):
        more = predicted[1].components[kind] - predicted[0].components[kind]
        assert more == pytest.approx(copies * rows_of_both, abs=copies * 512)
    assert predicted[1].peak_allocated > predicted[0].peak_allocated


def test_trials_with_new_tokens_train_alone(tiny_model: Path, rows: Path) -> None:
    from ray_peft.tasks.llm_sft.packable import why_alone

    assert "model.new_tokens are trained by one trial" in str(why_alone(spec_of(tiny_model, rows, {"name": "lora"})))


@pytest.mark.parametrize(("tokens", "modules"), [(TOKENS, []), ([], ["norm"])], ids=["new rows", "whole modules"])
def test_what_is_trained_beside_an_adapter_is_in_its_export(
    tokens: list[str], modules: list[str], full_vocabulary: Path, rows: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    method = {"name": "lora", "rank": 4, "modules_to_save": modules}
    spec = spec_of(full_vocabulary, rows, method, model__new_tokens=tokens)
    ((stage, _),) = spec.method.stages(6)
    bench: Any = LlmSft().load(spec, "cpu")
    bench.attach(stage)
    bench.save(tmp_path / "trained", "float32")
    LlmSft().load_trained(spec, tmp_path / "trained", "cpu").save(tmp_path / "exported", "bfloat16")
    shapes = [
        {key: tuple(value.shape) for key, value in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        for name in ("trained", "exported")
    ]
    assert shapes[0] == shapes[1]
    assert any("lora_A" not in key and "lora_B" not in key for key in shapes[0])
