"""Settings that other rooms read or change by their dotted key."""

MICRO_BATCH, EVALUATION_BATCH = "train.micro_batch_size", "evaluation.batch_size"
"""The settings that memory may force down while a trial runs: keys of `Bench.lowered`."""
CHECKPOINTING = "train.gradient_checkpointing"
STRATEGY = "resources.strategy"
