"""A row drops the same wherever it lies: rows apart, in lanes, in parts, in a checkpointed layer, after a resume."""

import copy
import functools

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from ray_peft.engine.contract import Share
from ray_peft.engine.keyed_dropout import keyed_dropout
from ray_peft.engine.row_dropout import RowDropout, may_drop, row_dropout
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.loss import TextLoss
from ray_peft.tasks.llm_sft.packed import PackedLoss, PackedRows
from ray_peft.tasks.llm_sft.steps import TextRows

SIZES = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 258,
}  # fmt: skip
GPT2 = {
    "vocab_size": 272, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3,
    "resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3,
}  # fmt: skip
MODELS = {
    "llama": ("llama", SIZES),
    "llama-attention": ("llama", SIZES | {"attention_dropout": 0.3}),
    "qwen3-window": ("qwen3", SIZES | {"head_dim": 16, "attention_dropout": 0.2, "sliding_window": 16}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-eager": ("gpt2", GPT2 | {"attn_implementation": "eager"}),
    "opt": (
        "opt",
        SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.2, "attention_dropout": 0.3, "init_std": 0.3},
    ),
    "gpt_neox": ("gpt_neox", SIZES | {"attention_dropout": 0.2, "hidden_dropout": 0.3}),
}
NONE, LORA = {"name": "none"}, {"name": "lora", "rank": 4, "dropout": 0.3, "targets": ["all-linear"]}


@pytest.fixture(scope="module")
def rows(half_scored):
    return half_scored


def spec(method=NONE, **changes):
    sizes = {"train__batch_size": 8, "train__micro_batch_size": 4}
    return TrialSpec.from_plain(tiny.plain_spec("m", "rows.jsonl", method, **sizes | changes))


@functools.cache
def base(name):
    kind, config = MODELS[name]
    config = dict(config)
    attention = {"attn_implementation": config.pop("attn_implementation", "sdpa")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), **attention).float()
    add_fused_lm_head(model)
    return model


def built(name, method=NONE):
    model = copy.deepcopy(base(name))
    add_fused_lm_head(model)
    if method is not NONE:
        torch.manual_seed(0)
        model = spec(method).method.attach(model)
        for parameter in model.parameters():
            if parameter.requires_grad:  # B begins at zero, which would hide what A sees
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def numbers(model, data, computation, micro, step=1, share=None):
    """The loss and the gradients of a worker's part of a step."""
    model.zero_grad()
    total = 0.0
    for part in data.parts(step, share or Share(), micro):
        loss = computation.loss(*computation.inputs(part))
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(found, wanted):
    (loss, gradients), (wanted_loss, wanted_gradients) = found, wanted
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert len(gradients) == len(wanted_gradients) > 0
    for one, other in zip(gradients, wanted_gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=2e-5 * float(other.abs().max()) + 1e-7)


CASES = [(name, NONE) for name in MODELS if name != "llama"] + [("llama", LORA), ("gpt2", LORA)]


@pytest.mark.parametrize(
    ("name", "method"), CASES, ids=lambda value: value["name"] if isinstance(value, dict) else value
)
def test_rows_drop_alike_in_lanes_in_parts_and_in_checkpointed_layers(name, method, rows):
    trial, model = spec(method), built(name, method)
    data, dropout = TextRows(trial, rows), RowDropout(model)
    apart, packed = TextLoss(trial, model, 258, dropout), PackedLoss(trial, model, dropout)
    with dropout.installed():
        wanted = numbers(model, data, apart, 4)
        assert dropout.calls > 0
        same(numbers(model, data, apart, 1), wanted)
        same(numbers(model, PackedRows(data), packed, 4), wanted)
        model.gradient_checkpointing_enable(
            {"use_reentrant": False, "preserve_rng_state": False, "context_fn": dropout.contexts}
        )
        if method is not NONE:
            model.enable_input_require_grads()
        same(numbers(model, data, apart, 2), wanted)
        same(numbers(model, PackedRows(data), packed, 8), wanted)
        another = numbers(model, data, apart, 4, step=1 + len(rows))
        shares = [numbers(model, data, apart, 4, share=Share(rank, 2)) for rank in range(2)]
    assert another[0] != pytest.approx(wanted[0], rel=1e-4)
    assert sum(loss for loss, _ in shares) == pytest.approx(wanted[0], rel=1e-5)
    assert may_drop(model)
    plain = numbers(model.eval(), data, TextLoss(trial, model, 258), 4)
    assert plain[0] != pytest.approx(wanted[0], rel=1e-4)


def test_what_a_product_takes_is_dropped_in_its_own_precision_with_the_same_bits(rows, monkeypatch):
    trial, model = spec(LORA, train__precision="bf16"), built("llama", LORA)
    data, dropout = TextRows(trial, rows), RowDropout(model)
    seen = []
    for narrow in (True, False):
        if not narrow:
            monkeypatch.setattr("ray_peft.engine.row_dropout._multiplies", lambda module: False)
        with dropout.installed():
            seen.append(numbers(model, data, TextLoss(trial, model, 258, dropout), 4))
    (loss, gradients), (wanted, wanted_gradients) = seen
    assert loss == wanted
    assert all(torch.equal(one, other) for one, other in zip(gradients, wanted_gradients, strict=True))


def test_outside_of_training_torch_is_as_it_was(rows):
    model = built("gpt2")
    functions = torch.nn.functional.dropout, torch.nn.functional.scaled_dot_product_attention
    dropout = RowDropout(model)
    data, trial = TextRows(spec(), rows), spec()
    with dropout.installed():
        usual = numbers(model.eval(), data, TextLoss(trial, model, 258, dropout), 4)
        of_others = torch.nn.Dropout(0.5)(torch.ones(1000))
    assert 300 < int((of_others == 0).sum()) < 700
    assert dropout.calls == 0
    assert functions == (torch.nn.functional.dropout, torch.nn.functional.scaled_dot_product_attention)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    same(numbers(model, data, TextLoss(trial, model, 258), 4), usual)


def test_a_model_that_calls_one_dropout_twice_drops_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(x), self.dropout(x)

    model = Twice().train()
    dropout, x = RowDropout(model), torch.ones(2, 3, 40)
    with dropout.installed():
        pairs = []
        for _ in range(2):
            dropout.begin(torch.arange(6).view(2, 3))
            pairs.append(model(x))
    (one, other), (again, _) = pairs
    assert not torch.equal(one, other)
    assert torch.equal(one, again)


def tried(model, name="llama"):
    data, trial = TextRows(spec(), tiny_rows()), spec()

    def loss(dropout):
        computation = TextLoss(trial, model, 258, dropout)
        return computation.loss(*computation.inputs(data.parts(0, Share(), 1)[0]))

    before = torch.get_rng_state()
    found = row_dropout(model, "cpu", loss)
    assert torch.equal(torch.get_rng_state(), before)
    return found


def tiny_rows():
    ids = list(range(3, 40))
    return Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8)


def test_what_drops_by_the_row():
    dropout, why = tried(built("llama", LORA))
    assert isinstance(dropout, RowDropout)
    assert why is None
    assert tried(built("llama")) == (None, None)  # nothing drops


def test_what_cannot_drop_by_the_row_says_why():
    class Noise(torch.nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    model = built("gpt2")
    model.transformer.h[0].mlp.act = Noise()
    assert tried(model) == (None, "something in it draws by the pass, such as a fused attention")

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x):
            return x + self.dropout(x.mean(1)[:, :5]).mean()

    model = built("gpt2")
    model.transformer.h[0].mlp.act = Pooled()
    assert tried(model) == (None, "a layer drops numbers of shape (1, 5), of which no row is known")
    model = built("opt")
    model.config.layerdrop = 0.1
    assert tried(model) == (None, "it leaves out whole layers at random (layerdrop 0.1)")


def test_a_prediction_leaves_to_torch_what_cannot_belong_to_rows():
    from ray_peft.engine.row_dropout import UnkeyedDropout

    model = torch.nn.Sequential(torch.nn.Dropout(0.5)).train()
    for predicts in (True, False):
        dropout = RowDropout(model, predicts=predicts)
        with dropout.installed():
            dropout.begin(torch.zeros(2, 3, dtype=torch.int64))
            if predicts:
                assert model(torch.ones(7, 5, device="meta")).shape == (7, 5)
            else:
                with pytest.raises(UnkeyedDropout, match=r"\(7, 5\)"):
                    model(torch.ones(7, 5))


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "added"])
def test_dropped_attention_is_that_of_plain_products(mask):
    from ray_peft.engine.dropped_attention import dropped_attention
    from ray_peft.engine.keyed_dropout import placed

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 6, 8, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    keys = placed(torch.arange(2 * 4 * 6).view(2, 4, 6), torch.zeros(1, dtype=torch.int64))
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    given = {"none": None, "causal": None, "boolean": seen[None, None], "added": torch.randn(2, 1, 6, 6).double()}[mask]

    def ours(query, key, value):
        return dropped_attention(
            query, key, value, given, p=0.4, is_causal=mask == "causal", scale=None, keys=keys, columns=None, layer=3
        )

    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    if mask in ("causal", "boolean"):
        scores = scores.masked_fill(~seen, float("-inf"))
    elif mask == "added":
        scores = scores + given
    wanted = keyed_dropout(scores.softmax(-1), 0.4, keys, 3) @ value.repeat_interleave(2, 1)
    assert torch.allclose(ours(query, key, value), wanted)
    assert torch.autograd.gradcheck(ours, (query, key, value))
