"""The report of one run: a figure and a short text, both from the files in its directory alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_antisd.metrics import STAGES
from megatron_antisd.reporting.plots import plot_runs
from megatron_antisd.reporting.runs import RunData, gate_intervals, load_run
from megatron_antisd.reporting.tables import markdown_table

MAX_INTERVALS = 12
MAX_SAMPLE_CHARACTERS = 3000


def write_report(run_dir: Path | str, output_dir: Path | str) -> tuple[Path, Path]:
    """Write report.png and report.md into `output_dir` and return their paths. What the run did not record is said, not guessed."""
    run, output = load_run(run_dir), Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    picture = plot_runs([run], output / "report.png")
    text = output / "report.md"
    text.write_text(report_text(run))
    return text, picture


def report_text(run: RunData) -> str:
    """The Markdown of the report."""
    sections = (
        ("Accuracy", _accuracy(run)),
        ("Entropy gate", _gate(run)),
        ("Teacher minus student log-prob by kind of token", _token_u(run)),
        ("One rollout before and one after", _samples(run)),
        ("Time", _seconds(run)),
        ("Agreement of rollout engine and trainer", _mismatch(run)),
    )
    parts = [f"# Report: {run.config.run.name}", _setup(run), "![curves of the run](report.png)"]
    for title, text in sections:
        parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def _setup(run: RunData) -> str:
    config = run.config
    done = len(run.training)
    progress = f"{done} steps" if done >= config.run.steps else f"{done} of {config.run.steps} steps (unfinished)"
    skipped = [row["step"] for row in run.training if row["loss"] is None or row.get("skipped")]
    return (
        f"Method **{run.method}**, model `{config.model.path}`, seed {config.run.seed}, {progress} of "
        f"{config.rollout.problems_per_step} problems x {config.rollout.group_size} rollouts, learning rate {config.optimizer.lr:g}. "
        + (f"Updates skipped for a non-finite loss or gradient: steps {_listed(skipped)}." if skipped else "No update was skipped.")
    )


def _accuracy(run: RunData) -> str:
    if not run.benchmarks:
        return "The run was not evaluated."
    rows = []
    for key in sorted({key for row in run.rows for key in row if key.startswith("eval/") and ("/avg@" in key or "/pass@" in key)}):
        values = {row["step"]: row[key] for row in run.rows if row.get(key) is not None}
        if not values:
            continue
        first, last = min(values), max(values)
        best = max(values, key=lambda step: (values[step], -step))
        rows.append([key.removeprefix("eval/"), f"{values[first]:.1%} @{first}", f"{values[last]:.1%} @{last}",
                     f"{100 * (values[last] - values[first]):+.1f}", f"{values[best]:.1%} @{best}"])  # fmt: skip
    table = markdown_table(["benchmark", "before", "after", "points", "best"], rows)
    starts = {row["step"] for row in run.rows if any(key in row for key in run.benchmarks)}
    note = "" if 0 in starts else f"\n\nThe untrained policy was not evaluated; `before` is step {min(starts)}."
    reward = _ends(run, "reward_mean", ".3f")
    length = _ends(run, "response_length_mean", ".1f")
    return f"{table}{note}\n\n`@` is the step. Train reward: {reward}. Response length in tokens: {length}."


def _ends(run: RunData, key: str, spec: str) -> str:
    """The means over the first and the last five steps: single steps are noisy."""
    values = [row[key] for row in run.training if row[key] is not None]
    if not values:
        return "not recorded"
    width = min(5, len(values))
    return f"{_mean(values[:width]):{spec}} (first {width} steps) to {_mean(values[-width:]):{spec}} (last {width})"


def _gate(run: RunData) -> str:
    intervals = gate_intervals(run)
    if not intervals:
        return f"This run ({run.method}) has no teacher term, so there is no gate."
    spans = [f"{state} {first}-{last}" if first < last else f"{state} {first}" for state, first, last in intervals]
    cut = f" ... ({len(spans) - MAX_INTERVALS} more)" if len(spans) > MAX_INTERVALS else ""
    open_steps = sum(last - first + 1 for state, first, last in intervals if state == "open")
    lines = [f"Steps: {', '.join(spans[:MAX_INTERVALS])}{cut}. Open in {open_steps} of {len(run.training)} steps."]
    calibrated = next((row for row in run.training if row["gate_warm"] is not None), None)
    if calibrated is None:
        lines.append("The gate was not calibrated: there is no H_warm.")
    else:
        lines.append(
            f"H_warm = {calibrated['gate_warm']:.4f} nats, tau_down = {calibrated['gate_down']:.4f} nats (from step {calibrated['step']})."
        )
    entropy = [(row["teacher_entropy_median"], row["step"]) for row in run.training if row["teacher_entropy_median"] is not None]
    if entropy:
        (low, low_step), (high, high_step) = min(entropy), max(entropy)
        lines.append(f"Median teacher entropy: lowest {low:.4f} at step {low_step}, highest {high:.4f} at step {high_step}, ")
        lines[-1] += f"last {entropy[-1][0]:.4f}."
    return " ".join(lines)


def _token_u(run: RunData) -> str:
    overall = [row["u_mean"] for row in run.training if row["u_mean"] is not None]
    share = [row["u_negative_share"] for row in run.training if row["u_negative_share"] is not None]
    text = f"Over all tokens and steps: mean u {_mean(overall):+.3f} nats" if overall else "The run has no u: no teacher scored its tokens"
    text += f", {_mean(share):.1%} of tokens with u < 0." if share else "."
    if not run.token_u:
        return f"{text} There is no token_u.jsonl, so u by kind of token is not known."
    steps = [row["step"] for row in run.token_u]
    shown = sorted({min(steps), max(steps)})
    by_kind: dict[str, dict[int, dict[str, Any]]] = {}
    for row in run.token_u:
        by_kind.setdefault(row["kind"], {})[row["step"]] = row
    rows = [[kind, *(_u_cell(table.get(step)) for step in shown)] for kind, table in by_kind.items()]
    return f"{text}\n\n{markdown_table(['kind', *(f'step {step}: mean u (tokens)' for step in shown)], rows)}"


def _u_cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None or row["mean_u"] is None else f"{row['mean_u']:+.3f} ({row['count']})"


def _samples(run: RunData) -> str:
    """The first problem that was recorded both times: a fixed rule, so that nothing is picked for its look."""
    if not run.samples:
        return "There is no samples.jsonl, so no rollout can be shown."
    steps = [row["step"] for row in run.samples]
    before = [row for row in run.samples if row["step"] == min(steps)]
    after = [row for row in run.samples if row["step"] == max(steps)]
    if min(steps) == max(steps):
        return f"Rollouts were recorded at step {min(steps)} only.\n\n{_sample(before[0])}"
    both = {row["problem_id"] for row in after}
    first = next((row for row in before if row["problem_id"] in both), before[0])
    last = next((row for row in after if row["problem_id"] == first["problem_id"]), after[0])
    return f"Prompt of problem `{first['problem_id']}`:\n\n{_fenced(first['prompt'])}\n\n{_sample(first)}\n\n" + (
        _sample(last) if last["problem_id"] == first["problem_id"] else f"(no problem in common)\n\n{_sample(last)}"
    )


def _sample(row: dict[str, Any]) -> str:
    reward = "not graded" if row["reward"] is None else f"reward {row['reward']:g}"
    truncated = ", truncated" if row["truncated"] else ""
    return f"Step {row['step']}, problem `{row['problem_id']}`, {reward}{truncated}:\n\n{_fenced(row['response'])}"


def _fenced(text: str) -> str:
    """A code block that the text cannot close."""
    cut = (
        text
        if len(text) <= MAX_SAMPLE_CHARACTERS
        else f"{text[:MAX_SAMPLE_CHARACTERS]}\n[... {len(text) - MAX_SAMPLE_CHARACTERS} more characters]"
    )
    fence = "```"
    while fence in cut:
        fence += "`"
    return f"{fence}text\n{cut}\n{fence}"


def _seconds(run: RunData) -> str:
    totals = [row["seconds_total"] for row in run.training if row["seconds_total"] is not None]
    if not totals:
        return "Times were not recorded."
    hidden = sorted({key for row in run.training for key in row if key.startswith("seconds_hidden_")})
    rows = []
    for key in [*(f"seconds_{stage}" for stage in STAGES), *hidden]:
        values = [row[key] for row in run.training if row.get(key) is not None]
        share = "overlapped" if key in hidden else f"{sum(values) / sum(totals):.1%}"
        name = key.removeprefix("seconds_").replace("hidden_", "hidden: ")
        rows.append([name, f"{_mean(values):.3f}", share] if values else [name, "-", "did not run"])
    rows.append(["**whole step**", f"{_mean(totals):.3f}", "100 %"])
    tokens = [row["tokens"] for row in run.training if row["tokens"] is not None]
    rate = f" Response tokens: {sum(tokens):,.0f}, {sum(tokens) / sum(totals):,.0f} a second." if tokens else ""
    table = markdown_table(["stage", "mean seconds a step", "share"], rows)
    return f"{table}\n\nSteps took {sum(totals) / 60:.1f} minutes together, evaluations not counted.{rate}"


def _mismatch(run: RunData) -> str:
    kl = [row["mismatch_kl"] for row in run.training if row["mismatch_kl"] is not None]
    largest = [(row["mismatch_max"], row["step"]) for row in run.training if row["mismatch_max"] is not None]
    if not kl or not largest:
        return "Not recorded."
    value, step = max(largest)
    return (
        f"KL (k3 estimate) between the engine's and the trainer's log-probs of the sampled tokens: mean {_mean(kl):.2e}, "
        f"largest of a step {max(kl):.2e}. Largest difference of any token: {value:.2e} nats at step {step}."
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(str(step) for step in steps[:MAX_INTERVALS]) + (" ..." if len(steps) > MAX_INTERVALS else "")
