"""What this machine can do for fine-tuning."""
