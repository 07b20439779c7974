"""How scoring's cost grows: `python -m benchmarks.growth` draws time and memory over tokens, vocabulary, tensor-parallel size and group size.

Output layer, forward and backward, fp32, H 256, one thread a rank, each point in processes of its own: the naive way and the training form
(benchmarks/output_layer.py). Teacher's pass over group size: shared against unshared prompts (benchmarks/prefix_sharing.py).
Writes a picture and, beside it, the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.launch import machine
from benchmarks.output_layer import best_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKENS, VOCABULARIES, RANKS, GROUP_SIZES = (512, 1024, 2048, 4096), (18_992, 37_984, 75_968, 151_936), (1, 2), (2, 4, 8, 16)
BASE_TOKENS, BASE_VOCABULARY = 1024, 75_968
WAYS = {"naive": "naive", "loss": "training form"}
Point = dict[str, Any]


def output_layer(tokens: int, vocabulary: int, ranks: int) -> dict[str, Point]:
    given = argparse.Namespace(hidden=256, vocab=vocabulary, chunk_mb=64, dtype="float32", device="cpu", rounds=1)
    return {way: best_of(way, True, tokens, ranks, given) for way in WAYS}


def group_sizes(directory: Path) -> list[tuple[int, dict[str, Point]]]:
    """Seconds of the teacher's pass a response, prompts as long as responses."""
    import torch

    from benchmarks import prefix_sharing
    from megatron_antisd.compat.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    trainer = prefix_sharing.build_trainer(directory)
    points = []
    for size in GROUP_SIZES:
        found = prefix_sharing.compare(trainer, 1.0, size, rounds=3)
        shared, unshared = (seconds / (prefix_sharing.GROUPS * size) for seconds in found.seconds)
        points.append((size, {"unshared": {"seconds": unshared}, "shared": {"seconds": shared}}))
        print(f"group size {size}: {unshared * 1e3:.1f} ms a response unshared, {shared * 1e3:.1f} ms shared", flush=True)
    return points


def measure(directory: Path) -> dict[str, list[tuple[int, dict[str, Point]]]]:
    shapes = {"tokens": [(t, BASE_VOCABULARY, 1) for t in TOKENS], "vocabulary": [(BASE_TOKENS, v, 1) for v in VOCABULARIES],
              "ranks": [(BASE_TOKENS, BASE_VOCABULARY, r) for r in RANKS]}
    found: dict[str, list[tuple[int, dict[str, Point]]]] = {}
    known: dict[tuple[int, int, int], dict[str, Point]] = {}
    for index, (axis, of) in enumerate(shapes.items()):
        found[axis] = []
        for shape in of:
            known[shape] = known.get(shape) or output_layer(*shape)
            found[axis].append((shape[index], known[shape]))
            points = known[shape]
            row = "; ".join(f"{name} {points[way]['seconds']:.2f} s, {points[way]['bytes'] / 2**20:,.0f} MiB" for way, name in WAYS.items())
            print(f"T {shape[0]}, V {shape[1]}, TP {shape[2]}: {row}", flush=True)
    return found | {"group size": group_sizes(directory)}


def draw(found: dict[str, list[tuple[int, dict[str, Point]]]], output: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from megatron_antisd.reporting.plots import COLOURS, MARKERS, STYLE

    def curves(axis: Axes, points: list[tuple[int, dict[str, Point]]], names: dict[str, str], value: Callable[[Point], float]) -> None:
        for number, (key, name) in enumerate(names.items()):
            axis.plot([x for x, _ in points], [value(point[key]) for _, point in points], label=name, color=COLOURS[number], marker=MARKERS[number])
        axis.set_xscale("log", base=2)
        axis.minorticks_off()
        axis.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points])
        axis.set_ylim(bottom=0)
        axis.legend()

    labels = {"tokens": f"tokens (V {BASE_VOCABULARY:,})", "vocabulary": f"vocabulary (T {BASE_TOKENS:,})",
              "ranks": f"tensor-parallel ranks (T {BASE_TOKENS:,}, V {BASE_VOCABULARY:,})"}
    with rc_context(STYLE):
        figure = Figure(figsize=(17, 8.5), layout="constrained")
        axes = figure.subplots(2, 4)
        for column, (axis, label) in enumerate(labels.items()):
            for row, (title, value) in enumerate({"seconds": lambda p: p["seconds"], "extra GiB": lambda p: p["bytes"] / 2**30}.items()):
                curves(axes[row, column], found[axis], WAYS, value)
                axes[row, column].set_title(f"Output layer, {title}")
                axes[row, column].set_xlabel(label)
        teacher = {"unshared": "each prompt by itself", "shared": "shared in its group"}
        curves(axes[0, 3], found["group size"], teacher, lambda p: p["seconds"] * 1e3)
        axes[0, 3].set_title("Teacher's pass, ms a response")
        axes[0, 3].set_xlabel("group size (prompt as long as response)")
        axes[1, 3].axis("off")
        figure.savefig(output, dpi=80)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/growth"))
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    found = measure(given.output)
    (given.output / "growth.json").write_text(json.dumps(found, indent=1))
    draw(found, given.output / "growth.png")
    print(f"{given.output / 'growth.png'}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
