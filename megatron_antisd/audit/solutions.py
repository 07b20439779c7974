"""Does a shown solution pass the grader that it is to explain?"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_antisd.data import PromptBuilder
from megatron_antisd.grading import GradingPool
from megatron_antisd.grading.verdict import GradingTask
from megatron_antisd.records import CORRECT_REWARD, ScoredGroup


class SolutionCheck:
    """Grades each data-set solution that is shown, once a problem. Peers carry the reward they were graded with; with `peers` they are graded
    once more, as for rollouts on disk, whose grader may have changed since."""

    def __init__(self, grader: GradingPool, prompts: PromptBuilder, *, peers: bool = False) -> None:
        self._grader, self._prompts, self._peers = grader, prompts, peers
        self._passes: dict[tuple[str, str], bool] = {}

    def failing(self, groups: Sequence[ScoredGroup]) -> list[str]:
        """Ids of the problems of which a solution was shown that fails."""
        shown = {(group.problem.id, text): group.problem for group in groups for text in self._shown(group)}
        new = {key: problem for key, problem in shown.items() if key not in self._passes}
        report = self._grader.grade_many([GradingTask(response=key[1], answer=p.answer, tests=p.tests) for key, p in new.items()])
        self._passes |= {key: reward >= CORRECT_REWARD for key, reward in zip(new, report.rewards, strict=True)}
        return list(dict.fromkeys(identifier for identifier, text in shown if not self._passes[identifier, text]))

    def _shown(self, group: ScoredGroup) -> list[str]:
        texts = {s.rollout.index: s.rollout.text for s in group.rollouts}
        sources = dict.fromkeys((s.privileged.source, s.privileged.shown_index) for s in group.rollouts)
        found = [group.problem.solution or "" for source, _ in sources if source == "reference"]
        if self._peers:
            found += [texts[index] for source, index in sources if source == "peer" and index in texts]
        return [self._prompts.clean(text) for text in found]
