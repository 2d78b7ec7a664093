"""What is kept of trials: their rows, their folders, and their runs in MLflow."""
