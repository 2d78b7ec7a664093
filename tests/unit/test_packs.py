"""Which trials train together, in which order Tune gets them, and how their reports travel: values and files alone."""

import threading
from types import SimpleNamespace

import pytest
import tiny

from ray_peft.schedule.decide import Card, Node, Run, decide
from ray_peft.schedule.decide import Pack as Together
from ray_peft.schedule.events import Events
from ray_peft.schedule.handout import resolver, seated, tasks_of
from ray_peft.schedule.joining import PackTrials
from ray_peft.schedule.order import Order
from ray_peft.schedule.packs import MOST_MEMBERS, may_join, packs, proposed_at_a_time
from ray_peft.schedule.relay import Relay
from ray_peft.schedule.stop import Stop
from ray_peft.schedule.worker import ROW, WANTS
from ray_peft.spec import TrialSpec
from ray_peft.spec.identity import settings
from ray_peft.tasks.base import PackForecast
from ray_peft.tasks.llm_sft.forecast import gain, overhead
from ray_peft.trial.result import TrialResult
from ray_peft.vram import Prediction
from ray_peft.vram.cards import ANY
from ray_peft.vram.fit import Size

GIB = 2**30
LAPTOP = [Node(cpus=2, gpus=0)]


def gpus(count):
    return [Node(cpus=16, gpus=count, gpu_memory_gib=12.0)]


def lora(rank=4, pack="auto", **changes):
    method = changes.pop("method", {"name": "lora", "rank": rank})
    plain = tiny.plain_spec("m/m", "d/d", method, train__pack=pack, **changes)
    plain["resources"] = changes.get("resources", {})
    return TrialSpec.from_plain(plain)


def prediction(gib):
    return Prediction({}, int(gib * GIB), int(gib * GIB), int(gib * GIB))


def forecast(trials):
    """1 GiB, and 1 GiB a trial; half of a trial's time is a pass's own."""
    return PackForecast(prediction(1 + len(trials)), gain([100] * len(trials), [1] * len(trials), 100))


def formed(trials, nodes, told=forecast, **more):
    card = Card(ANY, 12.0) if nodes[0].gpus else None
    sizes = {trial.trial_id: Size(prediction(2)) for trial in trials} if card else {}
    formed_packs = packs(trials, nodes, card, sizes, told, **more)
    decision = decide(trials, nodes, sizes, packs=formed_packs)
    assert sorted(trial.trial_id for run in decision.runs for trial in run.trials) == sorted(t.trial_id for t in trials)
    return [len(pack.trials) for pack in formed_packs], decision


def ranks(count, **changes):
    return [lora(rank, **changes) for rank in range(1, count + 1)]


@pytest.mark.parametrize(
    ("trials", "nodes", "sizes"),
    [
        (ranks(8), gpus(1), [8]),
        (ranks(8), gpus(2), [4, 4]),
        (ranks(3), gpus(2), [3]),
        (ranks(15), gpus(1), [8, 7]),  # 12 GiB hold ten of them
        (ranks(8, pack=False), gpus(1), []),
        (ranks(8), LAPTOP, []),
        (ranks(8, pack=True), LAPTOP, [8]),
        (ranks(MOST_MEMBERS + 2, pack=True), LAPTOP, [9, 9]),
        (ranks(8, resources={"gpus_per_worker": 1}), gpus(1), []),  # each is to have a GPU of its own
        (ranks(8, resources={"num_workers": 2, "gpus_per_worker": 0}), gpus(1), []),
        ([*ranks(3), *ranks(3, train__precision="bf16")], gpus(1), [3, 3]),
        ([lora()], gpus(1), []),
    ],
)
def test_trials_of_one_base_form_few_packs_that_fit(trials, nodes, sizes):
    found, _ = formed(trials, nodes)
    assert sorted(found, reverse=True) == sizes


def test_trials_that_fill_the_gpu_by_themselves_stay_by_themselves():
    def full(trials):
        return PackForecast(prediction(3), gain([8 * 512] * len(trials), [1] * len(trials), 700))

    assert formed(ranks(8), gpus(1), full)[0] == []
    assert formed(ranks(8, pack=True), gpus(1), full)[0] == [8]
    assert formed(ranks(8), gpus(1), lambda trials: None)[0] == []


def test_a_pack_holds_what_all_take_and_each_keeps_what_was_chosen_for_it():
    trials = ranks(4)
    together = Together(tuple(trials), PackForecast(prediction(5), 3.0))
    sizes = {
        trial.trial_id: Size(prediction(2), {"train.micro_batch_size": place + 1}) for place, trial in enumerate(trials)
    }
    (run,) = decide(trials, gpus(1), sizes, packs=[together]).runs
    assert 5.8 / 12 < run.demand.gpus_per_worker <= 6.1 / 12
    assert (run.fits, run.gain, run.size.prediction) == (True, 3.0, prediction(5))
    assert [run.demand_of(trial).chosen["train.micro_batch_size"] for trial in trials] == [1, 2, 3, 4]


def test_trials_that_are_to_run_alone_are_in_no_pack():
    trials = ranks(3)
    assert formed(trials, gpus(1), alone={trials[0].trial_id})[0] == [2]


@pytest.mark.parametrize(("samples", "at_a_time"), [(1, 1), (3, 2), (8, 2), (20, 5), (100, 16)])
def test_a_search_learns_from_several_packs(samples, at_a_time):
    trials = ranks(samples)
    assert proposed_at_a_time(trials) == trials[:at_a_time]
    alone = [trial.changed({"train.pack": False}) for trial in trials]
    assert proposed_at_a_time(alone) == alone


def test_packing_changes_no_result():
    assert settings(lora(pack="auto")) == settings(lora(pack=False))
    assert lora(pack=True).trial_id == lora(pack=False).trial_id


def test_what_is_saved_is_counted():
    assert gain([168] * 8, [1] * 8, 700) == pytest.approx((8 * 168 + 8 * 700) / (8 * 168 + 700))
    assert gain([100, 300], [2, 1], 50) == pytest.approx((400 + 150) / (400 + 100))

    class Gemma3:
        num_hidden_layers, hidden_size, intermediate_size, vocab_size = 26, 1152, 6912, 262144

    assert overhead(Gemma3) == pytest.approx(700, rel=0.01)


def test_trials_of_a_pack_follow_once_it_has_started():
    trials = ranks(5)
    demand = decide([trials[0]], LAPTOP, {}).runs[0].demand
    order = Order([Run((trials[0],), demand), Run(tuple(trials[1:3]), demand), Run(tuple(trials[3:]), demand)])
    assert [order.next() for _ in range(4)] == [(0, None), (1, None), (2, None), None]
    assert order.left
    order.started(0)
    order.started(2)
    order.started(2)  # again, after a death
    assert [order.next() for _ in range(3)] == [(2, 0), (2, 1), None]
    order.ended(1)  # it never started
    assert not order.left


@pytest.mark.parametrize(
    ("trial", "joins"),
    [
        (lora(2), True),
        (lora(8, seed=5, train__steps=50, train__batch_size=4), True),
        (lora(16), False),  # no place is large enough
        (lora(2, method={"name": "lora", "rank": 2, "dropout": 0.1}), False),  # nor draws dropout
        (lora(2, method={"name": "lora", "rank": 2, "targets": ["q_proj"]}), False),
        (lora(2, data__max_length=128), False),
        (lora(2, pack=False), False),
        (lora(2, method={"name": "qlora", "rank": 2}), False),  # another base
        (lora(2, method={"name": "galore", "rank": 8}), False),
    ],
)
def test_who_may_take_the_place_of_another(trial, joins):
    assert may_join(trial, [lora(8), lora(4)]) is joins


def test_a_trial_moves_out_of_a_pack_that_has_not_started():
    trials = ranks(6)
    demand = decide([trials[0]], LAPTOP, {}).runs[0].demand
    order = Order([Run(tuple(trials[place : place + 2][::-1]), demand) for place in (4, 0, 2)])
    assert [order.next() for _ in range(4)] == [(0, None), (1, None), (2, None), None]
    order.started(0)
    assert [order.next() for _ in range(3)] == [(0, 0), (0, 1), None]
    assert [order.move(trials[4:]) for _ in range(2)] == [(2, 1), (2, 0)]
    assert [order.next() for _ in range(3)] == [(2, 1), (2, 0), None]
    order.started(2)  # empty, but Tune has it
    order.started(1)
    assert order.next() == (1, 0)
    assert order.move(trials[4:]) is None


def test_a_pack_is_given_trials_that_wait_or_that_a_search_proposes(tmp_path):
    trials = ranks(5)
    demand = decide([trials[0]], LAPTOP, {}).runs[0].demand
    runs = [Run((trials[2], trials[1]), demand), Run((trials[0], trials[3]), demand)]
    order, relay, told = Order(runs), Relay(tmp_path), Told()
    told.further = lambda specs: Run((trials[4],), demand)
    tasks = tasks_of(runs)
    events = Events(resolver(tasks), told, order, relay, Stop(tmp_path / "stop"), lambda: False)
    host, other = tune_trial(order), tune_trial(order)
    (tmp_path / "relay").mkdir()
    own = PackTrials(tasks, tasks[0], relay, lambda: events.result(host, {WANTS: True}))
    events.start(host)
    assert ids_of(own.first()) == [trials[2].trial_id, trials[1].trial_id]
    assert ids_of([own.further()]) == [trials[0].trial_id]  # the other one's rank is too large
    assert ids_of([own.further()]) == [trials[4].trial_id]
    assert told.events[2:] == [("begin", trials[0].trial_id), ("begin", trials[4].trial_id)]
    again = PackTrials(tasks, tasks[0], relay, lambda: None)  # its process died
    assert sorted(ids_of(again.first())) == sorted(trial.trial_id for trial in (*trials[:3], trials[4]))
    assert again.further() is None
    events.start(other)
    assert told.events[4:] == [("begin", trials[3].trial_id)]
    assert ids_of(PackTrials(tasks, tasks[1], relay, lambda: None).first()) == [trials[3].trial_id]
    assert order.unseated[0]["member"] == 0
    assert events.resolve(order.unseated[0]).spec == trials[4]
    events.error(host)
    assert told.events[-1] == ("lose_pack", [trials[place].trial_id for place in (2, 1, 0, 4)])


def test_reports_travel_to_who_follows_them_whole_and_in_order(tmp_path):
    relay, seen = Relay(tmp_path / "relay"), []
    follower = threading.Thread(target=lambda: seen.extend(relay.follow("lora-1")))
    follower.start()
    relay.open("lora-1")
    relay.put("lora-1", {"step": 1, "train_loss": 2.0})
    with (tmp_path / "relay" / "lora-1.jsonl").open("a") as file:
        file.write('{"step": 2, "train_lo')  # its process was killed
    relay.open("lora-1")
    relay.put("lora-1", {"step": 2, "train_loss": float("inf")})
    relay.end("lora-1")
    follower.join(timeout=10)
    assert seen == [{"step": 1, "train_loss": 2.0}, {"step": 2, "train_loss": float("inf")}]


def ids_of(trials):
    return [spec.trial_id for spec, _ in trials]


class Told:
    """A receiver that keeps what it is told, by name and trial."""

    def __init__(self):
        self.events = []

    def __getattr__(self, name):
        def keep(what, *more):
            ids = [spec.trial_id for spec in what] if isinstance(what, list) else what.trial_id
            self.events.append((name, ids))

        return keep


def tune_trial(order, failures=0):
    """Tune's own record of a trial whose process has died so often."""
    return SimpleNamespace(trial_id="tune", config=seated(order.next()), max_failures=-1, num_failures=failures)


def test_deaths_before_a_trial_has_begun_are_none_of_its_own(tmp_path):
    """As of a node that is lost while the process starts."""
    run = Run((lora(),), decide([lora()], LAPTOP, {}).runs[0].demand)
    order, told = Order([run]), Told()
    events = Events(resolver(tasks_of([run])), told, order, Relay(tmp_path), Stop(tmp_path / "stop"), lambda: False)
    trial = tune_trial(order, failures=3)
    events.start(trial)
    assert trial.max_failures == 3 + lora().resources.max_failures
    trial.num_failures += 1  # its own first one
    events.again(trial)
    events.start(trial)
    assert trial.max_failures == 3 + lora().resources.max_failures


def test_what_happens_to_the_process_of_a_pack_happens_to_its_trials(tmp_path):
    trials = ranks(2)
    ids = [trial.trial_id for trial in trials]
    run = Run(tuple(trials), decide([trials[0]], LAPTOP, {}).runs[0].demand)
    order, relay, told = Order([run]), Relay(tmp_path), Told()
    events = Events(resolver(tasks_of([run])), told, order, relay, Stop(tmp_path / "stop"), lambda: False)
    host = tune_trial(order)
    events.start(host)
    assert host.max_failures == trials[0].resources.max_failures
    members = [tune_trial(order) for _ in trials]
    for member in members:
        events.start(member)
        events.again(member)  # nothing is lost with a process that passes reports on
        events.error(member)
    assert [event for event, _ in told.events] == ["begin", "begin"]
    events.result(host, {"trials": 2})
    events.result(members[1], {"step": 3, "train_loss": 1.0})
    row = TrialResult(trial_id=ids[1], status="failed", spec=trials[1], error="diverged")
    events.result(members[1], {"step": 4, ROW: row.model_dump_json()})
    assert told.events[2:] == [("show", ids[1]), ("take", ids[1])]
    events.again(host)
    assert told.events[4:] == [("again", ids[0]), ("again", ids[1])]
    events.error(host)
    assert told.events[6:] == [("lose_pack", ids)]
    assert [list(relay.follow(trial_id)) for trial_id in ids] == [[], []]
