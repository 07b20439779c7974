"""Pictures, tables and texts from run directories. Reads files only; no GPU, no model, no torch.

python -m megatron_antisd.reporting plot RUN [RUN ...] [--output FILE]
python -m megatron_antisd.reporting report RUN [--output DIR]
python -m megatron_antisd.reporting compare RUN [RUN ...] [--output DIR]
python -m megatron_antisd.reporting results RUN [RUN ...] --output DIR
"""

from megatron_antisd.reporting.compare import Comparison, compare_runs
from megatron_antisd.reporting.plots import plot_runs
from megatron_antisd.reporting.report import report_text, write_report
from megatron_antisd.reporting.results import Choices, write_results
from megatron_antisd.reporting.runs import RunData, load_run
from megatron_antisd.reporting.tables import comparison_markdown, write_comparison

__all__ = [
    "Choices",
    "Comparison",
    "RunData",
    "compare_runs",
    "comparison_markdown",
    "load_run",
    "plot_runs",
    "report_text",
    "write_comparison",
    "write_report",
    "write_results",
]
