"""A running sweep as a page in the browser of the machine that it runs on; what `ray-peft ui --live` does."""
