"""The one training loop of all tasks: members, passes, recovery, checkpoints."""
