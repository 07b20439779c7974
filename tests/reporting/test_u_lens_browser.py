"""The u-lens page in a real browser. Without a chromium these are skipped; the slow tests install Debian's first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reporting.chromium import HOW, Browser, BrowserError, Page, find_chromium, install_chromium
from reporting.scored_texts import Texts, write_steps

from megatron_antisd.algorithm import phi
from megatron_antisd.metrics.scored_rollouts import write_scored
from megatron_antisd.records import ScoredGroup
from megatron_antisd.reporting.u_lens import write_u_lens
from megatron_antisd.reporting.u_lens_data import QUANTUM

SHOWN = QUANTUM + 5.1e-5  # the page rounds to four digits
MOST_NODES = 6000
HOSTILE = "</script><img src=x onerror=\"window.hurt=1\"><!--<script>"


@pytest.mark.slow
def test_set_up_installs_a_browser() -> None:
    """First in this file, so that the tests below find one."""
    try:
        assert Path(install_chromium()).exists()
    except BrowserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip(f"no chromium; {HOW}")
    with Browser(program) as started:
        yield started


Written = dict[int, tuple[ScoredGroup, ...]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    run = tmp_path_factory.mktemp("run")
    written = write_steps(run, tokens=400)
    return write_u_lens([run]), written


def opened(browser: Browser, path: Path, fragment: str = "", dark: bool = False) -> Page:
    page = browser.open(path, fragment, dark)
    page.painted()
    return page


def shown_numbers(page: Page) -> dict[str, str]:
    return page.evaluate("Object.fromEntries([...document.querySelectorAll('#numbers:not([hidden]) dt')]"
                         ".map((dt) => [dt.textContent, dt.nextSibling.textContent]))")


def type_into(page: Page, name: str, text: str) -> int:
    """Fill a filter; the number of rollouts it leaves."""
    page.evaluate(f"(() => {{ const box = document.querySelector('#list [name={name}]'); box.value = {text!r};"
                  "box.dispatchEvent(new Event('input')); })()")
    return int(page.evaluate("document.getElementById('list').dataset.count"))


def test_page_opens_without_faults_and_without_network(browser: Browser, made: tuple[Path, Written]) -> None:
    page = opened(browser, made[0])
    for tab in ("tab-tokens", "tab-heat", "tab-rollouts"):
        page.evaluate(f"document.getElementById('{tab}').click()")
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    page.wait("document.querySelectorAll('details pre').length === 3")
    assert page.faults() == []
    assert page.requests() == [made[0].resolve().as_uri()]
    assert page.evaluate("document.getElementById('list').dataset.count") == "32"
    assert "32 rollouts, 12800 tokens, 5600 with u" in page.evaluate("document.getElementById('summary').textContent")
    page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_are_those_of_u_and_text_stays_readable(browser: Browser, made: tuple[Path, Written], dark: bool) -> None:
    page = opened(browser, made[0], "#r1", dark)
    scored = made[1][10][0].rollouts[1]
    style = "getComputedStyle(document.documentElement)"
    limit = float(page.evaluate(f"{style}.getPropertyValue('--range')"))
    colours = page.evaluate("[...document.querySelectorAll('#tokens .t')].map((node) => getComputedStyle(node).backgroundColor)")
    checked = 0
    for u, colour in zip(scored.u, colours, strict=False):
        if abs(u) < 0.05:
            continue
        red, _, blue, *alpha = map(float, re.findall(r"[\d.]+(?:e-?\d+)?", colour.removeprefix("color(srgb")))
        assert (blue > red) == (u < 0), (u, colour)
        assert (alpha[0] if alpha else 1.0) == pytest.approx(min(1.0, abs(u) / limit), abs=0.01)
        checked += 1
    assert checked > 50
    page.evaluate("(() => { const slider = document.getElementById('range'); slider.value = -4; slider.dispatchEvent(new Event('input')); })()")
    full = page.evaluate("getComputedStyle(document.querySelector('.t.neg')).backgroundColor")
    assert page.evaluate("document.getElementById('low').textContent") == "−0.063" and full != ""
    for name in ("--neg", "--pos", "--page"):
        pair = [page.evaluate(f"{style}.getPropertyValue('{each}').trim()") for each in (name, "--text")]
        assert contrast(*pair) >= 4.5, (name, pair)
    page.close()


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two #rrggbb colours."""
    def luminance(colour: str) -> float:
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def check_numbers(page: Page, scored: Any, place: int) -> None:
    numbers = shown_numbers(page)
    student, teacher, u = scored.student_log_prob[place], scored.teacher_log_prob[place], scored.u[place]
    assert numbers["id"] == str(scored.rollout.response_ids[place])
    assert numbers["position"] == f"{place} of 0 to {len(scored.u) - 1}"
    assert float(numbers["log π_S"].split()[0]) == pytest.approx(student, abs=SHOWN)
    assert float(numbers["log π_T"].split()[0]) == pytest.approx(teacher, abs=SHOWN)
    assert float(numbers["u"]) == pytest.approx(u, abs=SHOWN)
    assert float(numbers["φ(u)"]) == pytest.approx(float(phi(torch.tensor(u, dtype=torch.float64))), abs=SHOWN)


def test_pointer_and_keys_show_the_numbers(browser: Browser, made: tuple[Path, Written]) -> None:
    page = opened(browser, made[0], "#r1")
    scored = made[1][10][0].rollouts[1]
    for place in (0, 7, 60):
        page.point_at(f"#t{place}")
        page.wait(f"document.getElementById('numbers').textContent.includes('position{place} of')")
        check_numbers(page, scored, place)
    page.evaluate("document.getElementById('tokens').focus()")
    for key, place in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 399)):
        page.press(key)
        page.wait(f"document.querySelector('.t.cursor')?.id === 't{place}'")
        check_numbers(page, scored, place)
    page.press("ArrowUp")
    above = int(page.wait("Number(document.querySelector('.t.cursor').id.slice(1))"))
    assert 340 < above < 399
    tops = page.evaluate(f"[{above}, 399].map((i) => document.getElementById('t' + i).getClientRects()[0].top)")
    assert tops[0] < tops[1]
    page.press("Escape")
    page.wait("document.getElementById('numbers').hidden")
    page.close()


def test_text_is_whole_and_reasons_are_given(browser: Browser, made: tuple[Path, Written]) -> None:
    page = opened(browser, made[0], "#r0")
    texts = Texts().texts
    for number, said in ((0, None), (2, "no_room"), (8, "no_solution"), (12, "no student log-probs")):
        page.evaluate(f"location.hash = 'r{number}'")
        page.wait(f"document.getElementById('rollout').dataset.row === '{number}'")
        scored = made[1][10][number // 4].rollouts[number % 4]
        drawn = page.evaluate("document.getElementById('tokens').textContent")
        whole = "".join(texts[token] for token in scored.rollout.response_ids)
        assert whole.startswith(drawn) and len(drawn) > 300
        reason = page.evaluate("document.querySelector('.reason')?.textContent")
        assert (reason is None) if said is None else (said in reason)
        assert (page.evaluate("document.querySelectorAll('#tokens .neg').length") > 0) == (said is None)
    assert page.evaluate("document.querySelector('#tokens .special').textContent") == "<think>"
    page.close()


def test_teachers_prompt_and_its_origin(browser: Browser, made: tuple[Path, Written]) -> None:
    page = opened(browser, made[0], "#r1")
    scored, texts = made[1][10][0].rollouts[1], Texts().texts
    page.evaluate("document.getElementById('teacher-prompt').open = true")
    page.wait("document.querySelector('#teacher-prompt pre') !== null")
    assert page.evaluate("document.querySelector('#teacher-prompt pre').textContent") == "".join(texts[t] for t in scored.privileged.view.prompt_ids)
    added = scored.privileged.view.prompt_ids[len(scored.rollout.prompt_ids) - 2:-2]
    assert page.evaluate("document.querySelector('#teacher-prompt mark').textContent") == "".join(texts[t] for t in added)
    assert "5 tokens were cut" in page.evaluate("document.getElementById('origin').textContent")
    assert scored.rollout.feedback in page.evaluate("document.getElementById('feedback').textContent")
    page.evaluate("document.querySelector('#origin a').click()")
    page.wait("document.getElementById('rollout').dataset.row === '0'")
    assert page.evaluate("document.querySelector('#rollout h2').textContent") == "step 10, problem made-0, rollout 0"
    page.close()


def test_tokens_of_words_stand_apart(browser: Browser, tmp_path: Path) -> None:
    texts = Texts()
    group = texts.group("words", 4, 40, 0.0)
    write_scored(tmp_path / "rollouts", 1, "antisd", [group], lambda token: f"w{token}")
    page = opened(browser, write_u_lens([tmp_path]))
    assert page.evaluate("parseFloat(getComputedStyle(document.getElementById('t0')).marginRight)") > 3
    page.evaluate("document.getElementById('student-prompt').open = true")
    page.wait("document.querySelector('#student-prompt pre') !== null")
    words = " ".join(f"w{token}" for token in group.rollouts[0].rollout.prompt_ids)
    assert page.evaluate("document.querySelector('#student-prompt pre').textContent") == words
    page.close()


def test_filters_and_order(browser: Browser, made: tuple[Path, Written]) -> None:
    page = opened(browser, made[0])
    rows = [(step, group, scored) for step, groups in made[1].items() for group in groups for scored in group.rollouts]
    means = [sum(scored.u) / len(scored.u) for *_, scored in rows if scored.u is not None]
    assert type_into(page, "problem", "E-1") == 8
    assert type_into(page, "step", "20") == 4
    assert type_into(page, "reward", ">=1") == 2
    assert type_into(page, "reward", "?") == 4 and page.evaluate("document.querySelector('#list [name=reward]').ariaInvalid") == "true"
    assert [type_into(page, name, "") for name in ("reward", "problem", "step")] == [4, 16, 32]
    assert type_into(page, "truncated", "yes") == 8
    assert type_into(page, "truncated", "") == 32
    assert type_into(page, "source", "no_solution") == 8
    assert type_into(page, "source", "") == 32
    assert type_into(page, "mean", "-10..-0.1") == sum(-10 <= mean <= -0.1 for mean in means)
    type_into(page, "mean", "")
    column = "[...document.querySelectorAll('#list tbody tr[data-row]')].map((row) => row.cells[6].textContent)"
    for order in (sorted(means), sorted(means, reverse=True)):
        page.evaluate("document.querySelectorAll('#list th button')[6].click()")
        drawn = page.evaluate(column)
        assert [float(cell) for cell in drawn[:14]] == pytest.approx(order[:14], abs=6e-4)
    page.evaluate("document.getElementById('list').focus()")
    for key, place in (("Home", 0), ("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1)):
        page.press(key)
        page.wait(f"document.querySelector('#list tr.chosen')?.ariaRowIndex === '{place + 1}'")
        chosen = page.evaluate("document.querySelector('#list tr.chosen').dataset.row")
        page.wait(f"document.getElementById('rollout').dataset.row === '{chosen}'")
    assert type_into(page, "problem", "nowhere") == 0 and page.evaluate("!document.getElementById('none').hidden")
    page.close()


def test_tables_curves_and_heat_map(browser: Browser, made: tuple[Path, Written]) -> None:
    page = opened(browser, made[0])
    page.evaluate("document.getElementById('tab-tokens').click()")
    assert page.evaluate("document.querySelectorAll('#panel-tokens .chart svg .dot').length") == 4
    first = page.evaluate("[...document.querySelectorAll('.extremes')].map((table) => table.tBodies[0].rows[0].cells[0].textContent)")
    assert first[0].lstrip("␣") in {"Wait", "Maybe", "Alternatively", "Hmm", "Let", "But", "perhaps"}
    assert first[1].lstrip("␣") in {"Given", "Assign", "holds", "Therefore", "Thus", "Answer", "final", "boxed"}
    lines, rows = (page.evaluate(f"document.querySelectorAll('.extremes tbody {each}').length") for each in ("svg", "tr"))
    assert lines == rows > 10
    page.evaluate("document.getElementById('tab-heat').click()")
    scored = sum(len(each.u) for groups in made[1].values() for group in groups for each in group.rollouts if each.u is not None)
    assert page.wait("document.getElementById('heat').dataset.total") == str(scored)
    for scale, step, total in (("log", 0, scored), ("log", 1, scored // 2), ("probability", 2, scored // 2)):
        page.evaluate(f"for (const [id, value] of [['heat-scale', '{scale}'], ['heat-step', {step}]]) {{ const box = document.getElementById(id);"
                      "box.value = value; box.dispatchEvent(new Event('change')); }")
        page.wait(f"document.getElementById('heat').dataset.total === '{total}'")
    page.evaluate("document.getElementById('heat').focus()")
    page.press("ArrowLeft")
    page.wait("document.getElementById('heat-readout').textContent.startsWith('π_S 0.9750 to 0.9875, π_T 0.9875 to 1.0000')")
    ink = page.evaluate("(() => { const c = document.getElementById('heat'); const d = c.getContext('2d').getImageData(60, 12, 470, 470).data;"
                        "let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; })()")
    assert ink > 3000
    page.close()


def test_hostile_texts_stay_texts(browser: Browser, tmp_path: Path) -> None:
    texts = Texts()
    group = texts.group(HOSTILE, 4, 60, 0.0)
    run = tmp_path / "<img src=x onerror='window.hurt=2'>"
    write_scored(run / "rollouts", 1, "antisd", [group], lambda token: HOSTILE + "\u202e" if token in texts.offset else texts.texts[token])
    page = opened(browser, write_u_lens([run], tmp_path / "page.html", minimum_count=1), "#r1")
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    page.wait("document.querySelectorAll('details pre').length === 3")
    for tab in ("tab-tokens", "tab-heat", "tab-rollouts"):
        page.evaluate(f"document.getElementById('{tab}').click()")
    page.evaluate("document.getElementById('tokens').scrollIntoView()")  # the opened prompts pushed it far down
    assert HOSTILE + "⟨U+202E⟩" in page.wait("document.getElementById('tokens').textContent")
    assert HOSTILE in page.evaluate("document.querySelector('#rollout h2').textContent")
    assert page.evaluate("[document.images.length, document.scripts.length, typeof window.hurt]") == [0, 2, "undefined"]
    assert page.faults() == [] and len(page.requests()) == 1
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hurt=3\"><script>window.hurt=4</script>')")
    assert page.evaluate("new Promise((done) => setTimeout(() => done(typeof window.hurt), 200))") == "undefined"  # the policy holds too
    assert any("Content Security Policy" in fault for fault in page.faults())
    page.close()


def check_long_responses(browser: Browser, path: Path, tokens: int) -> None:
    page = opened(browser, path)
    nodes = "document.querySelectorAll('*').length"
    most = int(page.evaluate(nodes))
    for _ in range(60):
        page.evaluate("(() => { const box = document.getElementById('rollout'); box.scrollTop += 2000; })()")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        most = max(most, int(page.evaluate(nodes)))
        if page.evaluate("(() => { const b = document.getElementById('rollout'); return b.scrollTop + b.clientHeight >= b.scrollHeight - 2; })()"):
            break
    page.wait(f"document.getElementById('t{tokens - 1}')?.getBoundingClientRect().bottom < innerHeight")
    assert most < MOST_NODES
    assert page.evaluate("document.getElementById('t0')") is None  # the beginning was let go
    page.evaluate("document.getElementById('tokens').focus()")
    page.press("Home")
    page.wait("document.getElementById('t0')?.getBoundingClientRect().top > 0")
    assert page.faults() == []
    page.close()


def test_scrolling_to_the_end_of_a_long_response(browser: Browser, tmp_path: Path) -> None:
    write_steps(tmp_path, steps=(1,), groups=1, size=3, tokens=4096)
    check_long_responses(browser, write_u_lens([tmp_path]), 4096)


@pytest.mark.slow
def test_200_rollouts_of_4096_tokens(browser: Browser, tmp_path: Path) -> None:
    write_steps(tmp_path, steps=(1,), groups=25, size=8, tokens=4096, kinds=("peer",))
    check_long_responses(browser, write_u_lens([tmp_path]), 4096)
