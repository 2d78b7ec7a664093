"""Search spaces as text: what is written is read back, and comments stand where they belong."""

import json

import pytest
from pydantic import TypeAdapter

from ray_peft.compare.candidates import COMPARED, FACTORS, candidates, check_names
from ray_peft.compare.space_text import written
from ray_peft.errors import SpecError
from ray_peft.methods import AnyMethod
from ray_peft.space import yaml_text
from ray_peft.spec import TrialSpec

PLAIN = {
    "name": "compare-a-b, search",
    "description": "Which: a or 'b'? # no comment \u00e9",
    "task": "llm_sft",
    "model": {"name": '/tmp/a model/"x"', "dtype": "float32"},
    "data": {
        "sources": [{"recipe": "alpaca", "path": "C:\\rows\\no.jsonl", "train": 1.0, "test": 8}],
        "max_length": 96,
        "too_long": "drop",
    },
    "method": {"grid": [{"name": "lora", "lr": {"grid": [4e-05, 0.0002, 1.0]}}, {"grid": [{"name": "none"}]}]},
    "train": {"steps": 4, "fit": None, "cuda_graphs": True, "checkpoint_every": "5 minutes"},
    "seed": {"grid": [2, 3]},
}


def test_what_is_written_is_read_back_with_comments_and_without():
    comments = {"data": "first\nsecond", "data.max_length": "tokens", "method.1": "the base"}
    text = written(PLAIN, "head: {of} all\n", comments)
    assert yaml_text.parse(text, "file") == yaml_text.parse(written(PLAIN, "", {}), "file") == PLAIN
    lines = text.splitlines()
    assert lines[0] == "# head: {of} all"
    assert lines[lines.index("data:") - 2 :][:2] == ["# first", "# second"]
    assert lines[lines.index("  max_length: 96") - 1] == "  # tokens"


@pytest.mark.parametrize("name", ["yes", "null", "1e5", "12", "a: b", "- a", "", "~", "on", "0x1F", "it's", "{a}"])
def test_text_stays_text(name):
    assert yaml_text.parse(written({"name": name}, "", {}), "file") == {"name": name}


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("name", ["full", "lora", "qlora", "galore", "qlora_galore"])
def test_every_method_has_equally_many_rates_around_its_default(name, on_gpu):
    (method,) = candidates([name], on_gpu=on_gpu, hidden_size=64)
    for factors in FACTORS.values():
        rates = []
        for factor in factors:
            train = {"steps": 40, "precision": "bf16" if on_gpu else "fp32"}
            sources = [{"recipe": "alpaca", "path": "a", "train": 1, "test": 1}]
            dtype = "bfloat16" if on_gpu else "float32"
            plain = {"model": {"name": "a", "dtype": dtype}, "data": {"sources": sources}, "train": train}
            spec = TrialSpec.from_plain(plain | {"method": method.at(factor)})
            rates.append([stage.lr for _, stage in spec.method.parts()])
        assert len({tuple(of_method) for of_method in rates}) == len(factors)
        default = TrialSpec.from_plain(plain | {"method": {"name": name}}).method
        assert [stage.lr for _, stage in default.parts()] in rates
        for first, last in zip(rates[0], rates[-1], strict=True):
            assert last / first == pytest.approx(factors[-1] / factors[0], rel=0.05)


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("name", COMPARED)
def test_every_method_that_may_be_named_can_be_made_with_several_rates(name, on_gpu):
    (method,) = candidates([name], on_gpu=on_gpu, hidden_size=64)
    entries = [method.at(factor) for factor in FACTORS[3]]
    methods = [TypeAdapter(AnyMethod).validate_json(json.dumps(entry)) for entry in entries]
    rates = [[stage.lr for _, stage in with_rate.parts()] for with_rate in methods]
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lorra"], "did you mean lora?"),
        (["none"], "must be some of full, lora"),
        (["lora", "lora"], "each method once"),
    ],
)
def test_a_wrong_method_is_refused(names, words):
    with pytest.raises(SpecError) as caught:
        check_names(names)
    assert words in str(caught.value)
