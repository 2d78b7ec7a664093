"""Checks before anything starts: files, rows, models, and each trial's own code on shapes."""
