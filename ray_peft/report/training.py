"""Sections on the training itself: metrics, losses at chosen steps, stages, ensembles, resources, storage."""

from collections.abc import Sequence

from ray_peft.report.columns import Column, Read, row_table
from ray_peft.report.curves import Points
from ray_peft.report.digits import MISSING, count, duration, fixed, percent, size, speed
from ray_peft.report.document import Block, Paragraph, Table
from ray_peft.report.dynamics import default_steps, losses_at
from ray_peft.report.material import Material
from ray_peft.report.storage import BYTES_PER_PARAMETER, saved_bytes
from ray_peft.report.table import Row

_FOUR_BIT = (
    "qlora: the UNet's linear layers (attention and feed-forward projections, time embeddings) are held in 4 bits; "
    "convolutions, norms and biases stay in bfloat16, because bitsandbytes has 4-bit kernels for matrix products only."
    " In SD 1.5 the linear layers hold 270.0 of the UNet's 859.5 million parameters (31 %), so 1.60 GiB in bfloat16 "
    "become 1.23 GiB."
)


_SHARED = (
    "Trials shared a GPU, each held to its predicted share: times and tokens per second are those of a busy GPU. With "
    "resources.gpus_per_worker: 1 each trial has a GPU to itself."
)


_PACKED = (
    "Trials that trained together on one base share its passes: their seconds of training are divided by the tokens of "
    "their steps, those of loading equally, and the peak of each is that of all of them. Predicted is what each takes "
    "alone. With train.pack: false each trial trains by itself."
)


def metrics(compared: Sequence[Row]) -> list[Block]:
    """How each trial computed, how long it took and where it ended."""
    trained = [
        row for row in compared if not row.result.members and (row.result.steps or row.result.trainable_parameters)
    ]
    columns: list[Column] = [
        ("Weights of the base", _base_weights),
        ("Matrix products", lambda row: row.result.spec.train.precision),
        ("Arithmetic of the trained weights", lambda row: row.result.arithmetic or MISSING),
        ("Steps", lambda row: count(row.result.steps)),
        ("Training", lambda row: duration(row.seconds("train_s"))),
        (_steps_per_s(trained), lambda row: fixed(row.result.usage.steps_per_s, 3)),
        ("Peak memory [GiB]", lambda row: fixed(row.peak_memory_gib, 2)),
        ("Final train loss", lambda row: fixed(row.result.train_loss_final, 4)),
        ("Held-out loss", lambda row: fixed(row.eval_loss.value, 4)),
        ("On disk", lambda row: size(row.result.adapter_bytes)),
    ]
    has_arithmetic = any(row.result.arithmetic for row in trained)
    return row_table(trained, columns, text_columns=4 if has_arithmetic else 3)


def dynamics(material: Material) -> list[Block]:
    """Training loss and held-out loss at chosen steps."""
    curves = [(row, material.curve(row)) for row in material.rows]
    steps = tuple(sorted(set(material.loss_steps))) or default_steps(curve.train for _, curve in curves)
    lines = []
    for row, curve in curves:
        if curve.train:
            lines.append((row.label, "training", *_losses(curve.train, steps, row.result.steps)))
        if len(curve.held_out) > 1:
            lines.append((row.label, "held-out", *_losses(curve.held_out, steps, row.result.steps)))
    if not steps or not lines:
        return []
    header = ("Trial", "Loss", *(f"Step {step:,}" for step in steps))
    text = (
        "A training loss is the mean since the logged step before. Where a step was not logged, the nearest one "
        'stands in, with its number behind; "-": the trial ended before. Other steps: report: {loss_steps: [...]} in '
        "the search space, or --loss-steps."
    )
    return [Table(header=header, lines=tuple(lines), text_columns=2), Paragraph(text)]


def boundaries(compared: Sequence[Row]) -> list[Block]:
    """What the merge between two stages costs in held-out loss."""
    several = [row for row in compared if row.result.boundary_losses]
    moments = list(dict.fromkeys(name for row in several for name in row.result.boundary_losses))
    columns: list[Column] = [(name.capitalize(), _boundary(name)) for name in moments]
    merges = [name.removeprefix("after merge ") for name in moments if name.startswith("after merge ")]
    columns += [(f"Merge {number} costs", _merge(number)) for number in merges]
    columns.append(("At the end", lambda row: fixed(row.eval_loss.value, 4)))
    text = "Held-out loss when a stage ends, after its adapter is merged into the weights, and at the end."
    return [*row_table(several, columns), Paragraph(text)] if several else []


def ensembles(compared: Sequence[Row]) -> list[Block]:
    """Members of ensembles and their weights."""
    labels = {row.trial_id: row.label for row in compared}
    lines = tuple(
        (row.label, labels.get(member, member), fixed(weight, 3))
        for row in compared
        for member, weight in row.result.members.items()
    )
    return [Table(header=("Ensemble", "Member", "Weight"), lines=lines, text_columns=2)] if lines else []


def resources(compared: Sequence[Row]) -> list[Block]:
    """What every trial took."""
    columns: list[Column] = [
        ("Peak memory [GiB]", _memory),
        ("Predicted [GiB]", _predicted),
        ("Memory decided", _decided),
        ("Trained together", lambda row: str(row.result.pack_size) if row.result.pack_size > 1 else MISSING),
        ("In the evaluation [GiB]", lambda row: fixed(row.result.usage.evaluation_allocated_gib, 2)),
        ("Beyond the GPU's memory [GiB]", lambda row: fixed(row.result.usage.spilled_gib or None, 2)),
        ("Training [s]", lambda row: fixed(row.seconds("train_s"), 1)),
        ("Load [s]", lambda row: fixed(row.seconds("load_s"), 1)),
        ("Evaluate [s]", lambda row: fixed(row.seconds("evaluate_s"), 1)),
        ("Save [s]", lambda row: fixed(row.seconds("save_s"), 1)),
        ("Whole trial [s]", lambda row: fixed(row.seconds("wall_time_s"), 1)),
        ("Predicted [s]", lambda row: fixed(row.result.predicted_s.get("wall_time_s"), 1)),
        ("Tokens/s", lambda row: speed(row.result.usage.tokens_per_s)),
        ("Images/s", lambda row: speed(row.result.usage.images_per_s)),
        (_steps_per_s(compared), lambda row: fixed(row.result.usage.steps_per_s, 3)),
        ("Trainable parameters", _trainable),
        ("On disk", lambda row: size(row.result.adapter_bytes)),
    ]
    kinds = {row.on_gpu for row in compared if row.peak_memory_gib is not None}
    meaning = ["GPU: allocated / reserved on one GPU while training"] * (True in kinds)
    meaning += ["CPU: resident memory of the worker process"] * (False in kinds)
    shared = any(0 < row.result.provenance.gpus_per_worker < 1 for row in compared)
    note = [Paragraph(f"Peak memory on a {'; on a '.join(meaning)}. 1 GiB = 2**30 bytes.")] if meaning else []
    note += [Paragraph(_SHARED)] if shared else []
    note += [Paragraph(_PACKED)] if any(row.result.pack_size > 1 for row in compared) else []
    return [*row_table(compared, columns), *note]


def storage(compared: Sequence[Row]) -> list[Block]:
    """What was trained, as large as it is in each dtype."""
    saved = [row for row in compared if row.result.trainable_parameters and row.status == "finished"]
    columns: list[Column] = [("Saved parameters", lambda row: count(row.result.trainable_parameters))]
    columns += [(dtype, _computed(dtype)) for dtype in BYTES_PER_PARAMETER]
    columns += [
        ("Measured on disk", lambda row: size(row.result.adapter_bytes)),
        ("Saved as", lambda row: row.result.spec.train.save_dtype),
    ]
    text = (
        "Saved parameters are the trained ones: the adapter, or the weights. The sizes by dtype are computed from "
        "their number, without the file's header; the measured size is that of the files as train.save_dtype wrote "
        "them."
    )
    return [*row_table(saved, columns), Paragraph(text)] if saved else []


def base_held(compared: Sequence[Row]) -> list[Block]:
    """Bytes of the base's weights by how they are held, and what 4 bits leave out."""
    stored = [row for row in compared if row.result.storage]
    kinds = list(dict.fromkeys(kind for row in stored for kind in row.result.storage))
    columns: list[Column] = [(kind, _held(kind)) for kind in kinds]
    columns += [("Together", lambda row: size(sum(row.result.storage.values())))]
    four_bit = any(row.of_images and row.result.spec.method.name == "qlora" for row in compared)
    texts = ["The base's weights in memory, without the adapter, activations and the optimizer."] if stored else []
    texts += [_FOUR_BIT] if four_bit else []
    return [*row_table(stored, columns), *(Paragraph(text) for text in texts)]


def _held(kind: str) -> Read:
    return lambda row: size(row.result.storage.get(kind, 0))


def _steps_per_s(rows: Sequence[Row]) -> str:
    """Where a step is a batch of images, by its other name, too."""
    return "Steps/s (it/s)" if any(row.of_images for row in rows) else "Steps/s"


def _base_weights(row: Row) -> str:
    spec = row.result.spec
    quantization = spec.quantization
    if not quantization:
        return spec.method.weights_dtype(spec.model.dtype)
    share = row.result.four_bit_share
    kind = f"{quantization.bits}-bit {quantization.quant_type}"
    if share is None:  # rows of version 0.1.0 do not count them
        return kind
    return f"{percent(share)} in {kind}, the others {spec.model.dtype}"


def _losses(points: Points, chosen: Sequence[int], steps: int) -> list[str]:
    points_at = losses_at(points, chosen, steps=steps)
    return [_loss(point, step) for point, step in zip(points_at, chosen, strict=True)]


def _loss(point: tuple[int, float] | None, chosen: int) -> str:
    if point is None:
        return MISSING
    step, loss = point
    return fixed(loss, 4) if step == chosen else f"{fixed(loss, 4)} (step {step:,})"


def _boundary(name: str) -> Read:
    return lambda row: fixed(row.result.boundary_losses.get(name), 4)


def _merge(number: str) -> Read:
    def read(row: Row) -> str:
        losses = row.result.boundary_losses
        before, after = losses.get(f"after stage {number}"), losses.get(f"after merge {number}")
        return MISSING if before is None or after is None else fixed(after - before, 4, signed=True)

    return read


def _computed(dtype: str) -> Read:
    return lambda row: size(saved_bytes(row.result.trainable_parameters, dtype))


def _memory(row: Row) -> str:
    usage = row.result.usage
    if not row.on_gpu:
        return fixed(usage.peak_rss_gib, 2)
    return f"{fixed(usage.peak_allocated_gib, 2)} / {fixed(usage.peak_reserved_gib, 2)}"


def _predicted(row: Row) -> str:
    predicted = row.result.predicted
    if not predicted:
        return MISSING
    return f"{fixed(predicted['peak_allocated_gib'], 2)} / {fixed(predicted['peak_reserved_gib'], 2)}"


def _decided(row: Row) -> str:
    """Settings that were chosen for the memory at hand, or lowered when it ran out."""
    chosen = dict(row.result.chosen)
    rows, checkpointing = chosen.get("train.micro_batch_size"), chosen.get("train.gradient_checkpointing")
    decisions = [f"{rows} rows a pass{', checkpointing' if checkpointing else ''}"] if rows is not None else []
    decisions += [f"{key.partition('.')[2]} lowered to {value}" for key, value in row.result.lowered.items()]
    return "; ".join(decisions) or MISSING


def _trainable(row: Row) -> str:
    if row.trainable_share is None:
        return MISSING
    return f"{count(row.result.trainable_parameters)} ({percent(row.trainable_share)})"
