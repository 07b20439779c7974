"""Grading: a response and what is known of the problem -> reward and feedback.

`math` compares answers, `code` runs programs in a sandbox, `pool` runs either (or a function of the user's) in worker processes with
real time-outs and memory limits. Importing this package imports neither torch's distributed part nor sympy.
"""

from megatron_antisd.grading.pool import GradingPool, GradingReport
from megatron_antisd.grading.verdict import GradingError, GradingPoolDied, GradingTask, Verdict

__all__ = ["GradingError", "GradingPool", "GradingPoolDied", "GradingReport", "GradingTask", "Verdict"]
