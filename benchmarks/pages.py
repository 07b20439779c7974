"""How long do the pages take to make, and to open in a browser?

    python -m benchmarks.pages [--rollouts 200] [--tokens 4096] [--rounds 5]

Makes a file of scored rollouts, then the u-lens of it with tools/u_lens.py as a fresh process (start-up and imports are part of the time),
and opens the page in a headless chromium: from the navigation's start until the first rollout's tokens are painted, which the page says
itself. Every opening is a new tab of one warm browser; the files lie in the system's cache. `--report RUN ...` also makes the report page
of finished runs with tools/report.py and opens it, until the second frame after its load event.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.launch import ROOT, machine
from tests.reporting.chromium import HOW, Browser, Page, find_chromium
from tests.reporting.scored_texts import write_steps

MAKE_SECONDS, OPEN_SECONDS = 10.0, 2.0
GROUP_SIZE = 8
SHOWN = ("new Promise((done) => { const end = () => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())));"
         "document.readyState === 'complete' ? end() : addEventListener('load', end); })")


def timed(*command: str) -> tuple[float, float]:
    """Seconds of a Python command: by the clock, and of processor time, which other work on the machine hardly changes.

    Raises RuntimeError with its output when it fails."""
    start, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr[-2000:]}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, used


def open_milliseconds(browser: Browser, path: Path, tells: bool) -> float:
    """`tells`: the page itself says when it is painted. Raises RuntimeError for a page with faults or one that asks for anything."""
    page = browser.open(path)
    taken = page.painted() if tells else float(page.evaluate(SHOWN))
    faults, requests = page.faults(), [address for address in page.requests() if not address.startswith("data:")]
    if faults or len(requests) != 1:
        raise RuntimeError(f"{path}: faults {faults}, requests {requests[:5]}")
    page.close()
    return taken


def heap_megabytes(browser: Browser, path: Path) -> float:
    """The script's heap after the first rollout is shown."""
    page: Page = browser.open(path)
    page.painted()
    page.call("HeapProfiler.collectGarbage")
    used = page.call("Runtime.getHeapUsage")["usedSize"] / 1e6
    page.close()
    return used


def report_row(name: str, path: Path, made: Sequence[tuple[float, float]], opened: Sequence[float]) -> bool:
    """Print a line of the table; whether both goals are met."""
    clock, processor = zip(*made, strict=True)
    make, show = statistics.median(clock), statistics.median(opened) / 1000
    print(f"| {name} | {path.stat().st_size / 1e6:.2f} MB | {make:.2f} s (most {max(clock):.2f}) | {statistics.median(processor):.2f} s | "
          f"{show:.2f} s (most {max(opened) / 1000:.2f}) |", flush=True)
    return make < MAKE_SECONDS and show < OPEN_SECONDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", nargs="+", default=[], metavar="RUN", help="finished runs whose report page is measured too")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/pages"))
    given = parser.parse_args(arguments)
    program = find_chromium()
    if program is None:
        print(f"error: no chromium; {HOW}", file=sys.stderr)
        return 1
    directory = given.output.absolute()
    shutil.rmtree(directory, ignore_errors=True)
    try:
        write_steps(directory, steps=(1,), groups=max(1, given.rollouts // GROUP_SIZE), size=GROUP_SIZE, tokens=given.tokens, kinds=("peer",))
        size = sum(path.stat().st_size for path in (directory / "rollouts").iterdir())
        print(f"{given.rollouts} rollouts x {given.tokens} tokens, files of {size / 1e6:.0f} MB, {machine()}\n")
        print("| page | size | made in | of the processor | opened in |\n|---|---|---|---|---|")
        lens = directory / "u_lens.html"
        made = [timed("tools/u_lens.py", str(directory), "--output", str(lens)) for _ in range(min(3, given.rounds))]
        with Browser(program) as browser:
            met = report_row("u-lens", lens, made, [open_milliseconds(browser, lens, True) for _ in range(given.rounds)])
            heap = heap_megabytes(browser, lens)
            if given.report:
                runs = [str(Path(run).absolute()) for run in given.report]
                made = [timed("tools/report.py", *runs, "--output", str(directory / "report")) for _ in range(min(3, given.rounds))]
                page = next((directory / "report").glob("*.html"))
                met &= report_row("report", page, made, [open_milliseconds(browser, page, False) for _ in range(given.rounds)])
        print(f"\nscript heap of the u-lens after opening: {heap:.0f} MB; goals: made in {MAKE_SECONDS:.0f} s, opened in {OPEN_SECONDS:.0f} s: "
              f"{'met' if met else 'MISSED'}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
