"""One figure for one run or several: the axes of the paper's Figure 4, the gate and the time per stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_antisd.metrics import STAGES
from megatron_antisd.reporting.runs import RunData, gate_intervals, group_runs

# Okabe and Ito's palette without its yellow: told apart with any colour vision. The dash pattern repeats the distinction in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ((), (5, 1.6), (1.6, 1.2), (6, 1.5, 1.5, 1.5), (3, 1), (8, 2), (1, 2))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHADES = {"warm-up": "#FFF3CC", "open": "#D3EBDF", "closed": "#DDDDDD"}
MAX_THRESHOLD_RUNS = 3  # with more, thresholds hide the curves
STYLE = {
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 11,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 2.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs drawn in one colour."""

    label: str
    runs: tuple[RunData, ...]
    colour: str
    dashes: tuple[float, ...]
    marker: str


Panel = Callable[[Axes, Sequence[Group]], None]


def plot_runs(runs: Sequence[RunData], output: Path, *, title: str | None = None, panels: Sequence[Panel] | None = None) -> Path:
    """Draw `runs` into one PNG and return its path. Runs of one method that differ in seed or base model share a colour: thin lines
    for each, a thick one for their mean. A faint line is the raw value, a full one its centred rolling mean.

    `panels`: three in a row, e.g. FIGURE_4 (default: PANELS, all that there are)."""
    if not runs:
        raise ValueError("there are no runs to plot; give at least one run directory")
    groups = styled_groups(runs)
    with rc_context(STYLE):
        panels = PANELS if panels is None else panels
        figure = Figure(figsize=(17, 0.5 + 4 * len(panels) // 3), layout="constrained")
        axes = figure.subplots(len(panels) // 3, 3)
        for axis, draw in zip(axes.flat, panels, strict=True):
            draw(axis, groups)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
            axis.set_xlim(left=0, right=max(row["step"] for run in runs for row in run.rows) or 1)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        figure.suptitle(title or _title(groups), fontsize=15, fontweight="bold", x=0.01, ha="left")
        if len(groups) > 1:
            handles = [legend_line(group) for group in groups]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(groups)), fontsize=12)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=110)
    return output


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """[n] -> [n]: the mean of the finite values within `window` steps around each; at the ends the window is cut, not padded.
    A missing value stays missing."""
    half = window // 2
    out = np.full(len(values), np.nan)
    for index in np.flatnonzero(np.isfinite(values)):
        out[index] = np.nanmean(values[max(0, index - half) : index + half + 1])
    return out


def styled_groups(runs: Sequence[RunData]) -> list[Group]:
    styles = [(colour, dashes, marker) for colour, dashes, marker in zip(COLOURS, DASHES, MARKERS, strict=True)]
    return [
        Group(
            label=label + (f" ({len(members)} runs)" if len(members) > 1 else ""),
            runs=tuple(members),
            colour=styles[index % len(styles)][0],
            dashes=styles[(index + index // len(styles)) % len(styles)][1],
            marker=styles[index % len(styles)][2],
        )
        for index, (label, members) in enumerate(group_runs(runs).items())
    ]


def _title(groups: Sequence[Group]) -> str:
    if len(groups) == 1 and len(groups[0].runs) == 1:
        run = groups[0].runs[0]
        return f"{run.config.run.name}: {run.method}, seed {run.config.run.seed}"
    repeated = any(len(group.runs) > 1 for group in groups)
    return f"{sum(len(group.runs) for group in groups)} runs" + (" (thick: mean over runs, thin: each run)" if repeated else "")


def legend_line(group: Group) -> Line2D:
    return Line2D([], [], color=group.colour, dashes=group.dashes or (None, None), label=group.label)


def _curve(axis: Axes, groups: Sequence[Group], key: str, *, smoothing: bool = True) -> bool:
    """Draw `key` of all runs; False when none has a value."""
    drawn = False
    for group in groups:
        curves = [(np.array(s), np.array(v)) for s, v in (run.series(key) for run in group.runs) if np.isfinite(v).any()]
        drawn = drawn or bool(curves)
        style = {"color": group.colour, "dashes": group.dashes or (None, None)}
        smoothed = [(steps, smooth(values, max(1, len(values) // 16) if smoothing else 1)) for steps, values in curves]
        if len(curves) == 1:
            if smoothing:
                axis.plot(*curves[0], color=group.colour, alpha=0.25, linewidth=1)
            axis.plot(*smoothed[0], **style)
        elif curves:
            for steps, values in smoothed:
                axis.plot(steps, values, color=group.colour, alpha=0.35, linewidth=1)
            axis.plot(*_mean_curve(smoothed), **style, linewidth=2.6)
    return drawn


def _mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[list[int], list[float]]:
    """The mean over runs at the steps where every run has a value: a mean over changing runs would show jumps that no run made."""
    tables = [{int(s): v for s, v in zip(steps, values, strict=True) if np.isfinite(v)} for steps, values in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return steps, [float(np.mean([table[step] for table in tables])) for step in steps]


def _nothing(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="#666666")
    axis.set_yticks([])


def _as_share(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))


def _panel(key: str, title: str, ylabel: str, *, share: bool = False, absent: str = "not recorded") -> Panel:
    def draw(axis: Axes, groups: Sequence[Group]) -> None:
        axis.set_title(title)
        axis.set_ylabel(ylabel)
        if not _curve(axis, groups, key):
            _nothing(axis, absent)
        elif share:
            _as_share(axis)
            axis.set_ylim(bottom=0)

    return draw


def _reward(axis: Axes, groups: Sequence[Group]) -> None:
    axis.set_title("Train reward")
    axis.set_ylabel("mean reward")
    _curve(axis, groups, "reward_mean")
    if len(groups) == 1 and len(groups[0].runs) == 1:
        steps, values = groups[0].runs[0].series("reward_completed_mean")
        if np.isfinite(values).any():
            axis.plot(steps, smooth(np.array(values), max(1, len(values) // 16)), color="#D55E00", dashes=(5, 1.6))
        axis.legend(handles=[legend_line(groups[0]), Line2D([], [], color="#D55E00", dashes=(5, 1.6))],
                    labels=["all rollouts", "rollouts that ended by themselves"])  # fmt: skip


def _accuracy(axis: Axes, groups: Sequence[Group]) -> None:
    names = sorted({key for group in groups for run in group.runs for key in run.benchmarks})
    axis.set_title("Evaluation accuracy")
    axis.set_ylabel(names[0].removeprefix("eval/") if len(names) == 1 else "mean over benchmarks")
    drawn = False
    for group in groups:
        tables = [table for table in (run.accuracy() for run in group.runs) if table]
        style = {"color": group.colour, "dashes": group.dashes or (None, None), "marker": group.marker, "markersize": 6, "clip_on": False}
        drawn = drawn or bool(tables)
        if len(tables) > 1:
            for table in tables:
                axis.plot(list(table), list(table.values()), color=group.colour, alpha=0.35, linewidth=1)
            axis.plot(*_mean_curve([(np.array(list(t)), np.array(list(t.values()))) for t in tables]), **style)
        elif tables:
            axis.plot(list(tables[0]), list(tables[0].values()), **style)
    if not drawn:
        _nothing(axis, "no evaluation")
        return
    axis.set_ylim(bottom=0)
    _as_share(axis)


def _gate(axis: Axes, groups: Sequence[Group]) -> None:
    axis.set_title("Teacher entropy and gate")
    axis.set_ylabel("median entropy H, nats")
    if not _curve(axis, groups, "teacher_entropy_median", smoothing=False):  # the gate decides on the raw value
        _nothing(axis, "no teacher in " + ("these runs" if len(groups) > 1 else "this run"))
        return
    axis.set_ylim(bottom=0)
    runs = [run for group in groups for run in group.runs]
    if len(runs) == 1:
        draw_gate(axis, runs[0], groups[0].colour)
    else:
        _gate_strips(axis, groups)


def draw_gate(axis: Axes, run: RunData, colour: str) -> None:
    handles = [Line2D([], [], color=colour, label="H")]
    intervals = gate_intervals(run)
    for state, first, last in intervals:
        axis.axvspan(first - 0.5, last + 0.5, color=SHADES[state], linewidth=0, zorder=0)
    for key, label, dashes in (
        ("gate_warm", r"$H_{warm}$: opens at or above", (6, 2)),
        ("gate_down", r"$\tau_{down}$: closes below", (1.5, 1.5)),
    ):
        steps, values = run.series(key)
        if np.isfinite(values).any():
            handles += axis.plot(steps, values, color="#333333", linewidth=1.4, dashes=dashes, label=label)
    handles += [
        Patch(facecolor=shade, edgecolor="#777777", linewidth=0.6, label=f"gate {state}")
        for state, shade in SHADES.items()
        if any(interval[0] == state for interval in intervals)
    ]
    _legend_above(axis, handles)


def _legend_above(axis: Axes, handles: Sequence[Line2D | Patch]) -> None:
    """A legend in room made at the top of the axis, so that it covers no curve."""
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, bottom + (top - bottom) * 1.38)
    axis.legend(handles=handles, loc="upper left", ncols=2, columnspacing=1.2)


def _gate_strips(axis: Axes, groups: Sequence[Group]) -> None:
    """With several runs, one strip a run at the top: filled where its gate was open."""
    gated = [(group, run) for group in groups for run in group.runs if any(state == "open" for state, _, _ in gate_intervals(run))]
    if not gated:
        return
    if len(gated) <= MAX_THRESHOLD_RUNS:
        for group, run in gated:
            axis.plot(*run.series("gate_down"), color=group.colour, linewidth=1.2, dashes=(1.5, 1.5))
    bottom, top = axis.get_ylim()
    height = min(0.025, 0.2 / len(gated))
    axis.set_ylim(bottom, bottom + (top - bottom) / (0.9 - 1.4 * height * len(gated)))
    for index, (group, run) in enumerate(gated):
        spans = [(first - 0.5, last - first + 1) for state, first, last in gate_intervals(run) if state == "open"]
        axis.broken_barh(
            spans, (0.92 - 1.4 * height * (index + 1), height), transform=axis.get_xaxis_transform(), color=group.colour, linewidth=0
        )
    thresholds = r", dotted: $\tau_{down}$" if len(gated) <= MAX_THRESHOLD_RUNS else ""
    axis.text(0.01, 0.985, f"bars: gate open{thresholds}", transform=axis.transAxes, fontsize=9.5, va="top", color="#444444")


def _mean_u(axis: Axes, groups: Sequence[Group]) -> None:
    axis.set_title("Teacher minus student log-prob")
    axis.set_ylabel("mean u, nats a token")
    if not _curve(axis, groups, "u_mean"):
        _nothing(axis, "no teacher in " + ("these runs" if len(groups) > 1 else "this run"))
        return
    axis.axhline(0, color="#333333", linewidth=1)


def _seconds(axis: Axes, groups: Sequence[Group]) -> None:
    axis.set_title("Time per step")
    axis.set_ylabel("seconds")
    runs = [run for group in groups for run in group.runs]
    if len(runs) > 1:
        _curve(axis, groups, "seconds_total")
        axis.set_ylim(bottom=0)
        return
    training = runs[0].training
    steps = [row["step"] for row in training]
    present = [stage for stage in STAGES if any(row.get(f"seconds_{stage}") is not None for row in training)]
    if not present:
        _nothing(axis, "not recorded")
        return
    # A stage that did not run took no time: in a stack of times that 0 is meant.
    layers = np.array([[row.get(f"seconds_{stage}") or 0.0 for row in training] for stage in present])
    other = np.maximum(np.array([row["seconds_total"] or np.nan for row in training]) - layers.sum(axis=0), 0.0)
    axis.stackplot(
        steps, *layers, np.nan_to_num(other), labels=[*present, "other"], colors=[*COLOURS[: len(present)], "#BBBBBB"], linewidth=0
    )
    # The first steps warm up caches and would flatten all others.
    axis.set_ylim(0, 1.25 * float(np.nanquantile(layers.sum(axis=0) + np.nan_to_num(other), 0.97)))
    _legend_above(axis, axis.get_legend_handles_labels()[0])


_LENGTH = _panel("response_length_mean", "Response length", "mean tokens")
_TRUNCATED = _panel("truncation_rate", "Truncated responses", "share of rollouts", share=True)
_STUDENT_ENTROPY = _panel("student_entropy_mean", "Student entropy", "mean entropy, nats")

PANELS: tuple[Panel, ...] = (
    _reward,
    _accuracy,
    _gate,
    _LENGTH,
    _TRUNCATED,
    _STUDENT_ENTROPY,
    _mean_u,
    _panel("u_negative_share", "Deliberation tokens (u < 0)", "share of tokens", share=True, absent="no teacher"),
    _seconds,
)
FIGURE_4: tuple[Panel, ...] = (_reward, _accuracy, _gate, _STUDENT_ENTROPY, _LENGTH, _TRUNCATED)
"""The paper's six axes. Teacher entropy and gate share one, because the one decides on the other."""
