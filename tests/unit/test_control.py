"""Requests to a running sweep: who is answered, and what a pause is; end to end in end_to_end/test_control.py."""

import json
import os
import threading

import pytest
from tracked import spec_of

from ray_peft.errors import DataError, SearchSpaceError
from ray_peft.schedule import control
from ray_peft.schedule.decide import Demand, Run
from ray_peft.schedule.handout import resolver, unlisted
from ray_peft.schedule.running import still_to_run
from ray_peft.schedule.stop import Stop
from ray_peft.space import read
from ray_peft.spec import TrialSpec
from ray_peft.store import requests
from ray_peft.store.progress import driving
from ray_peft.store.requests import Answer, ask, open_channel, serve


def test_a_pause_gives_trials_more_time_than_a_stop_and_a_stop_overrides_it(tmp_path):
    stop = Stop(tmp_path / "stop")
    stop.pause()
    assert (stop.asked, stop.pauses, stop.over({"a"}), stop.over(set())) == (True, True, False, True)
    assert (tmp_path / "stop").is_file()  # by which workers know
    stop.ask()
    assert (stop.asked, stop.pauses) == (True, False)


def test_a_stop_whose_file_cannot_be_written_is_asked_for_all_the_same(tmp_path):
    stop = Stop(tmp_path / "not there" / "stop")
    stop.ask()
    assert stop.asked
    assert not stop.file.exists()


@pytest.fixture
def answered(tmp_path):
    """A sweep's folder whose driver answers every request with its action, and refuses "no"."""

    def answer(request):
        if request["action"] == "no":
            raise DataError("not this one")
        if request["action"] == "broken":
            raise RuntimeError("a bug")
        return Answer(f"did {request['action']} {request.get('x')}", trials=("a",))

    open_channel(tmp_path)
    with driving(tmp_path):
        ended = threading.Event()

        def serving():
            while not ended.wait(0.02):
                serve(tmp_path, answer)

        thread = threading.Thread(target=serving)
        thread.start()
        yield tmp_path
        ended.set()
        thread.join()


def test_a_request_is_answered_or_refused_and_leaves_nothing(answered):
    assert ask(answered, "pause", {"x": 1}) == Answer("did pause 1", trials=("a",))
    with pytest.raises(DataError, match="^not this one$"):
        ask(answered, "no", {})
    with pytest.raises(DataError, match="RuntimeError: a bug"):  # and the driver goes on
        ask(answered, "broken", {})
    (answered / "control" / "1.request").write_text("no JSON")
    assert ask(answered, "resume", {}).text == "did resume None"
    assert list((answered / "control").iterdir()) == []


def test_without_a_driver_there_is_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="holds no sweep"):
        ask(tmp_path, "pause", {})
    open_channel(tmp_path)
    with driving(tmp_path):
        monkeypatch.setattr(requests, "PATIENCE_S", 0.2)
        with pytest.raises(DataError, match="has not answered"):
            ask(tmp_path, "pause", {})
        assert list((tmp_path / "control").iterdir()) == []  # it is not done later either
    with pytest.raises(DataError, match="the sweep does not run"):
        ask(tmp_path, "pause", {})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no owners of this kind")
def test_requests_in_a_folder_of_somebody_else_are_not_taken(tmp_path, monkeypatch):
    open_channel(tmp_path)
    (tmp_path / "control" / "1.request").write_text(json.dumps({"action": "pause"}))
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    serve(tmp_path, lambda request: pytest.fail("taken"))
    assert (tmp_path / "control" / "1.request").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.undo()
    (tmp_path / "control" / "1.request").unlink()
    (tmp_path / "control").rmdir()
    (tmp_path / "control").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "1.request").write_text(json.dumps({"action": "pause"}))
    open_channel(tmp_path)
    serve(tmp_path, lambda request: pytest.fail("taken"))
    assert (tmp_path / "elsewhere" / "1.request").exists()


def test_added_trials_are_remembered_with_their_notes(tmp_path):
    control.keep(tmp_path, [spec_of(1)], "a clone")
    control.keep(tmp_path, [spec_of(2)], "from more.yaml")
    remembered = list(control.added(tmp_path))
    assert [spec for spec, _ in remembered] == [spec_of(1), spec_of(2)]
    assert remembered[0][1] == f"added: {spec_of(1).trial_id}: a clone"
    (tmp_path / "added.json").write_text('[{"spec": 1}]')
    with pytest.raises(SearchSpaceError, match="is no list of added trials"):
        list(control.added(tmp_path))


def test_a_trial_that_the_user_wants_again_runs_once():
    first, second, third, other = (spec_of(seed) for seed in range(4))
    small, large = Demand(1, 1, 0.25), Demand(1, 1, 1.0)
    pack = Run((first, second, third), small)
    late = {spec.trial_id: Run((spec,), large) for spec in (second, other)}
    assert still_to_run([pack], late, {first.trial_id}) == [
        Run((third,), small),
        Run((second,), large),
        late[other.trial_id],
    ]
    assert still_to_run([Run((second,), small)], late, {other.trial_id}) == [late[second.trial_id]]
    assert still_to_run([pack], {}, {first.trial_id, second.trial_id, third.trial_id}) == []


def test_a_run_that_is_in_no_list_keeps_the_members_of_its_ensemble():
    members = [{"method": {"name": "lora", "rank": rank}} for rank in (2, 4)]
    plain = spec_of(1).plain() | {"method": {"name": "ensemble", "members": members}}
    plain["data"]["sources"][0] |= {"validation": 2}
    settled = TrialSpec.from_plain(plain).under("ensemble-1", ["lora-1", "lora-2"])
    demand = Demand(1, 2, 0.0)
    task = resolver([])(unlisted(Run((settled,), demand)))
    assert (task.spec.trial_id, task.demand) == ("ensemble-1", demand)
    assert [member.trial_id for member in task.spec.members()] == ["lora-1", "lora-2"]


def test_settings_of_a_clone_are_checked_like_those_of_a_file():
    trial = spec_of(1)
    assert read.changed(trial, ["method.lr=1e-4", "train.steps=5"], "clone of a").method.lr == 1e-4
    with pytest.raises(SearchSpaceError, match="clone of a: method.lora.rnak: unknown key, did you mean rank?"):
        read.changed(trial, ["method.rnak=4"], "clone of a")
