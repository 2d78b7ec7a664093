"""What is stored of trials: rows, folders and runs in MLflow; and which earlier rows today's trials can use."""
