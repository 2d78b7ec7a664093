"""Where memory runs out, training goes on with fewer rows a pass, and nothing else changes."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ray_peft.engine.contract import Share
from ray_peft.engine.member import Job
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import train as training
from ray_peft.tasks.llm_sft.loss import TextLoss
from ray_peft.tasks.llm_sft.steps import TextPart, TextRows
from ray_peft.tasks.llm_sft.task import LlmSft

LORA = {"name": "lora", "rank": 4, "lr": 0.01}
FULL = {"name": "full", "lr": 0.003, "weights": "float32"}
GALORE = {"name": "galore", "rank": 4, "lr": 0.01, "weights": "float32", "layerwise": True, "max_grad_norm": None}
ROWS = "train.micro_batch_size"


class Run:
    """A trained trial, and what its model saw meanwhile."""

    def __init__(self, spec, folder, *, prepare=None, rehearse=False, first_step=0):
        self.spec, self.log, self.shapes, self.updates, self.killed_at = spec, [], [], 0, None
        self.bench = LlmSft().load(spec, "cpu")
        self.stages = spec.method.stages(self.bench.total_steps())
        self.folder, self.rehearse = folder, rehearse
        self.bench.model.register_forward_pre_hook(self._see, with_kwargs=True)
        if prepare is not None:
            prepare(self)
        self.outcomes, done = [], first_step
        counter = register_optimizer_step_post_hook(self._count)
        try:
            for index, (stage, steps) in enumerate(self.stages):
                self.bench.attach(stage)
                self.outcomes.append(self.train(stage, steps, done, folder / str(index)))
                done += steps
                if index < len(self.stages) - 1:
                    self.bench.merge(stage)
        finally:
            counter.remove()

    def _count(self, optimizer, args, kwargs):
        self.updates += 1

    def train(self, stage, steps, first_step, folder):
        bench = self.bench
        if not self.rehearse:
            return bench.train(stage, steps, first_step, folder, self.report)
        job = Job(
            self.spec, stage, steps, first_step, folder, "cpu", self.report, bench.eval_loss, lowered=bench.lowered
        )
        return training.train_stage(self.spec, job, bench.data.train, bench.model, bench.tokenizer, rehearse=True)

    def report(self, metrics, step):
        self.log.append({"step": step, **metrics})
        if step == self.killed_at:
            raise KeyboardInterrupt

    def _see(self, module, args, kwargs):
        if torch.is_grad_enabled():  # else it is tried whether dropout can belong to rows
            self.shapes.append((len(self.log) + 1, *kwargs["input_ids"].shape))

    @property
    def losses(self):
        return [line["train_loss"] for line in self.log]

    @property
    def weights(self):
        return [p.detach() for p in self.bench.model.parameters() if p.requires_grad]


def no_more_than(rows):
    """Memory for so many rows in a pass."""

    def prepare(run):
        def check(module, args, kwargs):
            if len(kwargs["input_ids"]) > rows:
                raise torch.OutOfMemoryError(f"no room for {len(kwargs['input_ids'])} rows")

        run.bench.model.register_forward_pre_hook(check, with_kwargs=True)

    return prepare


def backward_no_more_than(rows, first_step, length=0):
    """Memory for so many rows in the backward pass, from a step on, half of the way down."""

    def prepare(run):
        def check(gradient):
            if len(run.log) + 1 >= first_step and len(gradient) > rows and gradient.shape[1] >= length:
                raise torch.OutOfMemoryError(f"no room for {len(gradient)} rows")

        def watch(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(check)

        run.bench.model.model.layers[0].register_forward_hook(watch)

    return prepare


@pytest.fixture(scope="module")
def train(tiny_model, one_long_row, tmp_path_factory):
    """Trains one trial of the tiny model on the uneven rows."""

    def run(method=LORA, *, folder=None, prepare=None, rehearse=False, **changes):
        plain = tiny.plain_spec(tiny_model, one_long_row, dict(method), **changes)
        folder = folder or tmp_path_factory.mktemp("run")
        return Run(TrialSpec.from_plain(plain), folder, prepare=prepare, rehearse=rehearse)

    return run


@pytest.fixture(scope="module")
def undisturbed(train):
    """Four steps of two passes of four rows each."""
    return {method["name"]: train(method) for method in (LORA, FULL)}


def same_training(found, wanted):
    assert [line["step"] for line in found.log] == [line["step"] for line in wanted.log]
    for key in ("train_loss", "grad_norm", "lr", "epoch"):
        ours, theirs = ([line[key] for line in run.log] for run in (found, wanted))
        assert ours == pytest.approx(theirs, rel=1e-5), key
    assert [outcome.tokens for outcome in found.outcomes] == [outcome.tokens for outcome in wanted.outcomes]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found.weights, wanted.weights, strict=True))


@pytest.mark.parametrize(
    ("method", "prepare", "rows"),
    [
        (LORA, no_more_than(3), 2),
        (LORA, backward_no_more_than(1, 2, length=60), 1),
        (FULL, no_more_than(1), 1),
        (FULL, backward_no_more_than(2, 3), 2),
    ],
    ids=["lora", "lora-in-backward-of-long-rows", "full-to-one-row", "full-in-backward-of-the-third-step"],
)
def test_a_pass_that_runs_out_of_memory_is_done_again_in_parts_and_changes_nothing(
    train, undisturbed, method, prepare, rows
):
    wanted = undisturbed[method["name"]]
    found = train(method, prepare=prepare)
    assert found.bench.lowered == {ROWS: rows}
    assert wanted.bench.lowered == {}
    same_training(found, wanted)
    assert max(rows_passed for _, rows_passed, _ in found.shapes[-4:]) == rows


def test_recomputed_activations_may_run_out_of_memory_too(train, undisturbed):
    found = train(prepare=backward_no_more_than(2, 3), train__gradient_checkpointing=True)
    assert found.bench.lowered == {ROWS: 2}
    same_training(found, undisturbed["lora"])


def test_the_step_is_done_again_from_its_first_row_without_half_made_gradients(train, undisturbed):
    """Memory runs out in the backward pass of the second pass of the second step."""
    passes, left = [], []

    def prepare(run):
        def check(gradient):
            passes.append(len(gradient))
            if len(passes) == 4:
                left.append(run.bench.model.model.layers[1].mlp.up_proj.weight.grad)
                raise torch.OutOfMemoryError("no room")

        def watch(module, args, output):
            if output.requires_grad:
                output.register_hook(check)

        run.bench.model.model.layers[0].mlp.register_forward_hook(watch)

    found = train(FULL, prepare=prepare)
    assert left[0] is not None
    assert passes == [4, 4, 4, 4, *[2] * 4, *[2] * 8]
    assert found.updates == 4
    same_training(found, undisturbed["full"])


def test_what_the_failed_pass_held_is_free_when_it_is_done_again(train):
    held, alive = [], []

    def prepare(run):
        def check(gradient):
            if len(run.shapes) == 3:
                assert not held[-1].expired()
                raise torch.OutOfMemoryError("no room")

        def watch(module, args, output):
            alive.extend(not storage.expired() for storage in held)
            held[:] = [StorageWeakRef(args[0].untyped_storage())]  # kept for the backward pass
            output.register_hook(check)

        run.bench.model.model.layers[1].mlp.down_proj.register_forward_hook(watch)

    assert train(FULL, prepare=prepare).bench.lowered == {ROWS: 2}
    assert not any(alive)


def test_each_pass_is_as_long_as_its_own_longest_row(undisturbed):
    run = undisturbed["lora"]
    computation = TextLoss(run.spec, run.bench.model, 9)
    part = TextPart([[1, 2], [3]], [[-100, 2], [-100]], loss_tokens=1, passes=1)
    ids, mask, labels, loss_tokens, passes = computation.inputs(part)
    assert ids.tolist() == [[1, 2], [3, 9]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert labels.tolist() == [[-100, 2], [-100, -100]]
    assert (float(loss_tokens), float(passes)) == (1, 1)


def test_layerwise_galore_has_updated_weights_by_then_and_ends(train):
    with pytest.raises(torch.OutOfMemoryError):
        train(GALORE, train__micro_batch_size=8, prepare=no_more_than(4))


def test_a_single_row_that_does_not_fit_ends_the_trial(train):
    runs = []

    def prepare(run):
        runs.append(run)
        no_more_than(0)(run)

    with pytest.raises(torch.OutOfMemoryError):
        train(prepare=prepare)
    (run,) = runs
    assert [rows for _, rows, _ in run.shapes] == [4, 2, 1]


def test_other_errors_end_the_trial(train):
    def prepare(run):
        def check(module, args, kwargs):
            raise RuntimeError("shapes do not match")

        run.bench.model.register_forward_pre_hook(check, with_kwargs=True)

    with pytest.raises(RuntimeError, match="do not match"):
        train(prepare=prepare)


def test_later_stages_start_with_the_rows_that_fit(train):
    qlora = {"name": "qlora", "rank": 4, "lr": 0.01, "compute_dtype": "float32"}
    galore = {"name": "galore", "rank": 4, "lr": 0.001, "weights": "float32"}
    method = {"name": "qlora_galore", "switch_at": 0.5, "qlora": qlora, "galore": galore}
    # In the same parts: the second stage makes much of the rounding of the first.
    wanted, found = train(method, train__micro_batch_size=2), train(method, prepare=no_more_than(2))
    assert found.bench.lowered == {ROWS: 2}
    assert [rows for _, rows, _ in found.shapes].count(4) == 1
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
    assert found.outcomes[1].tokens == wanted.outcomes[1].tokens


@pytest.mark.parametrize("method", [LORA | {"dropout": 0.1}, FULL], ids=["lora-with-dropout", "full"])
def test_a_rehearsal_runs_the_heaviest_pass_and_changes_nothing(train, method):
    wanted, found = (train(method, rehearse=rehearse, train__steps=6) for rehearse in (False, True))
    assert found.losses == wanted.losses
    assert found.log == wanted.log
    assert found.outcomes[0].tokens == wanted.outcomes[0].tokens
    assert all(torch.equal(a, b) for a, b in zip(found.weights, wanted.weights, strict=True))
    longest = max((rows * tokens, rows, tokens) for _, rows, tokens in wanted.shapes)[1:]
    assert [step for step, *shape in wanted.shapes if tuple(shape) == longest] not in ([1], [2])
    first, second = wanted.shapes[:2], wanted.shapes[2:]
    assert found.shapes == [(1, *longest), *first, (2, *longest), (2, *longest), *second]
    assert found.bench.lowered == {}


def test_a_resumed_stage_rehearses_what_is_left(train, tmp_path):
    def killed(run):
        run.killed_at = 4

    changes = {"train__steps": 6, "train__checkpoint_every": 3}
    wanted = train(**changes)
    with pytest.raises(KeyboardInterrupt):
        train(prepare=killed, folder=tmp_path, **changes)
    left = [shape for step, *shape in wanted.shapes if step > 3]
    found = train(rehearse=True, folder=tmp_path, **changes)
    assert found.outcomes[0].resumed_from_step == 3
    longest = max(left, key=lambda shape: shape[0] * shape[1])
    assert [shape for _, *shape in found.shapes] == [longest, *left[:2], longest, longest, *left[2:]]
    assert found.losses == wanted.losses[3:]


def test_memory_that_runs_out_in_the_rehearsal_lowers_the_rows_before_the_step(train, undisturbed):
    asked = []

    def prepare(run):
        def check(module, args, kwargs):
            rows, tokens = kwargs["input_ids"].shape
            asked.append((len(run.log) + 1, rows))
            if rows * tokens > 200:
                raise torch.OutOfMemoryError("no room")

        run.bench.model.register_forward_pre_hook(check, with_kwargs=True)

    found = train(prepare=prepare, rehearse=True)
    assert max(rows * tokens for _, rows, tokens in undisturbed["lora"].shapes) > 200
    assert asked[:3] == [(1, 4), (1, 2), (1, 2)]
    assert found.bench.lowered == {ROWS: 2}
    assert max(rows for _, rows in asked[1:]) == 2
    same_training(found, undisturbed["lora"])


def test_a_rehearsal_of_layerwise_galore_updates_nothing(train):
    wanted, found = (train(GALORE, rehearse=rehearse, train__micro_batch_size=8) for rehearse in (False, True))
    assert found.log == wanted.log
    assert len(found.shapes) == len(wanted.shapes) + 2


def test_a_single_step_needs_no_rehearsal(train):
    assert len(train(rehearse=True, train__steps=1).shapes) == 2


@pytest.mark.parametrize(("rows", "first_step"), [(40, 0), (33, 0), (33, 3)])
def test_a_rehearsal_is_chosen_from_the_passes_that_come(tiny_model, one_long_row, tmp_path, rows, first_step):
    """Through the short last batches of epochs too, and after a resume."""
    plain = tiny.plain_spec(tiny_model, one_long_row, dict(LORA), train__steps=7)
    plain["data"]["sources"][0]["train"] = rows
    spec = TrialSpec.from_plain(plain)
    found = Run(spec, tmp_path, first_step=first_step)
    data = TextRows(spec, found.bench.data.train)
    for done in (0, 2):
        steps = range(first_step + done, first_step + 7)
        parts = [part for step in steps for part in data.parts(step, Share(), 4)]
        planned = [(len(part.ids), max(map(len, part.ids))) for part in parts]
        assert planned == [(rows, tokens) for step, rows, tokens in found.shapes if step > done]
        heaviest = data.heaviest(steps, 4)
        assert len(heaviest.ids) * max(map(len, heaviest.ids)) == max(rows * tokens for rows, tokens in planned)


def test_the_heaviest_pass_is_that_of_the_parts_that_pass(tiny_model, one_long_row, undisturbed):
    run = undisturbed["lora"]
    data = TextRows(run.spec, run.bench.data.train)
    for rows in (1, 2, 3):
        parts = [part for step in range(4) for part in data.parts(step, Share(), rows)]
        heaviest = data.heaviest(range(4), rows)
        cost = max(len(part.ids) * max(map(len, part.ids)) for part in parts)
        assert len(heaviest.ids) * max(map(len, heaviest.ids)) == cost


def test_workers_share_a_step_without_rows_twice(undisturbed):
    run = undisturbed["lora"]
    data = TextRows(run.spec, run.bench.data.train)
    for rows in (1, 3, 4):
        whole = [row for part in data.parts(2, Share(), rows) for row in part.ids]
        shared = [row for rank in range(3) for part in data.parts(2, Share(rank, 3), rows) for row in part.ids]
        assert sorted(shared) == sorted(whole)
        assert len(whole) == 8
