"""Named methods over PEFT's configs: one file each, with the paper, good defaults and what is special about it."""
