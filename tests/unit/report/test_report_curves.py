"""metrics.jsonl, losses at chosen steps, bytes by dtype."""

import logging

from ray_peft.report.curves import Curve, curve, finite, mean_points, read_curve, thinned
from ray_peft.report.dynamics import default_steps, losses_at
from ray_peft.report.storage import saved_bytes


def test_a_log_becomes_curves(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 10, "time_s": 1.0, "train_loss": 3.0, "lr": 1e-4}\n'
        '{"step": 20, "train_loss": 2.5}\n'
        '{"step": 20, "ti{"step": 20, "train_loss": 2.25}\n'  # a killed writer's line, then the trial went on
        '{"step": 30, "train_loss": 2.4}\n'
        '{"step": 30, "boundary_loss.after_stage_1": 2.4}\n{"step": 30, "boundary_loss.after_merge_1": 2.5}\n'
        '{"step": 30, "train_loss": NaN}\n[1]\n'
        '{"step": 30, "eval_loss": 2, "bleu4": 0.1}\n'
    )
    with caplog.at_level(logging.WARNING):
        found = read_curve(path)
    assert [record.getMessage()[-50:].split(": ")[-1] for record in caplog.records] == [
        "line 3 is no logged step and was passed over",
        "line 8 is no logged step and was passed over",
    ]
    assert found.train[:2] == ((10, 3.0), (20, 2.5))
    assert finite(found.train) == ((10, 3.0), (20, 2.5))
    assert found.held_out == ((30, 2.0),)
    assert found.boundaries == (30,)


def test_no_log_is_an_empty_curve(tmp_path):
    assert read_curve(tmp_path / "none") == Curve()


def test_a_step_logged_twice_counts_once():
    assert curve([{"step": 1, "train_loss": 2.0}, {"step": 1, "train_loss": 1.0}]).train == ((1, 1.0),)


def test_means_are_over_shared_steps_and_long_curves_are_thinned():
    assert mean_points([((1, 1.0), (2, 2.0)), ((2, 4.0), (3, 9.0))]) == ((2, 3.0),)
    assert mean_points([]) == ()
    points = tuple((step, 1.0) for step in range(1000))
    found = thinned(points, 10)
    assert len(found) == 10
    assert (found[0], found[-1]) == (points[0], points[-1])


def test_default_steps_are_spread_and_end_with_the_last():
    logged = [tuple((step, 1.0) for step in range(10, 3711, 10))]
    assert default_steps(logged) == (620, 1240, 1850, 2470, 3090, 3710)
    assert default_steps([((5, 1.0), (7, 1.0))]) == (5, 7)
    assert default_steps([]) == ()


def test_losses_at_steps_that_were_not_logged():
    points = ((50, 1.57), (1000, 0.84), (3710, 0.276))
    # 3714 is the last step, logged with the ten before 3710; 525 lies in the middle and takes the earlier.
    assert losses_at(points, (50, 525, 1000, 3714, 4000), steps=3714) == [
        (50, 1.57),
        (50, 1.57),
        (1000, 0.84),
        (3710, 0.276),
        None,
    ]


def test_bytes_by_dtype():
    assert [saved_bytes(13_045_760, dtype) for dtype in ("float32", "bfloat16", "float16")] == [
        52_183_040,
        26_091_520,
        26_091_520,
    ]
