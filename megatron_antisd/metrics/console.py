"""What a run prints: one line a step and, on a terminal, a progress bar."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_antisd.metrics.stages import STAGES

Value = float | int | bool | None


class ConsoleLog:
    """One line a step, and on a terminal a progress bar below them."""

    def __init__(self, run_name: str, total_steps: int, done: int, *, show_bar: bool) -> None:
        self._console = Console(highlight=False)
        self._total, self._first = total_steps, done
        self._start: float | None = None
        self._bar: Progress | None = None
        if show_bar and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(run_name, total=total_steps, completed=done)
            self._bar.start()

    def step(self, step: int, row: Mapping[str, Value]) -> None:
        now = time.perf_counter()
        if self._start is None:  # the first step of this process: its own time is all there is to go by
            self._start = now - float(row["seconds_total"] or 0.0)
            self._first = step - 1
        eta = (now - self._start) / (step - self._first) * (self._total - step)
        self._print(f"[{step:>{len(str(self._total))}}/{self._total}] {format_step(row)} | eta {_clock(eta)}")
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def evaluation(self, step: int, values: Mapping[str, Value]) -> None:
        shown = {key: value for key, value in values.items() if key.rsplit("/", 1)[-1].startswith(("avg@", "majority@"))}
        accuracy = "  ".join(f"{key.removeprefix('eval/')} {_number(v, '.3f')}" for key, v in shown.items())
        self._print(f"[{step:>{len(str(self._total))}}/{self._total}] evaluation: {accuracy}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def format_step(row: Mapping[str, Value]) -> str:
    """The console's line of one training row, without step and ETA; `-` where a value does not exist."""
    gate = {None: "-", True: "open", False: "closed"}[row["gate_open"]]
    share = _number(row["u_negative_share"], ".0%")
    stages = " ".join(f"{stage} {_number(row[f'seconds_{stage}'], '.2f')}" for stage in STAGES)
    return (
        f"reward {_number(row['reward_mean'], '.3f')} len {_number(row['response_length_mean'], '.1f')} "
        f"trunc {_number(row['truncation_rate'], '.1%')} | gate {gate} H {_number(row['teacher_entropy_median'], '.3f')} "
        f"(down {_number(row['gate_down'], '.3f')} warm {_number(row['gate_warm'], '.3f')}) lambda {_number(row['lambda'], '.2g')} "
        f"u {_number(row['u_mean'], '+.3f')} ({share} < 0) | grad {_number(row['grad_norm'], '.3g')} "
        f"mismatch {_number(row['mismatch_kl'], '.1e')} | {_number(row['seconds_total'], '.2f')} s: {stages}"
    )


def _number(value: Value, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def is_accuracy(key: str) -> bool:
    return key.rsplit("/", 1)[-1].startswith(("avg@", "pass@"))
