"""How a rank's process ends when it is neither done (0) nor failed by an exception (1)."""

from __future__ import annotations

EXIT_PREEMPTED = 75
"""Asked to stop, and stopped at a stage's boundary with everything saved: start the same command again to go on. EX_TEMPFAIL of sysexits.h, a
code that schedulers can requeue on."""

EXIT_HANG = 76
"""Ended by the watchdog: this rank or another one was stuck, silent or dead, and would have held up the others for ever."""
