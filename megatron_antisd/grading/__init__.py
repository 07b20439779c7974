"""Grading: a response and a reference answer -> reward.

`math` decides, `pool` runs it (or a function of the user's) in worker processes with real time-outs. Importing this
package imports neither torch nor sympy.
"""

from megatron_antisd.grading.pool import GradingError, GradingPool, GradingReport

__all__ = ["GradingError", "GradingPool", "GradingReport"]
