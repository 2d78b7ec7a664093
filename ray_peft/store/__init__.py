"""What is kept of trials: their rows, their folders, their runs in MLflow, and which of it answers today's trials."""
