"""The pool a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_antisd.config import GradingConfig
from megatron_antisd.grading.pool import GradingPool
from megatron_antisd.grading.sandbox import SandboxError
from megatron_antisd.grading.sandbox_choice import choose_sandbox
from megatron_antisd.grading.verdict import GradingError
from megatron_antisd.records import Problem


def build_pool(config: GradingConfig, problems: Iterable[Problem]) -> GradingPool:
    """A pool for these problems. A sandbox is looked for, and its protections logged, only where one of them has tests to run.

    Raises GradingError where no acceptable sandbox works here, where a problem's tests are broken, and as GradingPool does.
    """
    sandbox = None
    programming = [problem for problem in problems if problem.tests is not None]
    if programming and config.function is None:
        _check(programming)
        try:
            sandbox = choose_sandbox(config)
        except SandboxError as error:
            raise GradingError(f"{len(programming)} problems are programming tasks, and no sandbox can run them: {error}") from error
    return GradingPool(config.workers, config.timeout_seconds, config.function, memory_bytes=config.memory_bytes, sandbox=sandbox,
                       max_rebuilds=config.max_rebuilds)


def _check(problems: Iterable[Problem]) -> None:
    from megatron_antisd.grading.code import check_tests

    for problem in problems:
        try:
            check_tests(problem.tests)
        except GradingError as error:
            raise GradingError(f"problem {problem.id!r}: {error}") from error
