"""Labels name what differs and never name two trials alike."""

import itertools
import json
import random

import example_sweep
import pytest

from ray_peft.report.flat import flatten
from ray_peft.report.labels import labels, setting_text
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import TrialResult

SOURCE = {"recipe": "alpaca", "path": "/data/alpaca.jsonl", "train": 100, "test": 10}


def trial(method, **changes):
    plain = {
        "model": {"name": "org/tiny"},
        "data": {"sources": [SOURCE]},
        "method": {"name": method} if isinstance(method, str) else method,
        "train": {"steps": 10},
    }
    for key, value in changes.items():
        target = plain
        *parents, last = key.split("__")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    spec = TrialSpec.from_plain(plain)
    return TrialResult(trial_id=spec.trial_id, status="finished", spec=spec)


def labelled(trials):
    return labels({each.trial_id: each.spec for each in trials})


def names(*trials):
    return list(labelled(trials).values())


def test_different_methods_need_no_settings_although_their_learning_rates_differ():
    assert names(trial("none"), trial("lora"), trial("galore")) == ["none", "lora", "galore"]


def test_one_trial_is_its_method():
    assert names(trial("lora", seed=7)) == ["lora"]


def test_settings_of_a_method_that_differ_are_named_own_ones_first():
    grid = [{"name": "lora", "rank": r, "lr": lr} for r in (8, 16) for lr in (1e-4, 2e-4)]
    assert names(trial("none"), *map(trial, grid)) == [
        "none",
        "lora rank=8 lr=0.0001",
        "lora rank=8 lr=0.0002",
        "lora rank=16 lr=0.0001",
        "lora rank=16 lr=0.0002",
    ]


def test_models_and_seeds_are_named_when_there_are_several():
    found = names(*(trial("full", model__name=m, seed=s) for m in ("org/a", "other/b") for s in (1, 2)))
    assert found == ["full model=a seed=1", "full model=a seed=2", "full model=b seed=1", "full model=b seed=2"]


def test_models_of_one_name_keep_their_owner():
    assert names(trial("lora", model__name="a/m"), trial("lora", model__name="b/m")) == [
        "lora model=a/m",
        "lora model=b/m",
    ]


def test_a_seed_of_the_data_is_not_called_the_seed():
    assert names(trial("lora", data__seed=1), trial("lora", data__seed=2)) == ["lora data.seed=1", "lora data.seed=2"]


def test_equal_ends_of_keys_are_told_apart():
    found = names(trial("lora", train__batch_size=8), trial("lora", evaluation__batch_size=8))
    assert found == [
        "lora train.batch_size=8 evaluation.batch_size=32",
        "lora train.batch_size=16 evaluation.batch_size=8",
    ]


def test_one_row_and_all_rows_differ():
    found = names(*(trial("lora", data__sources=[SOURCE | {"train": n}]) for n in (1, 1.0)))
    assert found == ["lora train=1", "lora train=1.0"]


def test_null_and_the_text_null_differ():
    assert names(trial("lora", model__revision=None), trial("lora", model__revision="null")) == [
        "lora model.revision=null",
        'lora model.revision="null"',
    ]


def test_trials_of_equal_settings_end_in_their_ids():
    first = trial("lora")
    second = first.model_copy(update={"trial_id": "lora-other"})
    assert names(first, second) == [f"lora ({first.trial_id})", "lora (lora-other)"]


AXES = {
    "model__name": ["org/m", "org2/m", "m", "x seed=1", "模型", "a|b", "m\n"],
    "model__revision": [None, "null", "1", "main", "main lr=1"],
    "model__quantization": [None, {}, {"double_quant": False}],
    "data__seed": [1, 2],
    "data__sources": [
        [SOURCE],
        [SOURCE | {"train": 1}],
        [SOURCE | {"train": 1.0}],
        [SOURCE, SOURCE | {"name": "b", "path": "/b x/alpaca.jsonl"}],
    ],
    "train__batch_size": [2, 4],
    "evaluation__batch_size": [2, 4],
    "seed": [0, 1, 2],
    "method": [
        {"name": "none"},
        {"name": "lora"},
        {"name": "lora", "rank": 8},
        {"name": "lora", "targets": ["a,b"]},
        {"name": "lora", "targets": ["a", "b"]},
        {"name": "qlora", "rank": 8},
    ],
}


@pytest.mark.parametrize("draw", range(60))
def test_labels_are_never_ambiguous(draw):
    rng = random.Random(draw)
    axes = {key: rng.sample(AXES[key], rng.randint(1, min(3, len(AXES[key])))) for key in rng.sample(list(AXES), 4)}
    axes.setdefault("method", [{"name": "lora"}])
    trials = []
    for choice in itertools.product(*axes.values()):
        changes = dict(zip(axes, choice, strict=True))
        if changes.get("model__quantization") is None or changes["method"]["name"] == "none":
            trials.append(trial(changes.pop("method"), **changes))
    trials = list({t.trial_id: t for t in trials}.values())
    found = labelled(trials)
    assert list(found) == [t.trial_id for t in trials]
    assert len(set(found.values())) == len(trials)
    assert all(label.isascii() and label.isprintable() for label in found.values())
    # The id is a last resort: grids of real settings are told apart by their settings.
    assert not any(f"({trial_id})" in label for trial_id, label in found.items())


def test_setting_text_is_injective():
    values = [1, 1.0, True, "1", "1.0", "true", None, "null", "", " ", "a b", "a,b", ["a,b"], ["a", "b"], [], "[]", "é"]
    assert len({setting_text(value) for value in values}) == len(values)


def test_flatten_numbers_lists_of_mappings_alone():
    plain = {"a": {"b": 1}, "sources": [{"x": 1}, {"x": 2}], "betas": [0.9, 0.999], "none": []}
    assert flatten(plain) == {"a.b": 1, "sources.0.x": 1, "sources.1.x": 2, "betas": [0.9, 0.999], "none": []}
    assert flatten(json.loads("{}")) == {}


def test_ensembles_are_named_by_the_methods_of_their_members():

    lora, galore, full = ({"method": {"name": name}} for name in ("lora", "galore", "full"))
    of = [[lora, galore], [lora, full], [lora, full | {"seed": 7}]]
    specs = [example_sweep.spec("ensemble", 1, members=members) for members in of]
    found = labels({spec.trial_id: spec for spec in specs})
    assert list(found.values()) == [
        "ensemble members=[lora,galore]",
        "ensemble members=[lora,full]",
        "ensemble members=[lora,full:7]",
    ]
    ranks = [[{"method": {"name": "lora", "rank": rank}}, galore] for rank in (4, 8)]
    specs = [example_sweep.spec("ensemble", 1, members=members) for members in ranks]
    found = labels({spec.trial_id: spec for spec in specs})
    assert list(found.values()) == [f"ensemble ({spec.trial_id})" for spec in specs]
