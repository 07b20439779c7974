"""Whether a run's numbers are sane, and what to do where they are not: `monitor.py` has the rules, `incident.py` what they find."""

from megatron_antisd.health.incident import Incident, Kind, refuses, strongest
from megatron_antisd.health.monitor import HealthMonitor

__all__ = ["HealthMonitor", "Incident", "Kind", "refuses", "strongest"]
