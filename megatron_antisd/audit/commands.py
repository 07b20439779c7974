"""The command that prints what the teachers of saved rollouts saw; `tools/context_audit.py` calls it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_antisd.audit.alarms import first_token_alarm, shown_solution_alarm
from megatron_antisd.audit.context import ContextFindings, ContextInspector
from megatron_antisd.audit.saved import AuditError, SavedRollouts, open_saved
from megatron_antisd.audit.solutions import SolutionCheck
from megatron_antisd.config import ConfigError
from megatron_antisd.data import ProblemDataError, PromptError
from megatron_antisd.grading import GradingError
from megatron_antisd.metrics import MetricsError
from megatron_antisd.rollout.replay import ReplayError

ERRORS = (AuditError, ConfigError, GradingError, MetricsError, ProblemDataError, PromptError, ReplayError, FileNotFoundError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where all contexts are sound, 1 where there are defects or alarms, 2 for input that cannot be audited."""
    parser = argparse.ArgumentParser(
        prog="tools/context_audit.py", description="What the teacher of each saved rollout really saw: its decoded prompt, where the solution "
        "came from, what was cut, whether question, feedback and generation prompt are whole, and alarms on u.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_FILE",
                        help="a run directory (its rollouts/), or files of scored rollouts or of debug.save_rollouts")
    parser.add_argument("--step", type=int, help="of a run directory (default: the newest)")
    parser.add_argument("--config", type=Path, help="config.yaml of the run (default: found above each file)")
    parser.add_argument("--model", help="directory with the tokenizer (default: the configuration's model.path)")
    parser.add_argument("--problem", action="append", default=[], metavar="ID", help="print the whole contexts of this problem; may be repeated")
    parser.add_argument("--prompts", type=int, default=1, metavar="N", help="whole teacher prompts to print of each file (default: %(default)s)")
    parser.add_argument("--no-grading", action="store_true", help="do not grade the shown solutions again")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        found = [_audit(saved, options) for path in options.paths for saved in open_saved(path, options.step, options.config, options.model)]
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(any(found))


def _audit(saved: SavedRollouts, options: argparse.Namespace) -> int:
    """Print one file's audit; the number of defects and alarms."""
    inspector = ContextInspector(saved.prompts, saved.tokenizer)
    findings = [inspector.inspect(group, thinking_end=True) for group in saved.groups]
    flat = [finding for group in findings for finding in group]
    print(f"== {saved.path}: step {saved.step}, {len(saved.groups)} groups, {len(flat)} rollouts")
    for line in _summary(flat):
        print(line)
    for finding in _to_print(flat, options):
        print(_whole(finding))
    problems = [f"problem {f.problem_id!r}, rollout {f.index}: {defect}" for f in flat for defect in f.defects]
    problems += _alarms(saved, grade=not options.no_grading)
    for problem in problems:
        print(f"ALARM {problem}")
    print(f"{len(problems)} defects and alarms" if problems else "no defects, no alarms")
    return len(problems)


def _summary(findings: Sequence[ContextFindings]) -> list[str]:
    sources = Counter(finding.source for finding in findings)
    cut = [finding.cut_tokens for finding in findings if finding.cut_tokens]
    with_teacher = [finding for finding in findings if finding.prompt is not None]
    thinking = [finding.response_thinking_end for finding in findings if finding.response_thinking_end is not None]
    return [
        "solution from: " + ", ".join(f"{source} {count}" for source, count in sources.most_common()),
        f"cut at the beginning: {len(cut)} solutions" + (f", {min(cut)} to {max(cut)} tokens" if cut else ""),
        "teacher prompts: " + (f"{min(f.prompt_tokens for f in with_teacher)} to {max(f.prompt_tokens for f in with_teacher)} tokens"
                               if with_teacher else "none"),
        "thinking, student: " + _counts(finding.student_thinking for finding in findings),
        "thinking, teacher: " + _counts(finding.teacher_thinking for finding in findings),
        f"</think> in the response: {len(thinking)} of {len(findings)}" + (f", at token {min(thinking)} to {max(thinking)}" if thinking else ""),
    ]


def _counts(values: object) -> str:
    return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common())


def _to_print(findings: Sequence[ContextFindings], options: argparse.Namespace) -> list[ContextFindings]:
    if options.problem:
        missing = sorted(set(options.problem) - {finding.problem_id for finding in findings})
        if missing:
            raise AuditError(f"--problem {missing[0]}: not among the problems {sorted({f.problem_id for f in findings})[:8]}")
        return [finding for finding in findings if finding.problem_id in options.problem]
    return [finding for finding in findings if finding.prompt is not None][: options.prompts]


def _whole(finding: ContextFindings) -> str:
    shown = finding.source if finding.shown_index is None else f"{finding.source}, rollout {finding.shown_index}"
    head = (f"-- problem {json.dumps(finding.problem_id)}, rollout {finding.index}: solution from {shown}; {finding.prompt_tokens} prompt + "
            f"{finding.response_tokens} response tokens, {finding.cut_tokens} cut")
    return head if finding.prompt is None else f"{head}\n{finding.prompt}\n--"


def _alarms(saved: SavedRollouts, grade: bool) -> list[str]:
    scored = [rollout for group in saved.groups for rollout in group.rollouts]
    alarms = [first_token_alarm(scored)]
    if grade:
        with saved.open_grader() as grader:
            alarms.append(shown_solution_alarm(saved.groups, SolutionCheck(grader, saved.prompts, peers=True).failing(saved.groups)))
    return [alarm for alarm in alarms if alarm is not None]
