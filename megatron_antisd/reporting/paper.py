"""The paper's own results (arXiv 2605.11609), for a column beside a run's. Averages over its seven benchmarks, in percent."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PaperResult:
    """One cell of the paper's Table 1 or of its ablation."""

    average: float
    step: int | None = None
    """The best step; None where the paper does not give it."""
    speedup: float | None = None
    """Over GRPO."""

    def __str__(self) -> str:
        step = "" if self.step is None else f" @{self.step}"
        return f"{self.average:.1f}{step}" + ("" if self.speedup is None else f", {self.speedup:.1f}x")


def _rows(grpo: tuple[float, int], sd: tuple[float, int], antisd: tuple[float, int], speedup: float) -> dict[str, PaperResult]:
    return {
        "grpo": PaperResult(average=grpo[0], step=grpo[1]),
        "sd": PaperResult(average=sd[0], step=sd[1]),
        "antisd": PaperResult(average=antisd[0], step=antisd[1], speedup=speedup),
    }


# Model, method label of `runs.method_label` -> result.
_RESULTS = {
    "qwen38b": _rows((57.4, 200), (30.6, 200), (65.7, 180), 5.0),
    "qwen34binstruct2507": _rows((51.3, 200), (45.9, 10), (62.8, 100), 10.0) | {
        "reverse_kl": PaperResult(average=49.5),
        "antisd (gate.mode=always)": PaperResult(average=60.6),
        "antisd (gate.down=0.9)": PaperResult(average=54.5),
        "antisd (gate.down=0.95)": PaperResult(average=60.3),
        "antisd (compose=multiplicative)": PaperResult(average=56.5),
        "antisd (gate.mode=student)": PaperResult(average=60.3),
    },
    "olmo37binstruct": _rows((43.0, 190), (41.1, 10), (48.3, 200), 9.5),
    "olmo37bthink": _rows((64.1, 80), (62.6, 40), (66.2, 40), 2.0),
    "qwen330ba3b": _rows((59.1, 150), (34.5, 60), (66.8, 140), 2.9),
}  # fmt: skip


def paper_result(model: str, method: str) -> PaperResult | None:
    """What the paper reports for a model (a path or a name: its last part counts) and a method label; None where it has none."""
    name = re.sub(r"[^a-z0-9]", "", model.rstrip("/").rsplit("/", 1)[-1].lower())
    return _RESULTS.get(name, {}).get(method)
