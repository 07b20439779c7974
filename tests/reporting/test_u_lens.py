"""The u-lens page's data, read back from the page and held against the files; what it says of bad input."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reporting.scored_texts import END, Texts, write_steps

from megatron_antisd.metrics.scored_rollouts import read_scored, write_scored
from megatron_antisd.records import ScoredGroup
from megatron_antisd.reporting.commands import main
from megatron_antisd.reporting.u_lens import write_u_lens
from megatron_antisd.reporting.u_lens_data import QUANTUM, SPECIAL, packed

ROOT = Path(__file__).resolve().parents[2]


def unpack(chunk: str) -> np.ndarray:
    """The numbers of a chunk: byte planes, lowest first, signs in the lowest bit."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(chunk)), dtype=np.uint8).reshape(4, -1)
    folded = np.ascontiguousarray(planes.T).view("<u4").ravel().astype(np.int64)
    return np.where(folded % 2 == 0, folded // 2, -(folded // 2) - 1)


def read_page(path: Path) -> dict[str, Any]:
    """What the page's script sees."""
    text = path.read_text()
    raw = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    about = json.loads(zlib.decompress(base64.b64decode(raw["about"])))
    return about | {"chunks": [unpack(chunk) for chunk in raw["chunks"]]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[int, tuple[ScoredGroup, ...]]]:
    run = tmp_path_factory.mktemp("run")
    written = write_steps(run, steps=(5, 10, 15), tokens=200)
    return read_page(write_u_lens([run], minimum_count=8)), written


def pairs(written: dict[int, tuple[ScoredGroup, ...]]) -> list[tuple[int, int, float, float]]:
    """(step, token, student, teacher) of every token with both log-probs."""
    return [(step, token, s, t) for step, groups in written.items() for group in groups for scored in group.rollouts if scored.u is not None
            for token, s, t in zip(scored.rollout.response_ids, scored.student_log_prob, scored.teacher_log_prob, strict=True)]


@pytest.mark.parametrize("values", [[], [0], [-1], [1, -2, 300, -70000, 2**31 - 1, -2**31], list(range(-500, 500))])
def test_numbers_come_back(values: list[int]) -> None:
    assert unpack(packed(np.array(values, dtype=np.int64))).tolist() == values


def test_every_rollout_comes_back_within_the_quantum(made: tuple[dict[str, Any], dict[int, tuple[ScoredGroup, ...]]]) -> None:
    page, written = made
    every = [(step, group, scored) for step, groups in written.items() for group in groups for scored in group.rollouts]
    assert len(every) == len(page["rollouts"]) == 48
    for (step, group, scored), row in zip(every, page["rollouts"], strict=True):
        size = len(scored.rollout.response_ids)
        assert (row["step"], row["index"], row["reward"], row["tokens"]) == (step, scored.rollout.index, scored.rollout.reward, size)
        assert (row["truncated"], row["source"], row["cut"]) == (scored.rollout.truncated, scored.privileged.source, scored.privileged.cut_tokens)
        assert page["problems"][row["problem"]]["id"] == group.problem.id
        assert row["feedback"] == scored.rollout.feedback
        parts = page["chunks"][row["chunk"]].reshape(-1, size)
        assert tuple(parts[0]) == scored.rollout.response_ids
        if scored.student_log_prob is not None:
            assert np.abs(parts[1] * QUANTUM - scored.student_log_prob).max() <= QUANTUM / 2
        if scored.u is not None:
            assert np.abs(parts[2] * QUANTUM - scored.u).max() <= QUANTUM / 2
            assert row["mean"] == pytest.approx(np.mean(scored.u), abs=1e-12)
            assert row["share"] == np.mean([u < 0 for u in scored.u])
        else:
            assert row["mean"] is row["share"] is None
        assert len(parts) == 1 + (scored.student_log_prob is not None) + (scored.teacher_log_prob is not None)


def test_teacher_alone_keeps_its_log_probs(made: tuple[dict[str, Any], dict[int, tuple[ScoredGroup, ...]]]) -> None:
    page, written = made
    scored = written[5][3].rollouts[0]
    assert scored.student_log_prob is None
    row = page["rollouts"][12]
    assert np.abs(page["chunks"][row["chunk"]].reshape(2, -1)[1] * QUANTUM - scored.teacher_log_prob).max() <= QUANTUM / 2


def test_prompts_and_links_come_back(made: tuple[dict[str, Any], dict[int, tuple[ScoredGroup, ...]]]) -> None:
    page, written = made
    every = [scored for groups in written.values() for group in groups for scored in group.rollouts]
    linked = 0
    for scored, row in zip(every, page["rollouts"], strict=True):
        assert tuple(page["chunks"][page["prompts"][row["prompt"]]]) == scored.rollout.prompt_ids
        if scored.privileged.view is None:
            assert row["privileged"] is None
        else:
            assert tuple(page["chunks"][page["prompts"][row["privileged"]]]) == scored.privileged.view.prompt_ids
        if scored.privileged.shown_index is not None:
            peer = page["rollouts"][row["shown"]]
            assert (peer["problem"], peer["index"]) == (row["problem"], scored.privileged.shown_index)
            linked += 1
    assert linked == 3 * (3 + 4)
    assert dict(zip(page["tokens"]["ids"], page["tokens"]["texts"], strict=True))[END] == "<|im_end|>"
    assert END in page["tokens"]["special"] and len(page["tokens"]["special"]) == 4


def test_heat_map_counts_every_token_where_it_belongs(made: tuple[dict[str, Any], dict[int, tuple[ScoredGroup, ...]]]) -> None:
    page, written = made
    tokens, heat = pairs(written), page["heat"]
    bins, floor = heat["bins"], heat["floor"]
    assert page["scored"] == len(tokens) == 3 * (3 + 4) * 200
    for name in ("probability", "log"):
        whole, *steps = (page["chunks"][number] for number in heat[name])
        assert whole.sum() == len(tokens)
        assert (np.sum(steps, axis=0) == whole).all()
    probability = np.zeros((bins, bins), dtype=int)
    log = np.zeros((bins, bins), dtype=int)
    for _, _, s, t in tokens:
        probability[min(int(np.exp(s) * bins), bins - 1), min(int(np.exp(t) * bins), bins - 1)] += 1
        log[tuple(min(max(int((each - floor) / -floor * bins), 0), bins - 1) for each in (s, t))] += 1
    assert (page["chunks"][heat["probability"][0]].reshape(bins, bins) == probability).all()
    assert (page["chunks"][heat["log"][0]].reshape(bins, bins) == log).all()


def test_extreme_tokens_and_steps_are_those_of_a_plain_count(made: tuple[dict[str, Any], dict[int, tuple[ScoredGroup, ...]]]) -> None:
    page, written = made
    by_token: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for step, token, s, t in pairs(written):
        by_token[token].append((step, t - s))
    means = {token: np.mean([u for _, u in seen]) for token, seen in by_token.items() if len(seen) >= 8}
    for sign, rows in ((1, page["extremes"]["negative"]), (-1, page["extremes"]["positive"])):
        expected = sorted((token for token in means if sign * means[token] < 0), key=lambda token: sign * means[token])[:20]
        assert [row["token"] for row in rows] == expected and rows
        for row in rows:
            us = [u for _, u in by_token[row["token"]]]
            assert row["count"] == len(us)
            assert row["mean"] == pytest.approx(np.mean(us)) and row["error"] == pytest.approx(np.std(us, ddof=1) / len(us) ** 0.5)
            for step, mean, count in zip((5, 10, 15), row["means"], row["counts"], strict=True):
                mine = [u for at, u in by_token[row["token"]] if at == step]
                assert count == len(mine) and (mean == pytest.approx(np.mean(mine)) if mine else mean is None)
    for row in page["overSteps"]:
        us = np.array([t - s for step, _, s, t in pairs(written) if step == row["step"]])
        assert (row["tokens"], row["share"]) == (len(us), (us < 0).mean())
        assert (row["mean"], row["error"]) == pytest.approx((us.mean(), us.std(ddof=1) / len(us) ** 0.5))


def test_deliberation_tokens_lead_the_negative_table(made: tuple[dict[str, Any], dict[int, tuple[ScoredGroup, ...]]]) -> None:
    page, _ = made
    text = dict(zip(page["tokens"]["ids"], page["tokens"]["texts"], strict=True))
    assert {" Wait", " Maybe", " Alternatively"} <= {text[row["token"]] for row in page["extremes"]["negative"][:8]}
    first, *_, last = next(row for row in page["extremes"]["negative"] if text[row["token"]] == " Wait")["means"]
    assert last < first - 0.5  # the maker lets them drift


def test_steps_choose_and_output_is_taken(tmp_path: Path) -> None:
    write_steps(tmp_path / "run", steps=(1, 2, 3), groups=1, tokens=40)
    page = write_u_lens([tmp_path / "run"], tmp_path / "new" / "page.html", steps=[3, 1])
    assert page == tmp_path / "new" / "page.html" and read_page(page)["steps"] == [1, 3]
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    beside = write_u_lens(sorted((tmp_path / "run/rollouts").glob("*.jsonl"))[:1])
    assert beside == tmp_path / "run/rollouts/u_lens.html" and read_page(beside)["steps"] == [1]
    assert read_page(write_u_lens([tmp_path / "run/rollouts"]))["steps"] == [1, 2, 3]


def test_run_without_any_teacher_makes_a_page(tmp_path: Path) -> None:
    write_steps(tmp_path, steps=(1,), groups=2, tokens=40, kinds=("no_solution",), method="grpo")
    page = read_page(write_u_lens([tmp_path]))
    assert page["scored"] == 0 and page["extremes"] == {"minimum": 10, "negative": [], "positive": []}
    assert page["overSteps"] == [{"step": 1, "tokens": 0, "mean": None, "error": None, "share": None, "shareError": None}]
    assert page["chunks"][page["heat"]["log"][0]].sum() == 0


def test_texts_cannot_leave_the_data_block(tmp_path: Path) -> None:
    texts = Texts()
    hostile = "</script><img src=x onerror=alert(1)>"
    group = texts.group(hostile, 4, 60, 0.0)
    run = tmp_path / "<b onclick='x'>run"
    write_scored(run / "rollouts", 1, "antisd", [group], lambda token: texts.texts[token] + hostile)
    text = write_u_lens([run]).read_text()
    assert "<img" not in text and "<b onclick" not in text and "&lt;b onclick" in text
    assert text.count("</script>") == 2
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    for name in ("script", "style"):
        content = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)[1]
        assert f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")


def broken(path: Path, change: Any) -> None:
    """Change the second line's first rollout."""
    header, row, *rest = path.read_text().split("\n")
    value = json.loads(row)
    change(value["rollouts"][0])
    path.write_text("\n".join([header, json.dumps(value), *rest]))


def test_bad_input_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_steps(tmp_path / "run", steps=(1, 2), groups=2, tokens=40)
    write_steps(tmp_path / "other", steps=(3,), groups=1, tokens=40, method="sd")
    write_steps(tmp_path / "twin", steps=(1,), groups=1, tokens=40)
    (tmp_path / "empty").mkdir()
    write_scored(tmp_path / "nothing/rollouts", 1, "antisd", [], str)
    one, two = sorted((tmp_path / "run/rollouts").glob("*.jsonl"))
    cut = tmp_path / "step_000009.jsonl"
    cut.write_bytes(one.read_bytes()[:-300])
    changed = {name: tmp_path / f"{name}.jsonl" for name in ("short", "nan", "text")}
    for path in changed.values():
        path.write_bytes(two.read_bytes())
    broken(changed["short"], lambda row: row["student_log_prob"].pop())
    broken(changed["nan"], lambda row: row["teacher_log_prob"].__setitem__(3, float("nan")))
    broken(changed["text"], lambda row: row["response_ids"].__setitem__(3, 999_999))
    (tmp_path / "tokenizer").mkdir()
    foreign = tmp_path / "tokenizer/step_000007.jsonl"
    scored = read_scored(two)
    write_scored(foreign.parent, 7, "antisd", scored.groups, lambda token: scored.token_text[token] + "!")
    cases = [
        ([tmp_path / "gone.jsonl"], ["gone.jsonl: no such file"]),
        ([tmp_path / "empty"], ["empty has no rollouts/step_*.jsonl", "logging.rollout_groups"]),
        ([tmp_path / "nothing"], ["no rollouts in there", "logging.rollout_groups"]),
        ([tmp_path / "run", tmp_path / "other"], ["one method", "antisd in", "sd in"]),
        ([tmp_path / "run", tmp_path / "twin"], ["step 1 stands in", "twin"]),
        ([tmp_path / "run", "--steps", "2", "7"], ["no scored rollouts of step 7", "[1, 2]"]),
        ([cut], ["step_000009.jsonl line 3", "group of scored rollouts"]),
        ([changed["short"]], ["short.jsonl, problem 'made-0'", "rollout 0: student_log_prob has 39 values for 40"]),
        ([changed["nan"]], ["nan.jsonl", "teacher_log_prob holds nan"]),
        ([changed["text"]], ["token 999999 has no text"]),
        ([two, foreign], ["different tokenizers"]),
        ([tmp_path / "run", "--output", tmp_path / "empty"], ["empty"]),
    ]
    for arguments, said in cases:
        assert main(["u-lens", *map(str, arguments)]) == 1, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: "), error
        assert all(part in error for part in said), error
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("text", "special"), [("<|im_end|>", True), ("</think>", True), ("<pad>", True), ("<s>", True), ("", True), (" <s>", False),
                                               ("<b>", False), ("<|a|b|>", False), ("think", False), ("\n", False)])
def test_special_tokens_are_told_by_their_whole_text(text: str, special: bool) -> None:
    assert (SPECIAL.fullmatch(text) is not None) == special


# What a colour looks like with all of one kind of cone missing: linear RGB to linear RGB (Machado, Oliveira and Fernandes 2009).
COLOUR_BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, sight: str) -> np.ndarray:
    """CIE L*a*b* of #rrggbb as seen with that sight."""
    parts = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.array(COLOUR_BLIND[sight]) @ linear, 0, 1) / TO_XYZ.sum(1)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("sight", COLOUR_BLIND)
def test_blue_red_and_none_stay_apart_for_every_sight(sight: str) -> None:
    style = (ROOT / "megatron_antisd/reporting/u_lens_page/style.css").read_text()
    schemes = list(zip(*(re.findall(rf"--{name}: (#\w{{6}});", style) for name in ("neg", "pos", "page")), strict=True))
    assert len(schemes) == 2  # light and dark
    for scheme in schemes:
        seen = [lab(colour, sight) for colour in scheme]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert np.linalg.norm(seen[one] - seen[other]) > 20, (scheme, one, other)


def test_tool_prints_the_page(tmp_path: Path) -> None:
    write_steps(tmp_path, steps=(1,), groups=1, tokens=40)
    done = subprocess.run([sys.executable, ROOT / "tools/u_lens.py", tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'u_lens.html'}\n"), done.stderr


def test_installed_package_holds_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = "megatron_antisd/reporting/u_lens_page"
    assert {path.name for path in (tmp_path / folder).iterdir()} == {path.name for path in (ROOT / folder).iterdir()}
