"""Console text: exact lines, and no character that any console could refuse."""

import pytest

from ray_peft.metrics.scores import Scores
from ray_peft.report.plain import WIDTH, ascii_line, console_table, trial_line
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import TrialResult, Usage


def trial(method, *, trial_id=None, model="org/tiny", seed=42, status="finished", error=None, scores=(), **usage):
    plain = {
        "model": {"name": model},
        "data": {"sources": [{"recipe": "alpaca", "path": "a.jsonl", "train": 9, "test": 3}]},
        "method": method if isinstance(method, dict) else {"name": method},
        "train": {"steps": 10},
        "seed": seed,
    }
    spec = TrialSpec.from_plain(plain)
    return TrialResult(
        trial_id=trial_id or spec.trial_id,
        status=status,
        spec=spec,
        scores=Scores(**dict(zip(("eval_loss", "bleu4", "rouge_l"), scores, strict=False))),
        usage=Usage(**usage),
        error=error,
    )


def test_trial_line_of_a_finished_trial():
    result = trial(
        "lora",
        trial_id="lora-1a2b3c4d",
        scores=(2.1041, 0.03124, 0.21537),
        wall_time_s=61.34,
        peak_allocated_gib=3.211,
        peak_rss_gib=7.0,
    )
    assert trial_line(result, 2, 4) == (
        "[2/4] lora-1a2b3c4d finished in 61.3 s: eval loss 2.104, BLEU-4 0.0312, ROUGE-L 0.2154, peak 3.21 GiB"
    )


def test_trial_line_leaves_out_what_was_not_measured():
    assert trial_line(trial("lora", trial_id="lora-1"), 1, 1) == "[1/1] lora-1 finished in 0.0 s"
    loss_only = trial("lora", trial_id="lora-1", scores=(2.0,), peak_rss_gib=1.0)
    assert trial_line(loss_only, 1, 1) == "[1/1] lora-1 finished in 0.0 s: eval loss 2.000, peak 1.00 GiB"


def test_trial_line_says_that_a_trial_was_resumed():
    resumed = trial("lora", trial_id="lora-1", scores=(2.0,)).model_copy(update={"resumed_from_step": 4})
    assert trial_line(resumed, 1, 1) == "[1/1] lora-1 finished in 0.0 s: eval loss 2.000, resumed from step 4"


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        ("failed", "[1/2] t failed after 3.0 s: loss is nan at step 7 \\u2192 stop"),
        ("out_of_memory", "[1/2] t ran out of memory after 3.0 s: loss is nan at step 7 \\u2192 stop"),
        ("cancelled", "[1/2] t was cancelled after 3.0 s: loss is nan at step 7 \\u2192 stop"),
    ],
)
def test_trial_line_gives_the_reason(status, wanted):
    error = "loss is nan at step 7 → stop\nTraceback"
    assert trial_line(trial("lora", trial_id="t", status=status, error=error, wall_time_s=3.0), 1, 2) == wanted


def test_console_table_exactly():
    results = [
        trial("lora", scores=(2.0, 0.1112, 0.2326), peak_allocated_gib=1.51, train_s=61.34, tokens_per_s=1234.5),
        trial("none", scores=(2.5, 0.0582, 0.1632), peak_allocated_gib=0.5, train_s=0.0),
        trial("full", status="out_of_memory", error="CUDA out of memory\nmore"),
    ]
    assert console_table(results).splitlines() == [
        "trial  status         eval loss  vs base  BLEU-4  vs base  ROUGE-L  vs base  GPU GiB  train s  tokens/s",
        "-----  -------------  ---------  -------  ------  -------  -------  -------  -------  -------  --------",
        "none   finished           2.500        -  0.0582        -   0.1632        -     0.50      0.0         -",
        "full   out of memory          -        -       -        -        -        -        -        -         -",
        "lora   finished           2.000   -0.500  0.1112  +0.0530   0.2326  +0.0694     1.51     61.3      1234",
        "",
        "full: out of memory: CUDA out of memory",
    ]


def test_columns_without_values_are_left_out():
    table = console_table([trial("lora", scores=(2.0,), peak_rss_gib=1.25, train_s=5.0)])
    assert table.splitlines()[0].split() == ["trial", "status", "eval", "loss", "RSS", "GiB", "train", "s"]
    assert table.splitlines()[2].split() == ["lora", "finished", "2.000", "1.25", "5.0"]


def test_seeds_have_their_own_table():
    results = [trial("lora", seed=s, scores=(v, v / 10, v / 4)) for s, v in [(1, 1.0), (2, 2.0)]]
    results.append(trial("lora", seed=3, status="failed", error="no"))
    lines = console_table(results).splitlines()
    assert lines[-5].split("  ")[0] == "mean (min to max)"
    assert "1.500 (1.000 to 2.000)  0.1500 (0.1000 to 0.2000)  0.3750 (0.2500 to 0.5000)" in lines[-3]
    assert lines[-3].split()[:2] == ["lora", "2/3"]
    assert lines[-1] == "lora seed=3: failed: no"


def test_no_trials():
    assert console_table([]) == "No trial has a result."


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "cp437", "cp1252"])
def test_any_console_can_print_it(encoding):
    results = [
        trial(
            {"name": "lora", "rank": rank}, model=model, seed=seed, scores=(1e9, 0.5, 0.5), status=status, error=error
        )
        for rank in (8, 16)
        for model in ("/data/模型 é/" + "x" * 70, "/data/\N{SNOWMAN}\x1b[31m")
        for seed, status, error in [(1, "finished", None), (2, "failed", "\x1b[2J ∞ 错误\x00\r" * 20)]
    ]
    text = console_table(results)
    lines = text.splitlines() + [trial_line(result, 1, 8) for result in results]
    for line in lines:
        line.encode(encoding)
        assert line.isascii()
        assert not line or line.isprintable()
    assert max(map(len, text.splitlines())) <= WIDTH


def test_long_labels_go_on_below_and_nothing_is_cut():
    results = [
        trial("lora", model=f"org/{letter * 150}", status=status, error="no", scores=(2.0, 0.1, 0.2), peak_rss_gib=1.0)
        for letter, status in [("q", "finished"), ("z", "out_of_memory")]
    ]
    table = console_table([*results, trial("none", model=f"org/{'q' * 150}", scores=(2.5, 0.05, 0.1))])
    assert max(map(len, table.splitlines())) <= WIDTH
    assert table.count("z") == 300  # in the table and with the reason
    assert table.count("q") == 300


def test_ascii_line_escapes_what_is_not_printable():
    assert ascii_line("a\nb\té\udc80~") == "a\\nb\\t\\xe9\\udc80~"
