"""Time-outs of stages, signs of life, explanations of hangs and deaths, and clean stops on a scheduler's signal."""

from megatron_antisd.supervision.exit_codes import EXIT_HANG, EXIT_PREEMPTED
from megatron_antisd.supervision.preemption import Preempted
from megatron_antisd.supervision.supervisor import Supervisor

__all__ = ["EXIT_HANG", "EXIT_PREEMPTED", "Preempted", "Supervisor"]
