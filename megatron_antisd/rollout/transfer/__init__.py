"""The engine's end of a weight sync."""
