"""Data sets as they are published -> the JSON lines that training and evaluation read."""
