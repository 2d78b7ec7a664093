"""Search spaces: expansion, and every problem once with file, key, rule, value and trials."""

import re
from pathlib import Path

import pytest
import yaml

from ray_peft.errors import SearchSpaceError
from ray_peft.space import read as space

ROOT = Path(__file__).resolve().parents[2]
BASE = """
task: llm_sft
model: {name: some/model}
data: {sources: [{recipe: dolly, path: hub/rows, train: 10, test: 2}]}
method: {name: lora}
train: {steps: 5, batch_size: 8, micro_batch_size: 4}
"""


def parsed(text: str, overrides=None, profile=None):
    return space.parse(text, "space.yaml", overrides, profile)


def refused(text: str, overrides=None, profile=None) -> list[str]:
    with pytest.raises(SearchSpaceError) as caught:
        parsed(text, overrides, profile)
    return str(caught.value).splitlines()


def changed(**keys) -> str:
    return yaml.safe_dump({**yaml.safe_load(BASE), **keys})


def test_a_grid_is_every_combination_and_a_list_is_a_value():
    found = parsed(
        changed(
            model={"name": {"grid": ["a/a", "b/b"]}},
            method={
                "grid": [
                    {"name": "lora", "rank": {"grid": [4, 8]}, "targets": ["q_proj", "v_proj"]},
                    {"name": "galore"},
                ]
            },
            seed={"grid": [0, 1]},
        )
    )
    assert len(found.trials) == 2 * 3 * 2
    assert len({trial.trial_id for trial in found.trials}) == 12
    assert {trial.method.targets for trial in found.trials if trial.method.name == "lora"} == {("q_proj", "v_proj")}


def test_equal_cells_are_one_trial():
    assert len(parsed(changed(seed={"grid": [1, 1]})).trials) == 1


def test_each_problem_is_reported_once_with_its_trials():
    methods = [{"name": "lora", "rank": {"grid": [8, 32]}, "rnak": 3}, {"name": "lroa"}, {"name": "full"}]
    train = {"steps": 5, "batch_size": 6, "micro_batch_size": 4}
    lines = refused(changed(method={"grid": methods}, train=train))
    assert lines[0] == "space.yaml: method.lora.rnak: unknown key, did you mean rank? (found 3), in 2 of 4 trials"
    assert lines[1].startswith("space.yaml: method.name: must be one of none, full, lora, ")
    assert lines[1].endswith("in 1 of 4 trials")
    assert lines[2].startswith("space.yaml: train.batch_size (6) must be a multiple of train.micro_batch_size (4)")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b", "must be a mapping"),
        ("a: [1, 2", "line 1"),
        ("seed: 1\nseed: 2", "line 2, column 1: key 'seed' is given twice"),
        (changed(train={"steps": "five"}), "train.steps: Input should be a valid integer (found 'five')"),
        *[
            (
                changed(train={"steps": 5, "checkpoint_every": wrong}),
                f"train.checkpoint_every: {wrong!r} is no distance between two checkpoints; give optimizer steps, such "
                "as 100, or a time, such as 5 minutes, 90 seconds or 1.5 hours, or null for none",
            )
            for wrong in ("5 parsecs", "0 s", "100", 0, True, 2.5)
        ],
        (changed(task="sft"), "task: must be one of llm_sft, text_to_image"),
        ("task: llm_sft", "model: missing"),
        (changed(seed={"grid": []}), "seed.grid: must be a list with entries"),
        (changed(seed={"grid": [1], "also": 2}), "seed: grid stands alone"),
        (changed(search={"samples": 3}), "search: there is no distribution"),
        (changed(method={"name": "lora", "lr": {"loguniform": [1e-5, 1e-3]}}), "add `search: {samples: N}`"),
        (changed(method={"name": "lora", "lr": {"loguniform": [0, 1]}}, search={"samples": 1}), "must be above 0"),
        (changed(method={"name": "lora", "lr": {"uniform": [2, 1]}}, search={"samples": 1}), "must be below high"),
        (changed(method={"name": "lora", "lr": {"uniform": 3}}, search={"samples": 1}), "needs a list of two numbers"),
        (changed(method={"name": "lora", "optim": {"choice": "adamw"}}, search={"samples": 1}), "at least one entry"),
        (changed(method={"name": "lora", "lr": -1.0}), "method.lora.lr: Input should be greater than 0"),
        (changed(method={"name": "full", "lr": float("nan")}), "method.lr: must be a finite number (found nan)"),
        (changed(model={"name": "${NOT_SET_ANYWHERE}/m"}), "environment variable NOT_SET_ANYWHERE is not set"),
    ],
)
def test_a_wrong_file_is_one_clear_line(text, words):
    lines = refused(text)
    assert any(words in line for line in lines), lines
    assert all(line.startswith("space.yaml") for line in lines)


def test_optuna_searches_one_cell():
    method = {"grid": [{"name": "lora", "lr": {"loguniform": [1e-5, 1e-3]}}, {"name": "full"}]}
    lines = refused(changed(method=method, search={"samples": 2, "algorithm": "optuna"}))
    assert "the grid has 2 cells" in lines[0]


def test_a_search_is_not_refused_for_draws_that_it_would_pass_over():
    """Which draws show the kind of its trials is luck; what no draw can mend is still an error."""
    method = {"name": "lora", "rank": {"choice": [0, 4]}, "lr": {"loguniform": [1e-5, 1e-3]}}
    lines = refused(changed(method=method, search={"samples": 8}))
    assert "method.lora.rank: Input should be greater than or equal to 1" in lines[0]
    space = parsed(changed(method=method, search={"samples": 8, "algorithm": "optuna"}))
    assert {trial.method.rank for trial in space.trials} == {4}
    assert space.notes[0].startswith("caution: the search skips such proposals: method.lora.rank")
    wrong = changed(method=method | {"rnk": 3}, search={"samples": 8, "algorithm": "optuna"})
    assert any("rnk: unknown key, did you mean rank?" in line for line in refused(wrong))


def test_a_search_for_a_score_that_no_trial_has_is_refused():
    search = {"samples": 2, "algorithm": "optuna", "metric": "bleu4"}
    method = {"name": "lora", "lr": {"loguniform": [1e-5, 1e-3]}}
    assert parsed(changed(method=method, search=search)).trials
    silent = changed(method=method, search=search, evaluation={"generate": False})
    assert refused(silent) == [
        "space.yaml: search.metric: bleu4 needs evaluation.generate: true (found false); or use eval_loss"
    ]
    assert parsed(silent, ["search.metric=eval_loss"]).trials
    (line,) = refused(changed(method=method, search=search, task="text_to_image"))
    assert "search.metric: images have no text scores; use eval_loss (found bleu4)" in line


def test_problems_of_many_draws_are_cut_to_the_common_ones():
    lines = refused(changed(method={"name": "lora", "lr": {"uniform": [-2.0, -1.0]}}, search={"samples": 500}))
    assert len(lines) == 31
    assert re.fullmatch(r"space.yaml: and 4[67]\d more problems", lines[-1])


def test_random_draws_repeat_and_stay_in_bounds():
    text = changed(
        method={"name": "lora", "lr": {"loguniform": [1e-5, 1e-3]}, "rank": {"choice": [4, 8]}}, search={"samples": 20}
    )
    first, second = parsed(text), parsed(text)
    assert [trial.trial_id for trial in first.trials] == [trial.trial_id for trial in second.trials]
    assert len(first.trials) == 20
    assert all(1e-5 <= trial.method.lr <= 1e-3 and trial.method.rank in (4, 8) for trial in first.trials)


def test_every_cell_gets_the_same_number_of_draws():
    lr = {"loguniform": [1e-5, 1e-3]}
    method = {"grid": [{"name": "lora", "lr": lr}, {"name": "full", "lr": lr}, {"name": "none"}]}
    names = [trial.method.name for trial in parsed(changed(method=method, search={"samples": 4})).trials]
    assert [names.count(name) for name in ("lora", "full", "none")] == [4, 4, 1]


def test_fill_puts_values_at_dotted_keys():
    text = changed(method={"name": "lora", "lr": {"loguniform": [1e-5, 1e-3]}}, search={"samples": 1})
    template = parsed(text).templates[0]
    assert space.distributions(template) == {"method.lr": ("loguniform", [1e-5, 1e-3])}
    assert space.fill(template, {"method.lr": 5e-4}, "x").method.lr == 5e-4


def test_variables_have_defaults(monkeypatch):
    text = changed(model={"name": "${MY_MODELS:-hub}/m"})
    assert parsed(text).trials[0].model.name == "hub/m"
    monkeypatch.setenv("MY_MODELS", "other")
    assert parsed(text).trials[0].model.name == "other/m"


def test_overrides_replace_settings_and_numbers_may_lack_a_point():
    found = parsed(BASE, ["train.steps=7", "method={name: full, lr: 1e-5}"]).trials[0]
    assert found.train.steps == 7
    assert found.method.lr == 1e-5
    assert "must be key.path=value" in refused(BASE, ["train.steps"])[0]


@pytest.fixture
def named(monkeypatch):
    """The variables that some files need."""
    for name, value in {"DATA": "/data", "MODEL": "some/model", "VAN_GOGH": "/paintings"}.items():
        monkeypatch.setenv(f"RAY_PEFT_{name}", value)


FILES = sorted((ROOT / "search_spaces").glob("*.yaml"))
PROFILES = [
    (path, name)
    for path in FILES
    for name in yaml.safe_load(path.read_text(encoding="utf-8")).get("profiles", {})
]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_search_space_loads(path, named):
    assert space.load(path).trials


@pytest.mark.parametrize(("path", "name"), PROFILES, ids=[f"{path.stem} {name}" for path, name in PROFILES])
def test_a_profile_leaves_the_rows_comparable(path, name, named):
    plain, chosen = space.load(path), space.load(path, profile=name)
    assert chosen.profile == name
    assert len(chosen.trials) == len(plain.trials)
    for before, after in zip(plain.trials, chosen.trials, strict=True):
        assert (after.data, after.model, after.seed) == (before.data, before.model, before.seed)
        assert after.train.batch_size == before.train.batch_size
        assert (after.train.steps, after.train.epochs) == (before.train.steps, before.train.epochs)
        assert after.scored_as() == before.scored_as()
        assert after.method == before.method


def test_a_12_gib_card_has_a_profile_in_every_study():
    studies = {"gemma2_dolly_lora_qlora", "gemma3_qlora_galore", "gemma3_hybrid", "gemma3_ensemble", "sd15_van_gogh"}
    assert {path.stem for path, name in PROFILES if name == "12gib"} == studies | {
        "dpo_small",
        "quickstart",
        "smollm2_alpaca",
        "peft_methods",
        "whole_models",
    }


def test_the_spaces_that_share_an_output_folder_share_a_profile(named):
    found = [space.load(path, profile="12gib").trials for path in FILES if path.stem.startswith("gemma3_")]
    ids = [{trial.trial_id for trial in trials if not trial.members()} for trials in found]
    assert len(ids) == 3
    base = {trial.trial_id for trials in found for trial in trials if trial.method.name == "none"}
    assert len(base) == 1


def test_a_missing_file_is_named():
    with pytest.raises(SearchSpaceError, match=r"nowhere.yaml: no such file"):
        space.load("nowhere.yaml")


def test_the_report_setting_is_checked_and_is_no_part_of_a_trial():
    plain, chosen = parsed(BASE), parsed(changed(report={"loss_steps": [50, 1000, 3714]}))
    assert plain.report == space.ReportSpec()
    assert chosen.report.loss_steps == (50, 1000, 3714)
    assert chosen.trials == plain.trials
    assert parsed(BASE, ["report.loss_steps=[1, 5]"]).report.loss_steps == (1, 5)
    (problem,) = refused(changed(report={"loss_steps": [0]}))
    assert problem.startswith("space.yaml: report.loss_steps.0: Input should be greater than or equal to 1 (found 0)")
    (problem,) = refused(changed(report={"loss_step": [5]}))
    assert problem.startswith("space.yaml: report.loss_step: unknown key")


SMALL = {"12gib": {"train.fit": "auto", "evaluation.batch_size": 8}, "long": {"train.steps": 50}}


def test_a_profile_takes_the_place_of_settings_and_set_comes_after_it():
    text = changed(profiles=SMALL)
    plain, chosen = parsed(text), parsed(text, profile="12gib")
    assert plain == parsed(BASE)
    assert (plain.profile, chosen.profile) == (None, "12gib")
    assert (chosen.trials[0].train.fit, chosen.trials[0].evaluation.batch_size) == ("auto", 8)
    last = parsed(text, ["evaluation.batch_size=2"], "12gib").trials[0]
    assert (last.train.fit, last.evaluation.batch_size) == ("auto", 2)
    assert parsed(text, profile="long").trials[0].train.steps == 50


def test_a_profile_may_hold_a_grid_and_variables(monkeypatch):
    profiles = {"wide": {"seed": {"grid": [0, 1]}, "model.name": "${ELSEWHERE}/m"}}
    assert parsed(changed(profiles=profiles)).trials == parsed(BASE).trials  # its variable is not asked for
    monkeypatch.setenv("ELSEWHERE", "hub")
    trials = parsed(changed(profiles=profiles), profile="wide").trials
    assert [(trial.seed, trial.model.name) for trial in trials] == [(0, "hub/m"), (1, "hub/m")]


@pytest.mark.parametrize(
    ("profiles", "profile", "words"),
    [
        (SMALL, "12gb", "space.yaml: profile '12gb' is not in this search space; choose one of 12gib, long"),
        (None, "12gib", "space.yaml: profile '12gib' is not in this search space; it has none"),
        ([1], None, "space.yaml: profiles: must map names to settings (found [1])"),
        ({"a": "auto"}, None, "space.yaml: profiles.a: must map dotted keys to values"),
        ({"a": None}, None, "space.yaml: profiles.a: must map dotted keys to values"),
        (
            {"a": {"data.sources.1.train": 5}},
            None,
            "space.yaml: profiles.a: data.sources.1.train: data.sources is a list",
        ),
        ({"a": {"train.ft": "auto"}}, "a", "space.yaml: profiles.a: train.ft: unknown key, did you mean fit? (found "),
        ({"a": {"train": {"ft": 1}}}, "a", "space.yaml: profiles.a: train.ft: unknown key, did you mean fit? (found "),
        ({"a": {"traim.fit": "auto"}}, "a", "space.yaml: profiles.a: traim: unknown key"),
        ({"a": {"method.rnak": 8}}, "a", "space.yaml: profiles.a: method.lora.rnak: unknown key, did you mean rank?"),
        ({"a": {"train.micro_batch_size": 3}}, "a", "space.yaml: profiles.a: train.batch_size (8) must be a multiple"),
        ({"a": {"train.epochs": 2.0}}, "a", "space.yaml: profiles.a: train: give exactly one of epochs (found 2.0)"),
        ({"a": {"report.loss_steps": [0]}}, "a", "space.yaml: profiles.a: report.loss_steps.0: Input should be"),
    ],
)
def test_a_wrong_profile_is_one_line_that_names_it(profiles, profile, words):
    lines = refused(changed(profiles=profiles), profile=profile)
    assert len(lines) == 1
    assert lines[0].startswith(words)


def test_an_error_that_a_profile_did_not_make_does_not_name_it():
    text = changed(profiles={"a": {"train.steps": 7}}, seed=-1)
    assert refused(text, profile="a")[0].startswith("space.yaml: seed: Input should be")
    text = changed(profiles={"a": {"train.steps": 7}})
    assert refused(text, ["train.steps=0"], "a")[0].startswith("space.yaml: train.steps: Input should be")


def test_one_wrong_member_of_an_ensemble_is_one_error_with_its_place_in_the_file():
    members = [{"method": {"name": "lora", "rnak": 4}}, {"method": {"name": "full"}}]
    plain = changed(method={"name": "ensemble", "members": members})
    assert refused(plain) == [
        "space.yaml: method.members.0.method.rnak: unknown key, did you mean rank? (found 4), in 1 of 1 trials"
    ]
    plain = changed(method={"name": "ensemble", "members": members[1:]})
    (line,) = refused(plain)
    assert "an ensemble needs at least two members (found 1)" in line


@pytest.mark.parametrize(
    ("text", "overrides", "line"),
    [
        (changed(), ["data.sources.0.train=80%"], "data.sources.0.train: Input should be a valid number"),
        (changed(), ["data.sources.0=3"], "data.sources.0: Input should be an object (found 3)"),
        (changed(), ["data.sources.0.test=0"], "data.sources.0.test: Input should be greater than 0 (found 0)"),
        (changed(), ["data.sources=[]"], "data.sources: Tuple should have at least 1 item"),
        (
            changed(method={"name": "lora", "rank": {"choice": [4, 8]}}),
            ["search={samples: 0}"],
            "search.samples: Input should be greater than or equal to 1 (found 0)",
        ),
        (
            changed(method={"name": "lora", "lr": {"loguniform": [1e-5, 1e-3], "uniform": [0, 1]}}),
            ["search={samples: 2}"],
            "method.lr: loguniform stands alone in its mapping (found also uniform)",
        ),
    ],
)
def test_one_mistake_is_one_line(text, overrides, line):
    (said,) = refused(text, overrides)
    assert said.startswith(f"space.yaml: {line}")


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ({"name": "loar"}, "method.name: must be one of none, full, lora, .* \\(found 'loar'\\); did you mean lora\\?"),
        ({"name": "LoRA"}, "method.name: must be one of .*; did you mean lora\\?"),
        ({"rank": 4}, "method.name: missing \\(found {'rank': 4}\\)"),
        ("lora", "method: Input should be .*; write {name: lora}"),
        ([{"name": "lora"}, {"name": "none"}], "method: Input should be .*; several stand in {grid: \\[...\\]}"),
    ],
)
def test_a_method_that_is_none_is_said_with_those_that_are(method, line):
    (said,) = refused(changed(method=method))
    assert re.match(f"space.yaml: {line}", said), said


@pytest.mark.parametrize("override", [".train=3", "train.=3", "train..steps=3", " =3", "train.steps"])
def test_a_key_without_a_name_is_refused(override):
    assert refused(changed(), [override]) == [f"--set {override}: must be key.path=value"]


SEARCH = {"samples": 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"method": {"name": "lora", "lr": {"log_uniform": [1e-5, 1e-3]}}},
            "method.lr.log_uniform: no such distribution",
        ),
        ({"method": {"name": "lora", "lr": {"logunifrom": [1e-5, 1e-3]}}}, "did you mean loguniform?"),
        ({"method": {"gird": [{"name": "lora"}]}}, "method.gird: no such distribution, did you mean grid?"),
        ({"method": {"choices": [{"name": "lora"}]}}, "did you mean choice?"),
        (
            {"method": {"choice": [{"name": "lora", "rank": {"choice": [4, 8]}}]}},
            "an entry holds a distribution itself",
        ),
        ({"name": None}, "name: must be text (found None)"),
        ({"name": 2024}, "name: must be text (found 2024)"),
        ({"name": ""}, "name: cannot name a folder"),
        ({"name": "../escaped"}, "name: cannot name a folder on every system (found '../escaped')"),
        ({"name": "a:b"}, "cannot name a folder"),
        ({"name": "ends."}, "cannot name a folder"),
        ({"name": "x" * 200}, "cannot name a folder"),
        (
            {"model": {"name": "hub/m", "revision": 1.0}},
            "Input should be a valid string (found 1.0); write it in quotes",
        ),
        ({"method": {"name": "lora", "rank": "4"}}, "(found '4'); write it without quotes"),
    ],
)
def test_what_looks_right_and_is_not_is_said(changes, words):
    lines = refused(
        changed(**changes, search=SEARCH) if "distribution" in words or "mean" in words else changed(**changes)
    )
    assert any(words in line for line in lines), lines


def test_names_that_windows_keeps_for_itself_are_refused_there(monkeypatch):
    text = changed(name="nul.txt")
    assert parsed(text).name == "nul.txt"
    monkeypatch.setattr(space, "_RESERVED", space.DEVICES)
    assert "cannot name a folder" in refused(text)[0]


def test_merge_keys_bring_settings_that_a_cell_may_replace():
    base = changed(method={"grid": []}).replace("method:\n  grid: []\n", "")
    cells = "method:\n  grid:\n    - &l {name: lora, lr: 1e-4, rank: 4}\n    - {<<: *l, rank: 8}\n"
    assert [(t.method.rank, t.method.lr) for t in parsed(base + cells).trials] == [(4, 1e-4), (8, 1e-4)]


def test_distributions_inside_lists_are_drawn():
    method = {"name": "lora", "betas": [0.9, {"uniform": [0.9, 0.99]}]}
    text = changed(method=method, search=SEARCH)
    loaded = parsed(text)
    drawn = [trial.method.betas for trial in loaded.trials]
    assert len(set(drawn)) == 4
    assert all(first == 0.9 and 0.9 <= second <= 0.99 for first, second in drawn)
    assert space.fill(loaded.templates[0], {"method.betas.1": 0.95}, "x").method.betas == (0.9, 0.95)


def test_cells_that_are_the_same_trial_are_said():
    method = {"grid": [{"name": "lora", "lr": 1e-4, "alpha": 16.0}, {"name": "lora", "lr": 0.0001, "alpha": 16}]}
    loaded = parsed(changed(method=method))
    assert len(loaded.trials) == 1
    assert loaded.notes == (
        f"2 cells or draws of the search space are the same trial ({loaded.trials[0].method.name}): it runs once",
    )
    assert parsed(BASE).notes == ()


def test_a_grid_or_search_that_is_too_large_is_refused_before_it_is_expanded():
    wide = {"grid": list(range(1, 200))}
    many = {"name": "lora", "rank": wide, "alpha": wide, "lr": wide, "weight_decay": wide}
    assert "cells, more than 10,000" in refused(changed(method=many))[0]
    drawn = {"name": "lora", "lr": {"uniform": [0.1, 0.2]}}
    assert "search.samples: makes 1,000,000,000 trials" in refused(changed(method=drawn, search={"samples": 10**9}))[0]


def test_overrides_reach_entries_of_lists():
    loaded = parsed(BASE, ["data.sources.0.train=7"])
    assert loaded.trials[0].data.sources[0].train == 7
    for key in ("data.sources.1.train", "data.sources.-1.train", "data.sources.first.train"):
        (line,) = refused(BASE, [f"{key}=7"])
        assert "data.sources is a list with 1 entries; name one by its place from 0 to 0" in line
    assert "train.steps is not a mapping" in refused(BASE, ["train.steps.a=7"])[0]
