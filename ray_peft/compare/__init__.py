"""From a model and a file of rows to the answer: which method to take; what `ray-peft compare` does."""
