"""The comparison as values, against numbers worked out by hand."""

import pytest

from ray_peft.metrics.scores import Scores
from ray_peft.report.digits import fixed, percent, size, speed, spread_text
from ray_peft.report.table import Score, rows, seed_groups
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import Provenance, TrialResult, Usage


def trial(method, *, model="org/tiny", seed=42, status="finished", error=None, data_seed=1, train=None, **more):
    scores = Scores(**{key: more.pop(key) for key in ("eval_loss", "bleu4", "rouge_l") if key in more})
    spec = TrialSpec.from_plain(
        {
            "model": {"name": model},
            "data": {"sources": [{"recipe": "alpaca", "path": "a.jsonl", "train": 9, "test": 3}], "seed": data_seed},
            "method": {"name": method},
            "train": {"steps": 10} | (train or {}),
            "evaluation": more.pop("evaluation", {}),
            "seed": seed,
        }
    )
    return TrialResult(trial_id=spec.trial_id, status=status, spec=spec, scores=scores, error=error, **more)


def by_label(results):
    return {row.label: row for row in rows(results)}


def test_differences_are_to_the_base():
    found = by_label(
        [
            trial("none", eval_loss=2.5, bleu4=0.0582, rouge_l=0.1632),
            trial("qlora", eval_loss=2.0, bleu4=0.1112, rouge_l=0.2326),
        ]
    )
    # Study 2, table of scores: +0.0530 (+91.07 %) and +0.0694 (+42.52 %).
    assert found["qlora"].bleu4.difference == pytest.approx(0.0530)
    assert found["qlora"].bleu4.relative == pytest.approx(0.9107, abs=5e-5)
    assert found["qlora"].rouge_l.difference == pytest.approx(0.0694)
    assert found["qlora"].rouge_l.relative == pytest.approx(0.4252, abs=5e-5)
    assert found["qlora"].eval_loss.difference == -0.5
    assert found["none"].eval_loss == Score(value=2.5)
    assert found["none"].eval_loss.difference is None


def test_order_is_that_of_the_registry_then_as_given():
    given = [trial("galore"), trial("lora", seed=2), trial("qlora"), trial("lora", seed=1), trial("none")]
    assert [row.trial_id for row in rows(given)] == [given[i].trial_id for i in (4, 1, 3, 2, 0)]


@pytest.mark.parametrize(
    "base",
    [
        trial("none", model="org/other", eval_loss=1.0),
        trial("none", data_seed=2, eval_loss=1.0),
        trial("none", status="failed", eval_loss=1.0),
        trial("none", eval_loss=1.0, evaluation={"rows": 2}),
        trial("none", eval_loss=1.0, provenance=Provenance(data_key="other")),
        trial("full", eval_loss=1.0),
    ],
    ids=["model", "data", "failed", "scored rows", "changed files", "no base"],
)
def test_a_base_of_another_kind_is_no_base(base):
    lora_row = next(r for r in rows([base, lora()]) if r.result.spec.method.name == "lora")
    assert lora_row.base is None
    assert lora_row.eval_loss.difference is None


def lora():
    return trial("lora", eval_loss=2.0, provenance=Provenance(data_key="key"))


def test_of_several_bases_the_one_of_the_same_seed_counts():
    results = [trial("none", seed=seed, eval_loss=float(seed)) for seed in (1, 2, 3)]
    row = rows([*results, trial("lora", seed=2, eval_loss=1.5)])[-1]
    assert row.base == results[1]
    assert row.eval_loss.difference == -0.5


def test_each_model_has_its_own_base():
    results = [trial(m, model=f"org/{n}", eval_loss=v) for n, m, v in [("a", "none", 3.0), ("b", "none", 5.0)]]
    results += [trial("lora", model="org/a", eval_loss=2.0), trial("lora", model="org/b", eval_loss=2.0)]
    found = by_label(results)
    assert found["lora model=a"].eval_loss.difference == -1.0
    assert found["lora model=b"].eval_loss.difference == -3.0


def test_failed_trials_are_rows_with_their_first_line():
    failed = trial("full", status="out_of_memory", error="\n  CUDA out of memory\nTraceback ...")
    silent = trial("galore", status="cancelled")
    found = by_label([failed, silent, trial("lora")])
    assert list(found) == ["full", "lora", "galore"]
    assert found["full"].error_line == "CUDA out of memory"
    assert found["galore"].error_line == "no reason was recorded"
    assert found["lora"].error_line is None


def test_peak_memory_is_the_gpus_or_the_process():
    gpu = trial("lora", usage=Usage(peak_allocated_gib=3.0, peak_reserved_gib=3.5, peak_rss_gib=9.0))
    cpu = trial("full", usage=Usage(peak_rss_gib=1.25))
    found = by_label([gpu, cpu])
    assert (found["lora"].on_gpu, found["lora"].peak_memory_gib) == (True, 3.0)
    assert (found["full"].on_gpu, found["full"].peak_memory_gib) == (False, 1.25)


def test_trainable_share():
    found = by_label([trial("lora", trainable_parameters=1, total_parameters=8), trial("full")])
    assert found["lora"].trainable_share == 0.125
    assert found["full"].trainable_share is None


def test_of_a_trial_given_twice_the_later_counts():
    found = rows([trial("lora", status="failed"), trial("none"), trial("lora", eval_loss=1.0)])
    assert [(row.label, row.status) for row in found] == [("none", "finished"), ("lora", "finished")]


def test_seeds_are_put_together():
    results = [trial("none", eval_loss=4.0, seed=1)]
    results += [trial("lora", seed=s, eval_loss=v, bleu4=v / 10) for s, v in [(1, 1.0), (2, 2.0), (3, 6.0)]]
    results += [trial("lora", seed=4, status="failed")]
    base, group = seed_groups(rows(results))
    assert (base.label, len(base.rows)) == ("none", 1)
    assert (group.label, len(group.rows), len(group.finished)) == ("lora", 4, 3)
    loss = group.spread(lambda row: row.eval_loss.value)
    assert (loss.mean, loss.low, loss.high, loss.seeds) == (3.0, 1.0, 6.0, 3)
    # 1 - 4, 2 - 4 and 6 - 4.
    difference = group.spread(lambda row: row.eval_loss.difference)
    assert (difference.mean, difference.low, difference.high) == (-1.0, -3.0, 2.0)
    assert group.spread(lambda row: row.rouge_l.value) is None
    assert spread_text(loss, 2) == "3.00 (1.00 to 6.00)"
    assert spread_text(base.spread(lambda row: row.eval_loss.value), 2) == "4.00"


def test_a_phase_that_a_failed_trial_did_not_reach_has_no_time():
    failed, base = trial("lora", status="failed", usage=Usage(load_s=2.0)), trial("none")
    found = by_label([failed, base])
    assert (found["lora"].seconds("load_s"), found["lora"].seconds("train_s")) == (2.0, None)
    assert found["none"].seconds("train_s") == 0.0


def test_group_labels_keep_other_settings_and_drop_the_seed():
    results = [trial("lora", seed=s, train={"steps": n}) for s in (1, 2) for n in (5, 10)]
    assert [group.label for group in seed_groups(rows(results))] == ["lora steps=5", "lora steps=10"]


def test_one_seed_each_makes_no_groups():
    assert seed_groups(rows([trial("lora"), trial("none")])) == []


def test_no_trials():
    assert rows([]) == []
    assert seed_groups([]) == []


def test_one_trial_alone():
    (row,) = rows([trial("lora", eval_loss=1.0)])
    assert (row.label, row.base) == ("lora", None)


def test_a_base_of_zero_has_no_relative_difference():
    score = Score(value=0.1, base=0.0)
    assert (score.difference, score.relative) == (0.1, None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (fixed(None, 4), "-"),
        (fixed(2.10449, 3), "2.104"),
        (fixed(0.05, 4, signed=True), "+0.0500"),
        (fixed(-0.00001, 4), "0.0000"),
        (fixed(-0.00001, 4, signed=True), "+0.0000"),
        (fixed(12345678.0, 3), "1.23e+07"),
        (fixed(float("nan"), 3), "nan"),
        (fixed(float("inf"), 3), "inf"),
        (percent(0.0196), "1.96 %"),
        (percent(None), "-"),
        (size(0), "-"),
        (size(41_600_000), "39.67 MiB"),
        (size(3 * 2**30), "3.00 GiB"),
        (speed(99.5), "99.50"),
        (speed(1234.56), "1235"),
        (speed(None), "-"),
    ],
)
def test_digits(text, wanted):
    assert text == wanted
