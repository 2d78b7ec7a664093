"""Training a UNet: micro-batches, recomputation and resuming change nothing, and draws are what they claim to be."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import tiny_diffusion
import torch

from ray_peft.errors import TrialFailed
from ray_peft.methods.optimizers import trainable
from ray_peft.spec import TrialSpec
from ray_peft.tasks.parameters import weight_storage
from ray_peft.tasks.text_to_image.latents import Encoded
from ray_peft.tasks.text_to_image.noise import Draws

LORA = {"name": "lora", "rank": 4, "lr": 0.01}
FULL = {"name": "full", "lr": 0.002, "weights": "float32"}
QLORA = {"name": "qlora", "rank": 4, "lr": 0.01, "compute_dtype": "float32"}
METHODS = [LORA, FULL, QLORA]
SCALE = 0.18215


def draws(spec=None, *, count=6, views=3, prediction="epsilon", moments=None, **changes):
    """Draws over random moments, with Stable Diffusion's noise levels."""
    from diffusers import DDPMScheduler

    spec = spec or TrialSpec.from_plain(tiny_diffusion.plain_spec("model", "images", **changes))
    dice = torch.Generator().manual_seed(7)
    moments = torch.randn(count, views, 8, 4, 4, generator=dice) if moments is None else moments
    images = Encoded(moments, torch.randn(len(moments), 5, 8, generator=dice), 0)
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    return Draws(spec, images, SCALE, schedule), schedule


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_micro_batches_do_not_change_what_is_computed(train, tmp_path, method):
    whole, halves, ones = (
        train(tmp_path / str(size), method, train__micro_batch_size=size).losses for size in (4, 2, 1)
    )
    assert len(whole) == 4
    assert halves == pytest.approx(whole, rel=1e-5)
    assert ones == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("method", [LORA, FULL, LORA | {"dropout": 0.5}], ids=["lora", "full", "dropout"])
def test_gradient_checkpointing_changes_no_loss(train, tmp_path, method):
    plain = train(tmp_path / "a", method).losses
    recomputed = train(tmp_path / "b", method, train__gradient_checkpointing=True).losses
    assert recomputed == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (LORA, {}),
        (LORA, {"train__ema_decay": 0.9}),
        (LORA | {"dropout": 0.5}, {}),
        (QLORA, {}),
        (FULL, {"train__ema_decay": 0.9}),
        ({"name": "full", "lr": 0.002}, {"train__precision": "bf16"}),
    ],
    ids=["lora", "lora-average", "lora-dropout", "qlora", "full-average", "full-bfloat16"],
)
def test_a_resumed_trial_goes_on_as_if_nothing_had_happened(train, tmp_path, method, more):
    changes = {"train__steps": 6, "train__checkpoint_every": 2, "train__warmup_steps": 2, **more}
    whole = train(tmp_path / "a", method, **changes)
    assert sorted(folder.name for folder in (tmp_path / "a").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    rest = train(tmp_path / "a", method, **changes)  # from the checkpoint that the finished one left
    assert rest.losses == pytest.approx(whole.losses[4:], rel=1e-4)
    assert (rest.outcome.resumed_from_step, rest.outcome.steps, rest.outcome.timed_steps) == (4, 6, 6)
    assert rest.outcome.images == whole.outcome.images == 24
    assert rest.bench.eval_loss() == pytest.approx(whole.bench.eval_loss(), rel=1e-4)


def test_a_checkpoint_of_version_0_1_0_is_gone_on_from(train, tmp_path):
    changes = {"train__steps": 4, "train__checkpoint_every": 2}
    whole = train(tmp_path / "a", **changes)
    file = tmp_path / "a" / "checkpoint-2" / "state.pt"
    state = torch.load(file, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "random"}, file)
    rest = train(tmp_path / "a", **changes)
    assert rest.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    assert (rest.outcome.steps, rest.outcome.images) == (4, 16)


def test_a_trial_that_is_killed_goes_on_from_its_last_checkpoint(train, tmp_path):
    changes = {"train__steps": 6, "train__checkpoint_every": 2}
    whole = train(tmp_path / "a", **changes)
    with pytest.raises(train.killed):
        train(tmp_path / "b", killed_at=3, **changes)
    rest = train(tmp_path / "b", **changes)
    assert rest.outcome.resumed_from_step == 2
    assert rest.losses == pytest.approx(whole.losses[2:], rel=1e-5)


def test_the_seed_decides_adapters_and_draws_and_repeats(train, tmp_path):
    first, again, other = (train(tmp_path / str(place), seed=seed).losses for place, seed in enumerate((1, 1, 2)))
    assert again == first
    assert other != first


def test_every_method_sees_the_same_batches(train, tmp_path):
    firsts = [train(tmp_path / method["name"], method, train__steps=1).losses[0] for method in (LORA, FULL)]
    assert firsts[0] == pytest.approx(firsts[1], rel=1e-5)


def test_the_logged_loss_is_the_mean_since_the_last_log(train, tmp_path):
    every = train(tmp_path / "a", train__steps=5).losses
    found = train(tmp_path / "b", train__steps=5, train__log_every=2)
    assert [line["step"] for line in found.log] == [1, 2, 4, 5]
    assert found.losses == pytest.approx([every[0], every[1], sum(every[2:4]) / 2, every[4]], rel=1e-5)
    assert found.log[-1]["epoch"] == pytest.approx(20 / 6)


def test_evaluations_in_between_are_reported_and_change_nothing(train, tmp_path):
    plain = train(tmp_path / "a", train__ema_decay=0.9)
    found = train(tmp_path / "b", train__ema_decay=0.9, train__eval_every=2)
    assert [line["step"] for line in found.log if "eval_loss" in line] == [2]
    assert found.losses == plain.losses
    assert found.outcome.eval_losses[0] != found.bench.eval_loss()


def test_the_loss_falls_on_a_dozen_images(tiny_painter, tmp_path):
    from ray_peft.tasks.text_to_image.task import TextToImage

    images = tiny_diffusion.write_images(tmp_path / "images", 14, 64)
    plain = tiny_diffusion.plain_spec(
        tiny_painter, images, FULL | {"lr": 0.005}, train__steps=40, train__batch_size=12, train__micro_batch_size=12,
        train__log_every=10, train__schedule="constant",
    )  # fmt: skip
    bench, losses = TextToImage().load(TrialSpec.from_plain(plain), "cpu"), []
    ((stage, steps),) = bench.spec.method.stages(bench.total_steps())
    before = bench.eval_loss()
    bench.attach(stage)
    bench.train(stage, steps, 0, tmp_path, lambda metrics, step: losses.append(metrics["train_loss"]))
    assert losses[-1] < 0.6 * losses[0]
    assert bench.eval_loss() < 0.8 * before


def test_weights_in_bfloat16_with_stochastic_rounding_train(train, tmp_path):
    found = train(
        tmp_path, {"name": "full", "lr": 0.005}, train__steps=16, train__precision="bf16", train__batch_size=6,
        train__micro_batch_size=6, train__log_every=4, train__schedule="constant",
    )  # fmt: skip
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert set(weight_storage(found.bench.model).num_bytes) == {"bfloat16"}


@pytest.mark.parametrize("cause", ["loss", "gradient"])
def test_a_diverging_trial_ends_with_step_and_rate_and_no_checkpoint_keeps_it(train, tmp_path, cause):
    def breaks(bench):
        weight = trainable(bench.model)[-1]
        if cause == "loss" and len(seen) == 1:
            weight.data.fill_(math.nan)
        elif cause == "gradient" and len(seen) == 1:
            weight.register_hook(lambda gradient: gradient * math.inf)
        seen.append(1)

    seen = []
    with pytest.raises(
        TrialFailed, match=r"is (nan|inf) at step 3 \(lora, lr 0.01, .*precision fp32\); lower method.lr"
    ):
        train(tmp_path, train__steps=6, train__checkpoint_every=1, hook=breaks)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_the_average_of_the_weights_is_what_is_left(train, tmp_path):
    seen = []

    def keep(bench):
        seen.append([parameter.detach().clone() for parameter in trainable(bench.model)])

    plain = train(tmp_path / "a", hook=keep, train__steps=5)
    found = train(tmp_path / "b", train__steps=5, train__ema_decay=0.5)
    assert found.losses == plain.losses  # training itself knows nothing of it
    average = None
    for step, weights in enumerate(seen, 1):
        # As in diffusers: 0 at first, then (1 + n) / (10 + n) up to the decay that was asked for.
        decay = 0.0 if step == 1 else min(0.5, step / (9 + step))
        average = [decay * old + (1 - decay) * new for old, new in zip(average or weights, weights, strict=True)]
    left = trainable(found.bench.model)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(left, average, strict=True))
    assert not all(torch.allclose(one, other, atol=1e-4) for one, other in zip(left, seen[-1], strict=True))
    from safetensors.torch import load_file

    found.bench.save(tmp_path / "saved", "float32")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    names = [name for name, parameter in found.bench.model.named_parameters() if parameter.requires_grad]
    for name, wanted in zip(names, average, strict=True):
        assert torch.allclose(saved[name.replace(".default", "")], wanted, atol=1e-6)


def test_light_adapters_stay_float32_and_compute_as_autocast_does(train, tmp_path):
    light = train(tmp_path / "a", model__dtype="bfloat16", train__precision="bf16", train__steps=6)
    autocast = train(tmp_path / "b", train__precision="bf16", train__steps=6)
    assert set(light.log[0]) == set(autocast.log[0])
    assert light.losses == pytest.approx(autocast.losses, rel=2e-2)
    assert {parameter.dtype for parameter in trainable(light.bench.model)} == {torch.float32}
    frozen = {parameter.dtype for parameter in light.bench.model.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}
    assert light.losses != autocast.losses


def test_draws_do_not_depend_on_the_micro_batch_nor_on_what_was_drawn_before():
    one, _ = draws(train__micro_batch_size=1)
    four, _ = draws(train__micro_batch_size=4)
    for step in range(4):
        one.batch(step)
    assert same(one.batch(5), four.batch(5))
    assert not same(one.batch(5), one.batch(4))
    batch = one.batch(2)
    parts = [batch.part(first, 2) for first in (0, 2)]
    for whole, *pieces in zip(batch.tensors(), *(part.tensors() for part in parts), strict=True):
        assert torch.equal(torch.cat(pieces), whole)


def test_every_image_is_seen_once_per_epoch_in_another_order():
    found, _ = draws(count=6)  # 4 a step: batches span two epochs
    seen = [row for step in range(6) for row in found.rows(step)]
    epochs = [seen[first : first + 6] for first in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again, _ = draws(count=6)
    assert again.rows(4) == found.rows(4)  # without the steps before, as after a resume


def test_a_batch_may_be_larger_than_all_images():
    found, _ = draws(count=3, train__batch_size=8, train__micro_batch_size=8)
    assert Counter(found.rows(0)) in [
        Counter({0: 3, 1: 3, 2: 2}),
        Counter({0: 3, 1: 2, 2: 3}),
        Counter({0: 2, 1: 3, 2: 3}),
    ]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_the_formula(prediction):
    found, schedule = draws(
        prediction=prediction, train__snr_gamma=5.0, train__batch_size=64, train__micro_batch_size=64
    )
    batch = found.batch(0)
    for timestep, weight in zip(batch.timesteps.tolist(), batch.weights.tolist(), strict=True):
        kept = float(schedule.alphas_cumprod[timestep])
        snr = kept / (1 - kept)
        assert weight == pytest.approx(min(snr, 5.0) / (snr if prediction == "epsilon" else snr + 1), rel=1e-3)
    assert draws()[0].batch(0).weights.tolist() == [1.0] * 4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_targets_and_samples_follow_from_latents_and_noise(prediction):
    moments = torch.randn(6, 1, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    moments[:, :, 4:] = -60.0  # no variance: latents are means
    found, schedule = draws(prediction=prediction, moments=moments)
    batch, rows = found.batch(3), found.rows(3)
    latents = moments[rows, 0, :4] * SCALE
    kept = schedule.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noise = (batch.samples - kept.sqrt() * latents) / (1 - kept).sqrt()
    wanted = noise if prediction == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * latents
    assert torch.allclose(batch.targets, wanted, atol=1e-3)


def test_a_noise_offset_changes_the_noise_by_a_constant_of_each_channel_and_nothing_else():
    plain, moved = (draws(train__noise_offset=offset)[0].batch(1) for offset in (0.0, 0.1))
    assert torch.equal(plain.timesteps, moved.timesteps)
    assert torch.equal(plain.texts, moved.texts)
    added = moved.targets - plain.targets
    assert float(added.flatten(2).std(dim=2).max()) < 1e-6
    assert 0.03 < float(added.std()) < 0.3
    assert torch.allclose(added.mean(dim=(2, 3), keepdim=True).expand_as(added), added, atol=1e-6)


def test_each_visit_of_an_image_has_another_sample_of_its_posterior_and_one_of_its_views():
    moments = torch.zeros(1, 3, 8, 4, 4)
    moments[0, :, :4] = torch.arange(3.0)[:, None, None, None] * 1000
    found, schedule = draws(moments=moments, train__batch_size=32, train__micro_batch_size=32)
    batch = found.batch(0)
    kept = schedule.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    latents = (batch.samples - (1 - kept).sqrt() * batch.targets) / kept.sqrt() / SCALE
    views = (latents / 1000).round().mean(dim=(1, 2, 3))
    clear = batch.timesteps < 500  # later ones are mostly noise
    assert set(views[clear].round().tolist()) == {0.0, 1.0, 2.0}
    residual = latents[clear] - 1000 * views[clear].round().view(-1, 1, 1, 1)
    assert 0.8 < float(residual.std()) < 1.2  # the posterior's own deviation
    assert len({round(float(image[0, 0, 0]), 3) for image in residual}) == len(residual)


def test_epochs_count_their_last_partial_step():
    from ray_peft.tasks.text_to_image.task import TextToImage

    plain = tiny_diffusion.plain_spec("model", "images", train__steps=None, train__epochs=2.0)
    assert TextToImage().total_steps(TrialSpec.from_plain(plain), 7) == 4
