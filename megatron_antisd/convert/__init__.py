"""Hugging Face checkpoints to ours and back, part by part, bitwise."""
