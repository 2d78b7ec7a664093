"""Prompts answered in lanes get the answers of `generate`, whatever shares the passes; other models are left to it."""

import pytest
import tiny
import tiny_architectures
import torch
from attention_kinds import ARCHITECTURES
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ray_peft.engine.replays import Replays
from ray_peft.tasks.llm_sft.continuous import Answering, Ends, Lanes, Voice
from ray_peft.tasks.llm_sft.decodable import why_not

PAD = 258
NEW = 40
STOPS = list(range(0, 250, 12))
"""Every twelfth token ends an answer, so that answers end at many lengths."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def prompts():
    """Of 2 to 75 tokens, in no order: some fill more than the window of 16 places, some less."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (2 + 73 * (5 * place % 13) // 12,), generator=draw).tolist() for place in range(13)]


def model(name, **changes):
    torch.manual_seed(0)
    untied = {"tie_word_embeddings": False}  # tied ones of random weights repeat the last token
    config = AutoConfig.for_model(name, **(ARCHITECTURES[name] | untied | changes))
    return AutoModelForCausalLM.from_config(config).float().eval()


def generated(built, prompts, stops=STOPS, new=NEW):
    """What `generate` answers to each prompt alone."""
    config = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=PAD, max_new_tokens=new)
    found = []
    for prompt in prompts:
        output = built.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


def in_lanes(built, prompts, lanes=4, *, static, stops=STOPS, new=NEW, seen=None):
    ends = Ends(new, stops)
    held = Lanes([Voice(built)], lanes, max(map(len, prompts)) + new, ends, torch.float32)
    replays = Replays(records=False)
    if seen is not None:
        work = replays.__call__
        replays = lambda shape, step: (seen.append(shape), work(shape, step))  # noqa: E731
    found = dict(Answering(held, PAD, replays, static=static).answers(prompts, range(len(prompts))))
    return [found[row] for row in range(len(prompts))]


@pytest.mark.parametrize("static", [True, False], ids=["few shapes", "smallest shapes"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_are_those_of_generate(name, static, prompts):
    built = model(name)
    wanted = generated(built, prompts)
    assert len({len(answer) for answer in wanted}) > 3, "answers end at one length, so lanes cannot be seen to free"
    assert why_not(Voice(built), prompts, PAD, torch.float32) is None
    assert in_lanes(built, prompts, static=static) == wanted


@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
@pytest.mark.parametrize("lanes", [1, 2, 13, 32])
def test_answers_do_not_depend_on_the_lanes(name, lanes, prompts):
    built = model(name)
    wanted = generated(built, prompts)
    for static in (True, False):
        assert in_lanes(built, prompts, lanes, static=static) == wanted


def test_eager_and_fused_attention_answer_alike(prompts):
    built = model("llama", attn_implementation="eager")
    assert built.config._attn_implementation == "eager"
    assert in_lanes(built, prompts, static=True) == generated(built, prompts)


def test_one_token_and_answers_that_never_end(prompts):
    built = model("llama")
    for new in (1, 2, 25):
        given = in_lanes(built, prompts, static=True, stops=[999], new=new)
        assert given == generated(built, prompts, stops=[999], new=new)
        assert {len(answer) for answer in given} == {new}


def test_a_lane_that_is_free_takes_the_next_prompt(prompts):
    built, seen = model("llama"), []
    answers = in_lanes(built, prompts, 8, static=True, seen=seen)
    steps = sum(shape[0] != "read" for shape in seen)
    in_batches = sum(
        max(len(answers[row]) for row in batch)
        for batch in (sorted(range(13), key=lambda row: -len(prompts[row]))[first : first + 8] for first in (0, 8))
    )
    assert steps < in_batches, "a batch waits for its longest answer"


def test_lanes_close_up_once_no_prompt_waits(prompts):
    built, seen = model("llama"), []
    many = [prompts[place % 13][: 40 + place] for place in range(40)]
    assert in_lanes(built, many, 32, static=True, seen=seen) == generated(built, many)
    counts = [shape[0] for shape in seen if shape[0] != "read"]
    assert counts == sorted(counts, reverse=True)
    assert set(counts) == {32, 16, 8}


def test_shapes_are_few(prompts):
    built, seen = model("llama"), []
    many = [prompts[place % 13] for place in range(90)]
    in_lanes(built, many, 16, static=True, seen=seen)
    assert len(set(seen)) <= 8 < len(seen)


@pytest.mark.parametrize("name", [*tiny_architectures.ARCHITECTURES, "falcon with alibi"])
def test_other_architectures_answer_alike_or_are_left_to_generate(name, prompts):
    torch.manual_seed(0)
    architecture, _, alibi = name.partition(" with ")
    config = tiny_architectures.config(architecture, **({"alibi": True} if alibi else {}))
    built = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in built.parameters():
        parameter.mul_(8)
    reason = why_not(Voice(built), prompts, PAD, torch.float32)
    assert (reason is not None) == (name in {"bloom", "falcon with alibi", "mamba", "mpt"}), reason
    if reason is None:
        assert in_lanes(built, prompts[:6], static=True) == generated(built, prompts[:6])


def test_what_cannot_be_right_is_named(prompts):
    built = model("phi3", rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64, "factor": 8.0,
    })  # fmt: skip
    assert "longest row of a batch" in why_not(Voice(built), prompts, PAD, torch.float32)
    assert why_not(Voice(model("llama")), [[1], []], PAD, torch.float32) == "a prompt is empty"
    own = type("Own", (type(model("llama")),), {"__module__": "their_code"})
    built = model("llama")
    built.__class__ = own
    assert why_not(Voice(built), prompts, PAD, torch.float32) == "its code is not part of transformers"


def test_scores_that_differ_are_seen(prompts, monkeypatch):
    from ray_peft.tasks.llm_sft import decodable, lane_cache

    monkeypatch.setattr(decodable, "_equal", set())
    monkeypatch.setattr(lane_cache.NextTokens, "_written", lambda self, places: torch.zeros(2, dtype=torch.int64))
    assert "would differ" in why_not(Voice(model("llama")), prompts, PAD, torch.float32)


class Operations(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "item", "nonzero", "isin", "_unique2", "masked_select", "equal", "is_nonzero"}
"""Operations whose result the host waits for, which cannot be recorded; `isin` does so with many elements."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_pass_waits_for_the_gpu(name):
    built = model(name)
    lanes = Lanes([Voice(built), Voice(built)], 4, 60, Ends(8, STOPS), torch.float32)
    prompts, lengths, into = torch.full((2, 9), 5), torch.tensor([9, 4]), torch.tensor([2, 0])
    lanes.read(prompts, lengths, into)
    with Operations() as seen:
        lanes.read(prompts, lengths, into)
        lanes.add(4, 32)
    assert "index_copy_" in seen.names
    assert not seen.names & WAITING
