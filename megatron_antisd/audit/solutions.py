"""Does a shown solution pass the grader that it is to explain?"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_antisd.data import PromptBuilder
from megatron_antisd.grading import GradingPool
from megatron_antisd.grading.verdict import GradingTask
from megatron_antisd.records import ScoredGroup


class SolutionCheck:
    """Grades each data-set solution that is shown, once a problem; peers carry the reward they were graded with."""

    def __init__(self, grader: GradingPool, prompts: PromptBuilder) -> None:
        self._grader, self._prompts = grader, prompts
        self._passes: dict[str, bool] = {}

    def failing(self, groups: Sequence[ScoredGroup]) -> list[str]:
        """Ids of the problems of which the data set's solution was shown and fails."""
        shown = [group.problem for group in groups if any(scored.privileged.source == "reference" for scored in group.rollouts)]
        new = [problem for problem in shown if problem.id not in self._passes]
        report = self._grader.grade_many(
            [GradingTask(response=self._prompts.clean(p.solution or ""), answer=p.answer, tests=p.tests) for p in new])
        self._passes |= {problem.id: reward >= 1.0 for problem, reward in zip(new, report.rewards, strict=True)}
        return [problem.id for problem in shown if not self._passes[problem.id]]
