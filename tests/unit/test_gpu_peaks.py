"""The peak of a replayed graph is what is there plus what the graph was seen to need."""

from __future__ import annotations

from ray_peft.engine import gpu_peaks


def test_a_replay_counts_beside_what_has_come_since(monkeypatch):
    now, most = 100, 100
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: now)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: most)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: 900)

    def restarted():
        nonlocal most
        most = now

    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", restarted)
    gpu_peaks.restart()
    most = 700
    with gpu_peaks.recording() as recording:
        most = 350  # restarted, then grown by the recording
    assert recording.bytes == 250
    assert gpu_peaks.allocated() == 700, "an earlier peak is not forgotten"
    now = 400  # an optimizer's state
    recording.replayed()
    assert gpu_peaks.allocated() == 700
    now = 500
    recording.replayed()
    assert gpu_peaks.allocated() == 750
    now = 600
    recording.replayed()  # the third
    assert gpu_peaks.allocated() == 750
    recording.replayed()
    assert gpu_peaks.allocated() == 850
    gpu_peaks.restart()
    assert (gpu_peaks.allocated(), gpu_peaks.reserved()) == (600, 900)
