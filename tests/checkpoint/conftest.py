"""Property tests draw the same examples every time."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("checkpoint", derandomize=True, max_examples=60, deadline=None)
settings.load_profile("checkpoint")
