"""The page in a real browser: it does what it should, and nothing that model text asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import LAPTOP, PHONE, chromium, complaints, show
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.common.selenium_manager import SeleniumManager
from selenium.webdriver.support.wait import WebDriverWait

from rft.report import write_report
from rft.reporting.arms import Arm, Member, Pair
from rft.reporting.comparison import Comparison
from rft.reporting.page import comparison_page
from rft.reporting.tables import Cell, Table
from rft.tracking.files import RunFiles
from rft.tracking.run import read_run

PAYLOADS = [
    "<script>window.owned=1</script>",
    "</script><script>window.owned=1</script>",
    "<img src=x onerror=window.owned=1>",
    "javascript:window.owned=1",
    "<svg/onload=window.owned=1>",
    "'\"><iframe srcdoc='<script>parent.owned=1</script>'>",
    "a\u2028window.owned=1//\u2029b",
    "\u202egnp.tset\u202c",
    "{{7*7}}${7*7}<%=7*7%>",
    "<!--<script>",
]
STEPS, TASKS, EACH = 12, 5, 8


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Selenium could download a driver; here that would be an error."""

    def never(*_: Any) -> Any:
        raise AssertionError("selenium looks for a driver")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeleniumManager, "binary_paths", never)
        with chromium(tmp_path_factory.mktemp("chromium")) as running:
            yield running


def fill(folder: Path, seed: int = 0) -> Path:
    """A run with `STEPS` steps of `TASKS` tasks x `EACH` rollouts, some of them attacks."""
    rng = np.random.default_rng(seed)
    files = RunFiles(folder)
    number = 0
    for step in range(1, STEPS + 1):
        metrics = {"reward/mean": 0.3 + 0.04 * step, "policy/grad_norm": 1.0 / step}
        metrics |= {"selection/effective_task_ratio": 0.6, "mismatch/max_abs": 0.02 * step}
        times = {"time/generate": 2.0, "time/learn": 3.0, "time/sync": 0.2, "time/step": 5.2}
        files.metrics(step, {**metrics, **times, "tokens/generated": 4000})
        rows = []
        for i in range(TASKS * EACH):
            attack = PAYLOADS[number % len(PAYLOADS)]
            words = [
                "So",
                " the",
                " answer",
                " is",
                "\n",
                attack,
                " \\",
                "boxed",
                "{",
                "12",
                "}",
                "é≤",
            ]
            gaps = np.round(rng.normal(0, 0.03, len(words)), 5).tolist()
            reward = float(i % 3 == 0)
            rows.append(
                {
                    "task": f"task-{i // EACH} {attack if i % 4 == 0 else ''}",
                    "index": i % EACH,
                    "prompt": [{"role": "user", "content": f"What is {i // EACH} + 12? {attack}"}],
                    "text": "".join(words),
                    "finish": "length" if i % 7 == 0 else "stop",
                    "reward": reward,
                    "reason": "correct" if reward else ("error" if i % 5 == 0 else "wrong"),
                    "detail": attack if i % 5 == 0 else "",
                    "tokens": len(words),
                    "version": step - 1,
                    "pieces": [len(word) for word in words],
                    "gaps": None if i // EACH == 4 else gaps,
                    **({"versions": [step - 1] * 6 + [step] * 6} if i // EACH == 1 else {}),
                }
            )
            number += 1
        files.rollouts(step, rows)
    for step in (0, 6, 12):
        row = {"step": step, "set": "test", "k": 4, "accuracy": 0.2 + 0.03 * step, "ci95": 0.02}
        files.evaluation({**row, "tokens_so_far": 4000 * step, "seconds_so_far": 5.2 * step})
    files.close()
    (folder / "config.yaml").write_text(json.dumps({"seed": seed, "model": {"path": PAYLOADS[2]}}))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run."""
    return write_report(fill(tmp_path_factory.mktemp("runs") / "letters <b>bots"))[1]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two arms of two runs each."""
    folder = tmp_path_factory.mktemp("compared")
    arms = []
    for label in ("uniform", PAYLOADS[0]):
        runs = [read_run(fill(folder / f"{len(arms)}-{seed}", seed)) for seed in (0, 1)]
        members = [
            Member(
                f"{run.name}/it", run, {"steps": STEPS}, Pair(seed=k, model="tiny", pool="pool"), {}
            )
            for k, run in enumerate(runs)
        ]
        arms.append(Arm(label, tuple(members)))
    nan = float("nan")
    columns = ("TTB 25%", "TTB 50%", "TTB 75%", "TTB 100%", "BSF 25%", "BSF 50%", "BSF 100%")
    cells = (Cell(0.79, 0.72, 0.85, 2, 2), Cell(nan, nan, nan, 0, 2), Cell(1.2, nan, nan, 1, 2))
    rows = tuple((arm.label, (cells * 3)[:7]) for arm in arms)
    tables = tuple(
        Table(
            f"{set_}, at equal {clock}", columns, rows, (f"In {clock}. {PAYLOADS[2]}",), set_, clock
        )
        for set_ in ("", "test", PAYLOADS[1])
        for clock in ("steps", "tokens")
    )
    comparison = Comparison(tuple(arms), "uniform", tables, ("Means over runs.",), (), {})
    path = folder / "report.html"
    path.write_text(comparison_page(comparison), encoding="utf-8")
    return path


def text(driver: Chrome, css: str) -> str:
    """What an element says, whether or not it is in sight."""
    found = driver.execute_script("return document.querySelector(arguments[0]).textContent", css)
    return " ".join(found.split())


def count(driver: Chrome) -> str:
    return text(driver, "#count")


def press(driver: Chrome, *keys: str) -> None:
    for key in keys:
        driver.switch_to.active_element.send_keys(key)


def selected(driver: Chrome) -> int:
    """Place of the row that is selected, from 1. Rows may be drawn anew at any time, so that no
    element is held on to."""
    found = driver.execute_script(
        "const row = document.querySelector('#list [aria-selected=true]');"
        "const active = document.getElementById('list').getAttribute('aria-activedescendant');"
        "return row && [row.id === active, row.getAttribute('aria-posinset')]"
    )
    assert found
    assert found[0]
    return int(found[1])


def rows(driver: Chrome) -> list[dict[str, str]]:
    """The rows that are in the document: what they say, and of how many they are."""
    found: list[dict[str, str]] = driver.execute_script(
        "return [...document.querySelectorAll('#list [role=option]')].map("
        "row => ({text: row.textContent, of: row.getAttribute('aria-setsize')}))"
    )
    return found


def type_into(driver: Chrome, name: str, value: str, expected: str) -> None:
    """Fill in a filter, and wait for it to be applied."""
    field = driver.find_element(By.CSS_SELECTOR, f"#filters [name={name}]")
    field.send_keys(value)
    WebDriverWait(driver, 60, 0.02).until(lambda d: count(d) == expected, count(driver))


def click(driver: Chrome, row: str) -> None:
    """At once: a resize may draw the rows anew at any time."""
    driver.execute_script("document.getElementById(arguments[0]).click()", row)


def clear(driver: Chrome) -> None:
    driver.find_element(By.CSS_SELECTOR, "#filters [type=reset]").click()
    driver.execute_async_script("setTimeout(arguments[0], 30)")  # its filter comes in a moment
    WebDriverWait(driver, 60, 0.02).until(lambda d: "of" not in count(d).split())


def test_every_rollout_is_listed_and_few_are_in_the_document(driver: Chrome, page: Path) -> None:
    show(driver, page)
    assert count(driver) == f"{STEPS * TASKS * EACH} rollouts"
    there = rows(driver)
    assert 5 < len(there) < 40
    assert there[0]["of"] == str(STEPS * TASKS * EACH)
    press(driver, "j", Keys.NULL)
    driver.find_element(By.ID, "list").send_keys(Keys.END)
    WebDriverWait(driver, 60, 0.02).until(
        lambda d: d.execute_script("return document.querySelector('#list [aria-selected=true]')")
    )
    assert selected(driver) == STEPS * TASKS * EACH
    assert f"step {STEPS}" in text(driver, "#list [aria-selected=true]")
    assert complaints(driver) == []


def test_filters_by_step_task_reward_reason_and_text(driver: Chrome, page: Path) -> None:
    show(driver, page)
    whole = STEPS * TASKS * EACH
    type_into(driver, "step_from", "3", f"{10 * 40} of {whole} rollouts")
    type_into(driver, "step_to", "4", f"{2 * 40} of {whole} rollouts")
    type_into(driver, "task", "TASK-2", f"16 of {whole} rollouts")
    type_into(driver, "reward_from", "1", f"4 of {whole} rollouts")
    there = rows(driver)
    assert len(there) == 4
    assert all("task-2" in row["text"] and "correct" in row["text"] for row in there)
    clear(driver)
    type_into(driver, "reason", "error", f"{STEPS * 5} of {whole} rollouts")
    clear(driver)
    type_into(driver, "text", "onerror=WINDOW", f"{whole // len(PAYLOADS)} of {whole} rollouts")
    clear(driver)
    type_into(driver, "text", "nowhere", f"0 of {whole} rollouts")
    assert rows(driver) == []
    press(driver, Keys.ESCAPE, Keys.ENTER, "j")
    assert complaints(driver) == []


def test_the_largest_gap_comes_first_where_that_is_asked_for(driver: Chrome, page: Path) -> None:
    show(driver, page)
    driver.find_element(By.CSS_SELECTOR, "#filters [name=order]").send_keys("largest")
    driver.find_element(By.ID, "filters").submit()
    press(driver, Keys.ENTER)

    def gap() -> float:
        return float(text(driver, ".facts dd:last-of-type"))

    gaps = [gap()]
    for _ in range(5):
        press(driver, "j")
        gaps.append(gap())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.09


def test_all_of_it_works_from_the_keyboard(driver: Chrome, page: Path) -> None:
    show(driver, page)
    driver.find_element(By.TAG_NAME, "body").send_keys("/")
    assert driver.switch_to.active_element.get_attribute("name") == "text"
    press(driver, "jk/")  # letters, and no commands, in a field
    assert driver.switch_to.active_element.get_attribute("value") == "jk/"
    clear(driver)
    driver.find_element(By.CSS_SELECTOR, "[name=text]").send_keys(Keys.ESCAPE)
    assert driver.switch_to.active_element.get_attribute("id") == "list"
    press(driver, "j", Keys.ARROW_DOWN, "j", "k")
    assert selected(driver) == 3
    detail = driver.find_element(By.ID, "detail")
    assert not detail.is_displayed()
    press(driver, Keys.ENTER)
    assert detail.is_displayed()
    assert "no. 2" in text(driver, "#detail h3")
    assert driver.switch_to.active_element.get_attribute("class") == "tokens"
    press(driver, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert text(driver, ".token.at") == "the"
    assert text(driver, "#readout").startswith("token 2 of 12 · gap ")
    press(driver, Keys.ARROW_LEFT)
    assert text(driver, ".token.at") == "So"
    press(driver, "j")
    assert "no. 3" in text(driver, "#detail h3")
    assert driver.switch_to.active_element.get_attribute("class") == "tokens"
    outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    press(driver, Keys.ESCAPE)
    assert not detail.is_displayed()
    assert driver.switch_to.active_element.get_attribute("id") == "list"
    assert selected(driver) == 4
    assert complaints(driver) == []


def test_every_control_has_a_name(driver: Chrome, page: Path) -> None:
    show(driver, page)
    click(driver, "row0")
    named = """return [...document.querySelectorAll('input, select, button, [tabindex]')].filter(
        e => !(e.labels && e.labels.length) && !e.getAttribute('aria-label')
             && !(e.tagName == 'BUTTON' && e.textContent.trim())).map(e => e.outerHTML)"""
    assert driver.execute_script(named) == []


def test_tokens_show_gap_and_version(driver: Chrome, page: Path) -> None:
    show(driver, page)
    driver.execute_script("document.getElementById('list').focus()")
    press(driver, *["j"] * EACH, Keys.ENTER)  # task 1: of two versions
    assert text(driver, ".facts").count("0 to 1") == 1
    assert text(driver, "sup.version") == "v0"
    tokens = driver.find_elements(By.CSS_SELECTOR, ".token")
    assert len(tokens) == 12
    coloured = [
        t
        for t in tokens
        if any(c[:2] in ("up", "do") for c in (t.get_attribute("class") or "").split())
    ]
    assert len(coloured) > 8
    tokens[6].click()
    said = text(driver, "#readout")
    assert "token 7 of 12" in said
    assert said.endswith("version 1")
    assert "less the engine's" in text(driver, "#detail .legend")
    press(driver, *["j"] * 3 * EACH)  # task 4: nothing was computed
    assert "not computed" in text(driver, ".facts")
    assert driver.find_elements(By.CSS_SELECTOR, "#detail .legend") == []


@pytest.mark.parametrize("which", ["page", "compared"])
def test_model_text_does_nothing_and_is_shown(
    driver: Chrome, which: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(which)
    show(driver, path)
    before = driver.execute_script("return document.querySelectorAll('script, iframe').length")
    driver.execute_script("document.getElementById('list').focus()")
    press(driver, Keys.ENTER)
    for payload in PAYLOADS:
        shown = payload
        for hidden in "\u2028\u2029\u202e\u202c":
            shown = shown.replace(hidden, f"U+{ord(hidden):X}")
        for css in (".tokens", ".prompt"):
            assert shown in text(driver, f"#detail {css}")
        press(driver, "j")
    assert driver.execute_script("return window.owned") is None
    assert (
        driver.execute_script("return document.querySelectorAll('script, iframe').length") == before
    )
    assert (
        driver.execute_script("return document.querySelectorAll('#detail img, #detail svg').length")
        == 0
    )
    assert driver.current_url == path.as_uri()
    assert complaints(driver) == []


def test_nothing_is_loaded_and_foreign_scripts_do_not_run(driver: Chrome, page: Path) -> None:
    driver.get_log("performance")
    show(driver, page)
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in sent if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    driver.execute_script(
        "const s = document.createElement('script'); s.text = 'window.owned = 1';"
        "document.body.append(s)"
    )
    assert driver.execute_script("return window.owned") is None
    assert any("Content Security Policy" in entry["message"] for entry in complaints(driver))


def test_a_comparison_has_its_tables_and_the_rollouts_of_each_run(
    driver: Chrome, compared: Path
) -> None:
    show(driver, compared)
    words = text(driver, "main")
    for part in (
        "test, at equal tokens",
        "0.79",
        "[0.72, 0.85] (2)",
        "1.20 (1/2)",
        "–",
        "In steps. <img",
    ):
        assert part in words
    whole = f"{4 * STEPS * TASKS * EACH:,}"
    assert count(driver) == f"{whole} rollouts"
    type_into(driver, "run", "uniform · 0-1/it", f"480 of {whole} rollouts")
    # What was typed up to "0-" finds another run first, with as many rollouts.
    there = "uniform · 0-1/it"
    WebDriverWait(driver, 60, 0.02).until(lambda d: text(d, "#row0 .run") == there)
    assert complaints(driver) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE])
@pytest.mark.parametrize("which", ["page", "compared"])
def test_it_fits_a_laptop_and_a_phone_in_light_and_dark(
    driver: Chrome,
    which: str,
    size: tuple[int, int],
    theme: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    show(driver, request.getfixturevalue(which), size, theme)
    wide = "return document.documentElement.scrollWidth"
    assert driver.execute_script(wide) == size[0]
    driver.save_screenshot(str(tmp_path / f"{which}-{size[0]}-{theme}.png"))
    background = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
    assert (int(driver.execute_script(background)) > 128) == (theme == "light")
    driver.execute_script("document.getElementById('browser').scrollIntoView()")
    click(driver, "row1")
    assert driver.execute_script(wide) == size[0]
    detail = driver.find_element(By.ID, "detail").rect
    assert (detail["width"] == size[0]) == (size is PHONE)
    driver.save_screenshot(str(tmp_path / f"{which}-{size[0]}-{theme}-open.png"))
