"""What is looked at before anything starts: files, rows, models, and each trial's own code on shapes."""
