"""Starts a run on this node."""
