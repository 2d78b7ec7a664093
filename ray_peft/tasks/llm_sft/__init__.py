"""Instruction tuning of causal language models on TRL's SFTTrainer."""
