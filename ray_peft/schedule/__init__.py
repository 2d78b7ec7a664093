"""Many trials: where each runs and with which share of a GPU, Ray's cluster, Tune and Train, and the output folder."""
