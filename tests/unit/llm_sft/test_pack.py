"""Trials that train together on one base have the numbers of the same trials alone."""

import math
from dataclasses import dataclass, field

import pytest
import tiny
import tiny_architectures
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ray_peft.engine.member import Job
from ray_peft.errors import TrialFailed
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.llm_sft.bench import LlmBench
from ray_peft.tasks.llm_sft.pack import Pack
from ray_peft.tasks.llm_sft.together import LossTogether

TOGETHER = {"rel": 1e-5, "abs": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.QUESTIONS)


@dataclass
class Told:
    """What a trial left."""

    log: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    loss: float = math.nan
    error: Exception | None = None
    tokens: int = 0
    seconds: float = 0.0


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def job_of(bench, folder, told, evaluate):
    spec = bench.spec
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    return Job(
        spec, stage, steps, 0, folder, "cpu", lambda metrics, step: told.log.append((step, dict(metrics))), evaluate
    )


def alone(spec, folder):
    """The trial by itself, as `ray-peft run` trains it."""
    bench, told = TASKS["llm_sft"].load(spec, "cpu"), Told()
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    bench.attach(stage)
    try:
        trained = bench.train(stage, steps, 0, folder, lambda metrics, step: told.log.append((step, dict(metrics))))
    except TrialFailed as error:
        told.error = error
        return told
    told.tokens, told.seconds = trained.tokens, trained.seconds
    told.adapter, told.loss = adapter_of(bench.model), bench.eval_loss()
    return told


def together(specs, folder, places, plant=None):
    """The trials in one pack."""
    base = TASKS["llm_sft"].load(specs[0], "cpu")
    others = [TASKS["llm_sft"].load(spec, "cpu") for spec in specs[1:]]
    benches = [base] + [
        LlmBench(spec, "cpu", other.tokenizer, other.data, base.model)
        for spec, other in zip(specs[1:], others, strict=True)
    ]
    told = [Told() for _ in specs]
    by_bench = {id(bench): one for bench, one in zip(benches, told, strict=True)}

    def ended(bench, member, error):
        one = by_bench[id(bench)]
        one.error, one.tokens, one.seconds = error, member.trained.tokens, member.trained.seconds
        if error is None:
            one.adapter, one.loss = adapter_of(bench.model), bench.eval_loss()

    jobs = [
        job_of(bench, folder / f"member{place}", one, lambda bench=bench: pack.evaluation(bench)())
        for place, (bench, one) in enumerate(zip(benches, told, strict=True))
    ]
    pack = Pack(benches, jobs, places, ended)
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    if plant is not None:
        plant(pack)
    pack.run()
    assert [name for name, value in base.model.named_parameters() if not torch.equal(value, before[name])] == []
    assert not any(module._forward_hooks for module in base.model.modules() if isinstance(module, torch.nn.Linear))
    return told


def check_equal(ours, theirs):
    assert ours.error is None
    assert [step for step, _ in ours.log] == [step for step, _ in theirs.log]
    for (step, our), (_, their) in zip(ours.log, theirs.log, strict=True):
        assert our == pytest.approx(their, **TOGETHER), step
    assert ours.adapter.keys() == theirs.adapter.keys()
    for name, value in ours.adapter.items():
        # AdamW divides the first gradient by itself, so a number whose gradient is all rounding may go either way.
        apart = ~torch.isclose(value, theirs.adapter[name], rtol=1e-4, atol=1e-5)
        assert apart.float().mean() < 0.005, name
    assert ours.loss == pytest.approx(theirs.loss, **TOGETHER)
    assert ours.tokens == theirs.tokens


def specs_of(model, rows, settings, **common):
    return [
        TrialSpec.from_plain(tiny.plain_spec(model, rows, {"name": "lora", **method}, **common | changes))
        for method, changes in settings
    ]


UNEQUAL = [
    ({"rank": 4, "lr": 0.01, "alpha": 8}, {"seed": 1, "train__steps": 5}),
    (
        {"rank": 8, "lr": 0.02, "alpha": 4, "weight_decay": 0.1},
        {"seed": 2, "train__steps": 3, "train__schedule": "linear"},
    ),
    (
        {"rank": 2, "lr": 0.005, "max_grad_norm": 0.01, "targets": ["q_proj", "v_proj"]},
        {"seed": 3, "train__steps": 6, "train__batch_size": 4, "train__warmup_steps": 2, "train__eval_every": 2},
    ),
    (
        {"rank": 16, "max_grad_norm": None, "betas": [0.8, 0.99], "targets": ["down_proj", "o_proj"]},
        {"train__steps": 4, "train__batch_size": 12, "train__micro_batch_size": 2, "train__loss": "all"},
    ),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("llama"), talkative=True)


def test_unequal_trials(llama, rows, tmp_path):
    specs = specs_of(llama, rows, UNEQUAL)
    for ours, spec in zip(together(specs, tmp_path, 4), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


def test_who_waits_takes_a_place_that_becomes_free(llama, rows, tmp_path):
    specs = specs_of(llama, rows, UNEQUAL)
    for ours, spec in zip(together(specs, tmp_path, 2), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


def test_a_failed_member_leaves_the_others_unchanged_to_the_bit(llama, rows, tmp_path):
    specs = specs_of(llama, rows, [UNEQUAL[0], UNEQUAL[1], ({"rank": 4}, {"seed": 5, "train__steps": 5})])

    def break_the_second(pack):
        def poison(module, inputs):
            if 1 in pack._seats and pack._seats[1][1].done == 1:  # its second step begins
                pack._slots.weights[1].fill_(math.nan)

        pack._base.base_model.register_forward_pre_hook(poison)

    usual = together(specs, tmp_path / "usual", 3)
    broken = together(specs, tmp_path / "broken", 3, break_the_second)
    assert isinstance(broken[1].error, TrialFailed)
    assert "the training loss is nan at step 2" in str(broken[1].error)
    assert [step for step, _ in broken[1].log] == [1]
    for ours, theirs in zip(broken[::2], usual[::2], strict=True):
        assert ours.log[:2] == theirs.log[:2], "beside what is no number"
        check_equal(ours, theirs)


def test_a_pack_that_is_stopped_goes_on_from_its_members_checkpoints(llama, rows, tmp_path):
    specs = specs_of(llama, rows, UNEQUAL[:3], train__checkpoint_every=2)

    def stop(pack):
        def interrupt(module, inputs):
            if 0 in pack._seats and pack._seats[0][1].done == 4:  # its last step begins
                raise KeyboardInterrupt

        pack._base.base_model.register_forward_pre_hook(interrupt)

    with pytest.raises(KeyboardInterrupt):
        together(specs, tmp_path, 2, stop)
    told = together(specs, tmp_path, 2)
    assert [ours.log[0][0] for ours in told] == [5, 3, 1]  # the third had just begun
    for ours, spec in zip(told, specs, strict=True):
        theirs = alone(spec, tmp_path / spec.trial_id)
        ours.log = [line for line in theirs.log if line[0] < ours.log[0][0]] + ours.log
        check_equal(ours, theirs)


def test_one_without_rows_of_its_own_follows_one_that_failed(llama, rows, tmp_path):
    specs = specs_of(llama, rows, [UNEQUAL[0], ({"rank": 8, "lr": 1e30}, {"train__steps": 9}), UNEQUAL[2]])
    told = together(specs, tmp_path, 2)
    assert isinstance(told[1].error, TrialFailed)
    for place in (0, 2):
        check_equal(told[place], alone(specs[place], tmp_path / specs[place].trial_id))


def test_memory_that_runs_out_halves_the_passes_of_all(llama, rows, tmp_path, monkeypatch):
    specs = specs_of(llama, rows, UNEQUAL[:3])
    sizes, whole = [], LossTogether.loss

    def cramped(self, *inputs):
        sizes.append(inputs[0].numel())
        if len(sizes) > 3 and inputs[0].numel() > 400:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, *inputs)

    monkeypatch.setattr(LossTogether, "loss", cramped)
    told = together(specs, tmp_path, 3)
    assert max(sizes[:3]) > 400
    assert max(sizes[-4:]) <= 400
    for ours, spec in zip(told, specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


def test_recomputed_activations(llama, rows, tmp_path):
    specs = specs_of(llama, rows, UNEQUAL[:3], train__gradient_checkpointing=True)
    for ours, spec in zip(together(specs, tmp_path, 2), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


WINDOWS = {"num_hidden_layers": 2, "head_dim": 16, "sliding_window": 16, "num_key_value_heads": 2}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512}
OTHERS = {
    "gemma2": {**SMALL, **WINDOWS, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**SMALL, **WINDOWS, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name, rows, tmp_path):
    folder = tmp_path / "model"
    tiny.build_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name,
        vocab_size=272,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        **OTHERS[name],
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    settings = [
        ({"rank": 4, "lr": 0.01}, {"seed": 1}),
        ({"rank": 8, "lr": 0.003, "alpha": 5}, {"seed": 2, "train__steps": 3, "train__batch_size": 4}),
    ]
    specs = specs_of(folder, rows, settings)
    for ours, spec in zip(together(specs, tmp_path, 2), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_in_4_bits(kind, llama, rows, tmp_path):
    folder = llama
    if kind == "gpt2":
        folder = tiny_architectures.build("gpt2", tmp_path / "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    settings = [
        ({"name": "qlora", "rank": 4, "lr": 0.001, "compute_dtype": "float32"}, {"seed": 1}),
        ({"name": "qlora", "rank": 8, "lr": 0.002, "compute_dtype": "float32"}, {"seed": 2, "train__steps": 3}),
    ]
    specs = specs_of(folder, rows, settings)
    for ours, spec in zip(together(specs, tmp_path, 2), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


def test_seconds_are_divided_by_tokens(llama, rows, tmp_path):
    specs = specs_of(
        llama, rows, [({}, {"train__batch_size": 12, "train__log_every": 99}), ({}, {"train__batch_size": 4})]
    )
    many, few = together(specs, tmp_path, 2)
    assert many.seconds / few.seconds == pytest.approx(many.tokens / few.tokens, rel=0.5)
