"""What a soak (benchmarks/soak.py) showed: memory by process, drift, leaks, faults injected and survived, and the picture."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.soak_faults import KINDS, WORKER_KILLED

GOAL = 0.02
MIB = 1 << 20
STARTING_SECONDS = 15.0
RESTARTS = ("engine_raises", "engine_hangs")
Row = dict[str, Any]


def report(output: Path, samples: Sequence[Row], killed: Sequence[tuple[int, str, int]], left: dict[str, list[str]], *, code: int, steps: int,
           plot: Path) -> int:
    """Print the tables and draw the picture; 0 where every goal is reached."""
    run, text = output / "run", (output / "output.txt").read_text(errors="replace")
    rows = read(run / "metrics.jsonl")
    injected = [row for path in sorted(output.glob("injected-*.jsonl")) for row in read(path)]
    injected += [{"kind": WORKER_KILLED, "step": step} for step, _, _ in killed]
    windows = windows_of(steps)
    stable = memory_table(samples, windows)
    restart_table(output)
    survived = fault_table(injected, samples, killed, rows, read(run / "journal.jsonl"), text)
    done = [row["step"] for row in rows if "seconds_total" in row]
    complete = code == 0 and done == list(range(1, steps + 1))
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    print(f"\nexit code {code}; rows of {len(done)} steps{', each once' if complete else ''}; checkpoints kept: {', '.join(kept)}")
    clean = True
    for what, names in left.items():
        print(f"left behind, {what}: {', '.join(names[:10]) or 'none'}")
        clean = clean and not names
    draw(samples, injected, plot)
    print(f"picture: {plot}")
    return 0 if stable and survived and complete and clean else 1


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def windows_of(steps: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last step of the two windows that are compared: 100 to 150 and 451 to 500 of 500."""
    return (steps * 2 // 10, steps * 3 // 10), (steps - steps // 10 + 1, steps)


# -- memory ----------------------------------------------------------------------------------------------------------------


def memory_table(samples: Sequence[Row], windows: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether every role's resident memory in the second window is within the goal of the first."""
    (a, b), (c, d) = windows
    print(f"\n| process | resident MiB, steps {a}-{b} | {c}-{d} | change | its own (USS) | {c}-{d} | change | threads, most | files | connections | "
          "listening |\n|---|---:|---:|---:|---:|---:|---:|---|---|---|---|")
    reached, grown = True, _grown_up(samples)
    for role in roles(samples):
        first, last = ([row for row in grown if row["role"] == role and low <= row["step"] <= high] for low, high in windows)
        if not first or not last:
            print(f"| {role} | seen in {len(first)} and {len(last)} samples of the two windows |")
            continue
        (rss, rss_change), (uss, uss_change) = (_change(first, last, key) for key in ("rss", "uss"))
        drift = [f"{max(row[key] for row in first)} -> {max(row[key] for row in last)}" for key in ("threads", "files", "connections", "listening")]
        print(f"| {role} | {rss[0]:,.1f} | {rss[1]:,.1f} | {100 * rss_change:+.2f} % | {uss[0]:,.1f} | {uss[1]:,.1f} | {100 * uss_change:+.2f} % | "
              f"{' | '.join(drift)} |")
        reached = reached and rss_change <= GOAL
    print(f"(goal: at most {100 * GOAL:+g} % of the resident memory; {len(samples)} samples)")
    return reached


def _grown_up(samples: Sequence[Row]) -> list[Row]:
    """Without those of processes that are starting: a grader in a killed one's place has not imported everything yet."""
    born: dict[int, float] = {}
    for row in samples:
        born.setdefault(row["pid"], row["time"])
    return [row for row in samples if row["time"] - born[row["pid"]] >= STARTING_SECONDS]


def roles(samples: Sequence[Row]) -> list[str]:
    """Those seen for long: what lives for a moment has no memory to compare."""
    seen = Counter(row["role"] for row in samples)
    most = max(seen.values(), default=0)
    return sorted(role for role, count in seen.items() if count > most / 4)


def _change(first: Sequence[Row], last: Sequence[Row], key: str) -> tuple[tuple[float, float], float]:
    """Means in MiB, and the share by which the second is larger."""
    means = statistics.fmean(row[key] for row in first) / MIB, statistics.fmean(row[key] for row in last) / MIB
    return means, means[1] / means[0] - 1


def restart_table(output: Path) -> None:
    """What malloc has handed out in a rank at the beginning of a step: how much more over the steps with a restart of the engine, and over those
    without. (Resident memory falls with a restart, by the cache's pages that the new engine has not touched yet, and says nothing of it.)"""
    print("\n| rank | restarts | malloc's MiB in use, more a restart, by thirds of the run | more over all other steps of each third | "
          "in use, kept free: first | last |\n|---|---:|---|---|---|---|")
    restarted = {row["step"] for path in output.glob("injected-*.jsonl") for row in read(path) if row["kind"] in RESTARTS}
    for path in sorted(output.glob("memory-*.jsonl")):
        rows = read(path)[3:]  # the first steps fill caches
        if len(rows) < 3 or "malloc_used" not in rows[0]:
            continue
        growth = [(row["step"], (after["malloc_used"] - row["malloc_used"]) / MIB) for row, after in zip(rows[:-1], rows[1:], strict=True)]
        thirds = [growth[len(growth) * part // 3 : len(growth) * (part + 1) // 3] for part in range(3)]
        costs = [[cost for step, cost in third if step in restarted] for third in thirds]
        others = [sum(cost for step, cost in third if step not in restarted) for third in thirds]
        ends = [f"{row['malloc_used'] / MIB:,.1f}, {row['malloc_free'] / MIB:,.1f}" for row in (rows[0], rows[-1])]
        each = ", ".join(f"{statistics.fmean(part):+.2f}" if part else "-" for part in costs)
        print(f"| {path.stem.removeprefix('memory-')} | {sum(map(len, costs))} | {each} | {', '.join(f'{more:+.1f}' for more in others)} | "
              f"{' | '.join(ends)} |")


# -- faults ----------------------------------------------------------------------------------------------------------------


def fault_table(injected: Sequence[Row], samples: Sequence[Row], killed: Sequence[tuple[int, str, int]], rows: Sequence[Row],
                journal: Sequence[Row], text: str) -> bool:
    """Whether each injected fault has its trace: in the journal, the log or the processes seen later."""
    counts = Counter(row["kind"] for row in injected)
    said = Counter(row["kind"] for row in journal)
    incidents = Counter(row["incident"] for row in journal if row["kind"] == "incident")
    numbers = [int(number) for number in re.findall(r"restarting the engine \((\d+) of", text)]
    restarts = max(numbers, default=0)
    traces = {
        "engine_raises": (None, "log: restarts of the engine, with those that hang"),
        "engine_hangs": (None, ""),
        WORKER_KILLED: (sum(_replaced(samples, *kill) for kill in killed), "another process in its place"),
        "pool_dies": (text.count("rebuilding the grading pool ("), "log: rebuilds"),
        "checkpoint_fails": (said["checkpoint_failed"], "journal: checkpoint_failed"),
        "nan_gradient": (incidents["non_finite"], "journal: incidents non_finite"),
        "gradient_spike": (said["rollback"], "journal: rollback"),
    }
    print("\n| fault | injected | survived | by what it is known |\n|---|---:|---:|---|")
    print(f"| {' + '.join(RESTARTS)} | {' + '.join(str(counts[kind]) for kind in RESTARTS)} | {restarts} | log: restarts of the engine |")
    for kind in KINDS:
        if kind not in RESTARTS:
            print(f"| {kind} | {counts[kind]} | {traces[kind][0]} | {traces[kind][1]} |")
    figures = {key: sum(row.get(key) or 0 for row in rows) for key in ("engine_restarts", "grader_rebuilds", "grader_crashes", "grader_timeouts",
                                                                       "updates_skipped")}
    print("metrics rows: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    return restarts == sum(counts[kind] for kind in RESTARTS) and all(traces[kind][0] == counts[kind] for kind in KINDS if kind not in RESTARTS)


def _replaced(samples: Sequence[Row], step: int, role: str, pid: int) -> bool:
    return any(row["role"] == role and row["pid"] != pid and row["step"] + 1 >= step for row in samples)


# -- the picture -----------------------------------------------------------------------------------------------------------


def draw(samples: Sequence[Row], injected: Sequence[Row], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from megatron_antisd.reporting.plots import COLOURS, DASHES, MARKERS, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 8), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for number, role in enumerate(roles(samples)):
            points = [row for row in samples if row["role"] == role]
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": (0, DASHES[number % len(DASHES)] or (1, 0)), "linewidth": 1.2}
            top.plot([row["step"] for row in points], [row["rss"] / MIB for row in points], label=role, **style)
        top.set_ylabel("resident MiB")
        top.set_ylim(bottom=0)
        top.set_title("Memory of each process")
        top.legend(loc="center right")
        for number, kind in enumerate(KINDS):
            steps = [row["step"] for row in injected if row["kind"] == kind]
            bottom.plot(steps, [number] * len(steps), linestyle="", marker=MARKERS[number], color=COLOURS[number])
        bottom.set_yticks(range(len(KINDS)), [kind.replace("_", " ") for kind in KINDS])
        bottom.set_xlabel("step")
        bottom.set_title("Faults")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
