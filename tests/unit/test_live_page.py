"""The live page of a sweep: what it is told, who may read it, and what a browser draws of it."""

import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

import pytest
from tracked import result_of, spec_of

from ray_peft import cli
from ray_peft.live.server import LiveServer
from ray_peft.live.state import MOST_POINTS, State
from ray_peft.metrics.scores import Scores
from ray_peft.store import progress
from ray_peft.store.ledger import Ledger, SweepRecord
from ray_peft.trial.live import LIVE_FILE
from ray_peft.trial.result import Provenance, Usage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def sweep(tmp_path):
    """Two GPUs: on one a trial has ended and one runs after a gap of 60 s, on the other one trial waits for nobody."""
    specs = [spec_of(seed) for seed in range(3)]
    ledger = Ledger(tmp_path / "sweep")
    ledger.folder.mkdir()
    ledger.write_record(SweepRecord("<b>names</b>", "", planned=[spec.trial_id for spec in specs]))
    now = time.time()

    def moment(ago_s):
        return datetime.fromtimestamp(now - ago_s, UTC).isoformat()

    where = Provenance(hostname="box", gpu="0", started_at=moment(300), ended_at=moment(160))
    ledger.add(
        result_of(
            specs[0],
            provenance=where,
            usage=Usage(peak_reserved_gib=5.5, wall_time_s=140),
            predicted={"peak_reserved_gib": 6.25},
            scores=Scores(eval_loss=1.5),
        )  # fmt: skip
    )
    running = ledger.trial_folder(specs[1].trial_id)
    running.mkdir(parents=True)
    live = {
        "trial_id": specs[1].trial_id, "method": "lora", "device": "cuda:0", "gpu": "0", "host": "box", "at": now,
        "began": now - 100, "phase": "train", "step": 500, "steps": 1000, "left_s": 100.0, "tokens_per_s": 640.0,
        "memory_gib": 4.0, "predicted_gib": 4.5, "room_gib": 40.0, "metrics": {"train_loss": 2.0},
    }  # fmt: skip
    (running / LIVE_FILE).write_text(json.dumps(live))
    points = [{"step": step, "time_s": step / 5, "train_loss": 4 - step / 250} for step in range(1, 501)]
    lines = [*points, {"step": 500, "time_s": 100.0, "eval_loss": 2.25}, {"step": 500, "train_loss": "NaN"}]
    (running / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ledger, specs


def test_the_state_has_losses_memory_and_a_timeline_with_its_gaps(sweep):
    ledger, specs = sweep
    with progress.driving(ledger.folder):
        state = State(ledger.folder)
        plain = state.plain()
        with (ledger.trial_folder(specs[1].trial_id) / "metrics.jsonl").open("a") as file:
            file.write('{"step": 501, "time_s": 100.2, "eval_loss": 2.0}\n{"step": 502, "ev')
        later = state.plain()
    ended, running, waiting = plain["trials"]
    assert (ended["memory_gib"], ended["predicted_gib"]) == (5.5, 6.25)
    assert (running["memory_gib"], running["predicted_gib"], running["state"]) == (4.0, 4.5, "train")
    assert waiting["state"] == "waiting"
    assert MOST_POINTS / 2 < len(running["train_loss"]) <= MOST_POINTS
    assert running["train_loss"][-1] == (500, 2.0)  # the newest point is never left out
    assert running["eval_loss"] == ((500, 2.25),)
    assert later["trials"][1]["eval_loss"] == ((500, 2.25), (501, 2.0))
    (lane,) = plain["lanes"]
    assert lane["name"] == "box GPU 0"
    assert [(span["trial"], span["state"]) for span in lane["spans"]] == [
        (specs[0].trial_id, "finished"), (specs[1].trial_id, "train")
    ]  # fmt: skip
    assert [round(edge) for gap in lane["gaps"] for edge in gap] == [140, 200]
    assert round(plain["end_s"]) == 300


def test_trials_that_share_a_gpu_have_a_lane_each(sweep):
    ledger, specs = sweep
    folder = ledger.trial_folder(specs[2].trial_id)
    folder.mkdir()
    live = json.loads((ledger.trial_folder(specs[1].trial_id) / LIVE_FILE).read_text())
    (folder / LIVE_FILE).write_text(json.dumps(live | {"trial_id": specs[2].trial_id}))
    assert [lane["name"] for lane in State(ledger.folder).plain()["lanes"]] == [
        "box GPU 0, place 1", "box GPU 0, place 2"
    ]  # fmt: skip


def test_the_page_is_for_those_who_know_its_address_and_a_browser_draws_it(sweep, tmp_path):
    ledger, specs = sweep
    with progress.driving(ledger.folder), LiveServer(ledger.folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert server.address.startswith("http://127.0.0.1:")
            state = json.loads(urllib.request.urlopen(f"{server.address}state.json").read())
            assert len(state["trials"]) == 3
            for wrong in ("/", "/state.json", "/other/"):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}{wrong}")
            if CHROMIUM:
                drawn = browse(server.address, tmp_path / "profile")
                assert all(spec.trial_id in drawn for spec in specs)
                assert "the sweep runs: 3 trials, 1 running, 1 finished, 0 ended otherwise, 1 waiting" in drawn
                assert "&lt;b&gt;names&lt;/b&gt;" in drawn  # no markup of a name becomes the page's own
                assert "idle for 60 s" in drawn
                assert "<polyline" in drawn
        finally:
            server.shutdown()


def browse(url, profile):
    """What Chromium makes of a page."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=3000",
        "--dump-dom", url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--live", "--host", "0.0.0.0"], "--live listens on this machine alone"),
        (["--live", "nowhere"], "nowhere: holds no sweep"),
        (["--live"], "holds no sweep yet"),
        (["somewhere"], "for a page of one that runs, add --live"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(tmp_path))
    assert cli.main(["ui", *arguments]) == 2
    assert words in capsys.readouterr().err
