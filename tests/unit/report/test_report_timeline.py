"""When each trial ran: lanes, gaps, rows of earlier versions, stops of the sweep."""

import pytest
from answered import trial

from ray_peft.report.table import rows
from ray_peft.report.timeline import lanes
from ray_peft.report.timeline_plot import timeline
from ray_peft.trial.provenance import gpu_number
from ray_peft.trial.result import Provenance, Usage

START = "2026-01-01T00:00:{:02d}+00:00"


def ran(method, start, end=None, *, gpu=None, seconds=0.0, status="finished"):
    ended = START.format(end) if end is not None else ""
    place = Provenance(hostname="h", gpu=gpu, started_at=START.format(start), ended_at=ended)
    return trial(method, provenance=place, status=status).model_copy(
        update={"usage": Usage(wall_time_s=seconds, peak_allocated_gib=1.0)}
    )


def spans(found):
    return {
        lane.name: [(span.trial.result.spec.method.name, span.start_s, span.end_s) for span in lane.spans]
        for lane in found
    }


def test_each_gpu_has_a_lane_and_what_is_between_its_trials_is_a_gap():
    gpu_lanes = lanes(rows([ran("lora", 0, 10, gpu="0"), ran("full", 14, 20, gpu="0"), ran("qlora", 5, 30, gpu="1")]))
    assert spans(gpu_lanes) == {"h GPU 0": [("lora", 0, 10), ("full", 14, 20)], "h GPU 1": [("qlora", 5, 30)]}
    first, second = gpu_lanes
    assert (first.busy_s, first.gaps(30.0)) == (16, [(10, 14), (20, 30)])
    assert second.gaps(30.0) == [(0, 5)]


def test_trials_that_share_a_gpu_have_places_and_old_rows_end_when_their_seconds_are_over():
    gpu_lanes = lanes(rows([ran("lora", 0, seconds=20.0), ran("full", 5, seconds=5.0), ran("qlora", 12, seconds=9.5)]))
    assert spans(gpu_lanes) == {
        "h GPU, place 1": [("lora", 0, 20.0)],
        "h GPU, place 2": [("full", 5, 10.0), ("qlora", 12, 21.5)],
    }


def test_the_time_in_which_the_sweep_was_stopped_takes_no_time():
    first = ran("lora", 0, 10, gpu="0")
    later = ran("full", 0, 30, gpu="0")
    moved = {"started_at": "2026-01-02T00:00:00+00:00", "ended_at": "2026-01-02T00:00:30+00:00"}
    later = later.model_copy(update={"provenance": later.provenance.model_copy(update=moved)})
    assert spans(lanes(rows([first, later]))) == {"h GPU 0": [("lora", 0, 10), ("full", 10, 40)]}


def test_rows_without_a_start_have_no_timeline_and_a_failed_trial_is_marked():
    assert lanes(rows([trial("lora")])) == []
    assert timeline([]) == []
    (figure,) = timeline(lanes(rows([ran("lora", 0, 10), ran("full", 11, 20, status="failed")])))
    assert "<!-- full -->" in figure.svg


@pytest.mark.parametrize(
    ("visible", "device", "number"),
    [
        (None, "cpu", None),
        (None, "cuda:1", "1"),
        ("3,5", "cuda:1", "5"),
        ("GPU-ab", "cuda:0", "GPU-ab"),
        ("", "cuda", "0"),
    ],
)
def test_a_gpu_is_named_as_the_machine_counts_it(monkeypatch, visible, device, number):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_number(device) == number
