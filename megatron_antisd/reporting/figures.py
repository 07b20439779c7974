"""The paper's Figure 3 (pass@k) and the gate of each run, beside what `plots` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from megatron_antisd.reporting.plots import STYLE, draw_gate, legend_line, styled_groups
from megatron_antisd.reporting.runs import RunData, gate_intervals

MAX_GATES = 6


def plot_pass_at_k(runs: Sequence[RunData], steps: Mapping[Path, int], benchmark: str, output: Path) -> Path:
    """One curve a run of `eval/<benchmark>/pass@k` over k at its step (`steps`: by run directory), with its interval where it has one."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axis = figure.subplots()
        groups, largest = styled_groups(runs), 1
        for group in groups:
            for run in group.runs:
                curve = run.pass_at(benchmark, steps[run.directory])
                if not curve:
                    continue
                sizes, values = list(curve), np.array([[np.nan if v is None else v for v in point] for point in curve.values()])
                largest = max(largest, *sizes)
                axis.plot(sizes, values[:, 0], color=group.colour, dashes=group.dashes or (None, None), marker=group.marker, markersize=4)
                if np.isfinite(values[:, 1:]).all():
                    axis.fill_between(sizes, values[:, 1], values[:, 2], color=group.colour, alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks([2**power for power in range(largest.bit_length())])
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
        axis.set_xlabel("k")
        axis.set_ylabel(f"pass@k on {benchmark}")
        figure.legend(handles=[legend_line(group) for group in groups], loc="outside lower center", ncols=min(3, len(groups)))
        figure.savefig(output, dpi=110)
    return output


def plot_gates(runs: Sequence[RunData], output: Path) -> Path | None:
    """State, H, H_warm and tau_down of each run that has a gate (the first MAX_GATES of them), one panel each; None without any."""
    gated = [(group, run) for group in styled_groups(runs) for run in group.runs if gate_intervals(run)][:MAX_GATES]
    if not gated:
        return None
    with rc_context(STYLE):
        columns = min(2, len(gated))
        lines = -(-len(gated) // columns)
        figure = Figure(figsize=(8.5 * columns, 4 * lines), layout="constrained")
        for place, (group, run) in enumerate(gated):
            axis = figure.add_subplot(lines, columns, place + 1)
            axis.set_title(f"{run.directory.name}: {run.method}, seed {run.config.run.seed}")
            axis.set_ylabel("H, nats")
            axis.set_xlabel("step")
            axis.plot(*run.series("teacher_entropy_median"), color=group.colour)
            axis.set_ylim(bottom=0)
            draw_gate(axis, run, group.colour)
        figure.savefig(output, dpi=110)
    return output
