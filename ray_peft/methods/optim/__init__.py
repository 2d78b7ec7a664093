"""Optimizers of whole models, each for one or a few methods."""
