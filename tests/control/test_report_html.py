import copy
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import pytest

from fastdistill.control.report_html import duration, file_size, render_html
from fastdistill.control.session import RunResult
from fastdistill.core.canonical import digest
from tests.control.test_progress import HOSTILE, ran

VOID = {"meta"}
LEFT_OPEN = {"th", "td"}  # HTML closes them by itself


class Page(HTMLParser):
    """The elements of a page, and the words that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID | LEFT_OPEN:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in LEFT_OPEN:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return ran(tmp_path_factory.mktemp("artifacts"))[1]


def page(result: RunResult, **changed: Mapping[str, Any]) -> Page:
    reports = {"manifest": result.manifest, "quality": result.quality, "timing": result.timing} | changed
    return Page(render_html(**reports))


def test_page_shows_the_figures_of_the_run(result: RunResult) -> None:
    text = page(result).text
    for words in (
        "text2sql below floor",
        "accepted samples 6 of 11 read",
        "accept rate 75.0% 95%: 40.9 to 92.9",
        "read 11 duplicates 1 contaminated 0 failed 1 skipped 0 completed 9 accepted 6 undecided 1",
        "min_accepted 1 6 met",
        "accept_rate 90.0% 75.0% [40.9, 92.9] missed",
        "pass rate 88.9% [56.5, 98.0] 8 of 9",
        "exec pass rate 87.5% [52.9, 97.8] 7 of 8",
        "infra_timeout 1 sql_error 1",
        "no such column 1 no such column: <script>",
        "TextGeneration timeout 1 no answer <script>",
        "teacher teacher-7b (scripted)",
        "answers paid 9 0 from the store",
        "served-7b sha256:beef 9",
        "asked a second time 2",
        "rate_limited 3",
        "cost $0.0013",
    ):
        assert words in text


def test_page_says_where_everything_comes_from(result: RunResult) -> None:
    text = page(result).text
    assert result.manifest["config_sha256"] in text
    for stage in result.manifest["stages"]:
        assert stage["fingerprint"] in text
    for output in result.manifest["outputs"]:
        assert f"{output['path']} {file_size(output['bytes'])} {output['sha256']}" in text
    for name, version in result.manifest["versions"].items():
        assert f"{name} {version}" in text


def test_inputs_are_listed_with_their_hashes(result: RunResult) -> None:
    entry = {"path": "/data/<b>train.jsonl", "bytes": 20_300_000, "sha256": digest("train")}
    gone = {"path": "/data/gone.db", "bytes": None, "sha256": digest("gone")}
    shown = page(result, manifest={**result.manifest, "inputs": [entry, gone]}).text
    assert f"/data/<b>train.jsonl 20.3 MB {digest('train')}" in shown
    assert f"/data/gone.db – {digest('gone')}" in shown


def test_what_a_model_says_is_text_and_never_markup(result: RunResult) -> None:
    html = render_html(result.manifest, result.quality, result.timing)
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert " ".join(HOSTILE.split()) in page(result).text


def test_any_string_of_the_reports_may_be_hostile(result: RunResult) -> None:
    """Names, reasons, builds, paths: whatever is a value, or a key that a config chose."""
    hostile = '"><img src=x onerror=alert(1)>'

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        return hostile if isinstance(value, str) else value

    quality, manifest, timing = (
        copy.deepcopy(dict(report)) for report in (result.quality, result.manifest, result.timing)
    )
    for stage in quality["stages"]:
        if "candidates" in stage:
            stage["candidates"]["reasons"] = {hostile: 1}
    timing["models"] = {hostile: timing["models"]["teacher"] | {"retries": {hostile: 1}}}
    manifest["models"] = {hostile: manifest["models"]["teacher"]}
    shown = page(result, manifest=poison(manifest), quality=poison(quality), timing=poison(timing))
    assert "img" not in {tag for tag, _ in shown.elements}
    assert "onerror=alert(1)>" in shown.text


def test_page_is_one_file_without_script(result: RunResult) -> None:
    shown = page(result)
    assert shown.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in shown.elements}
    assert not [attrs for _, attrs in shown.elements if {"src", "href"} & set(attrs)]
    html = render_html(result.manifest, result.quality, result.timing)
    assert "url(" not in html
    assert "default-src 'none'" in html


def test_bars_and_whiskers_are_drawn_to_scale(result: RunResult) -> None:
    styles = {attrs["class"]: attrs["style"] for tag, attrs in page(result).elements if tag == "i" and "style" in attrs}
    assert styles["bar accepted"] == f"width: {100 * 6 / 11:.2f}%"
    html = render_html(result.manifest, result.quality, result.timing)
    rate = result.quality["samples"]["accept_rate"]
    assert re.search(
        rf'<i class="fill" style="width: 75.00%"></i><i class="whisker" style="left: {100 * rate["low"]:.2f}%;'
        rf' width: {100 * (rate["high"] - rate["low"]):.2f}%"></i>',
        html,
    )


def test_scores_are_drawn_as_columns(result: RunResult) -> None:
    quality = copy.deepcopy(dict(result.quality))
    quality["candidates"]["scores"] = {"0.0": 1, "0.5": 4, "1.0": 2}
    columns = [attrs for tag, attrs in page(result, quality=quality).elements if (attrs.get("title") or "") == "0.5: 4"]
    assert [attrs["style"] for attrs in columns] == ["left: 49.25%; height: 100.00%"]


def test_a_run_that_reached_nothing_has_a_page(result: RunResult) -> None:
    nothing: dict[str, Any] = {
        **result.quality,
        "samples": dict.fromkeys(result.quality["samples"], 0)
        | {"accept_rate": {"successes": 0, "total": 0, "rate": None, "low": None, "high": None}},
        "candidates": {"generated": 0, "selected": 0, "finish_reasons": {}, "cuts": {}, "scores": {}},
        "tokens": {"prompt": 0, "completion": 0, "accepted_samples_per_1000_tokens": None},
        "stages": [],
        "failures": [],
        "floor": [],
    }
    manifest = {**result.manifest, "status": "interrupted", "finished": None, "inputs": [], "outputs": [], "stages": []}
    shown = page(result, manifest=manifest, quality=nothing, timing={"wall_s": 0.0, "steps": {}, "models": {}})
    assert "interrupted" in shown.text
    assert "No gate has judged a candidate." in shown.text


def test_amounts_read_well() -> None:
    seconds = (0, 8.5e-5, 0.0042, 0.9999, 1.734, 130)
    assert [duration(each) for each in seconds] == ["0", "85 µs", "4.2 ms", "1 s", "1.73 s", "2:10"]
    assert [file_size(each) for each in (512, 1500, 999_999, 20_300_000)] == ["512 B", "1.5 kB", "1.0 MB", "20.3 MB"]
