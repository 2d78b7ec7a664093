"""Many trials: what runs where and with which share of a GPU, Ray's cluster, Tune and Train, and what is kept."""
