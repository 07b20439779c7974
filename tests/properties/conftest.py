"""Property tests: the same examples at every run, and few enough for the fast suite."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "project", derandomize=True, database=None, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")
