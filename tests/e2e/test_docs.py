"""The README and the documentation, read as their readers do: links followed, configs checked, commands run.

A block after `<!-- run -->` is executed, one after `<!-- file: NAME -->` is written to that file: all blocks of a page
in order, in one folder, with scripted servers in the place of Ollama and OpenAI, and a small WikiSQL release.
"""

import ast
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from fastdistill.control.budget import Budget, Target
from fastdistill.control.cli import app
from fastdistill.control.config import merge, parse_pipeline
from fastdistill.control.floor import Floor
from fastdistill.control.ledger import SCHEMA
from fastdistill.control.registry import PROVIDERS, STEPS, provider_class, step_class
from fastdistill.control.session import Pipeline
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import ExitCode
from fastdistill.data.execution.math import MathLimits, MathReason
from fastdistill.data.execution.python_child import PythonReason
from fastdistill.data.execution.python_pool import PythonLimits
from fastdistill.data.execution.sandbox import IsolationLevel
from fastdistill.data.execution.sqlite_guard import SqlLimits, SqlReason
from fastdistill.data.generate import Until
from fastdistill.data.rules import RuleReason
from fastdistill.model.provider import Capabilities, Price
from tests.servers import Call, ollama_server, openai_server

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "sections" / "fastdistill"
ALL = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
ENGLISH = [page for page in ALL if not page.stem.endswith("_zh")]

_BLOCK = re.compile(r"^(?:<!-- (?P<mark>run|file: \S+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_HEADING = re.compile(r"^(#+) (.+)$", re.M)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"`(fastdistill [^`]+)`")


@dataclass(frozen=True)
class Block:
    mark: str | None
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    found = [Block(m["mark"], m["language"], m["text"]) for m in _BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def headings(page: Path) -> list[tuple[int, str]]:
    return [(len(marks), title) for marks, title in _HEADING.findall(prose(page))]


def section(page: Path, title: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#+ |\Z)", prose(page), re.M | re.S)
    assert found, f"{page.name} has no section {title!r}"
    return found[1]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", ENGLISH, ids=named)
def test_a_page_and_its_chinese_twin_say_the_same(page: Path) -> None:
    twin = page.with_stem(f"{page.stem}_zh")
    assert twin.exists(), f"write {named(twin)}"
    assert blocks(twin) == blocks(page)
    assert [level for level, _ in headings(twin)] == [level for level, _ in headings(page)]
    tables = [len(re.findall(r"^\|", section_, re.M)) for section_ in re.split(r"^#+ ", prose(page), flags=re.M)]
    assert [
        len(re.findall(r"^\|", section_, re.M)) for section_ in re.split(r"^#+ ", prose(twin), flags=re.M)
    ] == tables, "tables differ"
    assert re.search(r"[\u4e00-\u9fff]{4}", prose(twin))


@pytest.mark.parametrize("page", ALL, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            assert anchor in map(_anchor, (title for _, title in headings(file))), link
        if page.stem.endswith("_zh") and file.suffix == ".md" and file.with_stem(f"{file.stem}_zh").exists():
            assert file == page.with_stem(page.stem.removesuffix("_zh")), f"{link} leads to the English page"


def _anchor(title: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("language", ["", "_zh"])
def test_the_index_leads_to_every_page(language: str) -> None:
    index = DOCS / f"index{language}.md"
    linked = {(DOCS / link).resolve() for link in _LINK.findall(prose(index))}
    pages = {page for page in DOCS.glob("*.md") if page.stem.endswith("_zh") == bool(language)} - {index}
    assert not [named(page) for page in pages - linked]


@pytest.mark.parametrize("page", ALL, ids=named)
def test_every_command_shown_exists(page: Path) -> None:
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if "fastdistill" in words:
                words = words[words.index("fastdistill") + 1 :]
                command, rest = _command(words)
                command.make_context(command.name, rest)  # raises UsageError
            elif words[:1] == ["make"]:
                targets = [word for word in words[1:] if "=" not in word]
                assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets), line
    for text in _COMMAND.findall(prose(page)):
        command, rest = _command(shlex.split(text)[1:])
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in rest if word.startswith("-")} <= known, text


def _command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and its arguments."""
    command: Any = get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"fastdistill has no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


PREPARED: list[Any] = [{"LoadJsonl": {"path": "train.jsonl"}}, {"CanonicalizeFields": {"fields": ["instruction"]}}]
BASE = {
    "name": "documented",
    "models": {"teacher": {"provider": "embedded"}},
    "steps": [
        *PREPARED,
        {"TextGeneration": {"template": "{{ instruction }}"}},
        "RuleFilter",
        {"SQLiteExecEval": {"db_path": "train.db"}},
        "ExportSFT",
    ],
}
"""What a part of a config is checked with."""


@pytest.mark.parametrize("page", ALL, ids=named)
def test_every_config_shown_is_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        shown = yaml.safe_load(block.text)
        if isinstance(shown, list):
            shown = {"steps": [*PREPARED, *shown]}
        elif isinstance(after := shown.get("steps"), list) and "LoadJsonl" not in after[0]:
            shown |= {"steps": [*PREPARED, *after]}  # the steps after generation, for regate
        base = BASE
        if "provider" in shown.get("models", {}).get("teacher", {}):
            base = {**BASE, "models": {}}
        parse_pipeline(merge(base, shown), {})


@pytest.mark.parametrize("page", ENGLISH, ids=named)
def test_every_other_block_is_well_formed(page: Path) -> None:
    for block in blocks(page):
        match block.language:
            case "python":
                ast.parse(block.text)
            case "json":
                json.loads(block.text)
            case "toml":
                tomllib.loads(block.text)
            case "sql":
                with closing(sqlite3.connect(":memory:")) as ledger:
                    ledger.executescript(SCHEMA)
                    ledger.execute(block.text)
            case language:
                assert language in ("bash", "yaml", "text")


@pytest.mark.parametrize("language", ["", "_zh"])
def test_config_names_every_key_with_its_default(language: str) -> None:
    page = DOCS / f"config{language}.md"
    parts: dict[str, Any] = {name: step_class(name) for name in STEPS}
    parts |= {"require": Floor, "target": Target, "budget": Budget, "price": Price}
    parts |= {"decode_profile": DecodeProfile, "until": Until}
    for title, part in parts.items():
        text = section(page, title)
        for key, field in part.model_fields.items():
            if title in STEPS and key == "name":
                continue
            row = re.search(rf"^\| `{key}` \| (.*?) \|", text, re.M)
            assert row, f"{page.name}: {title}.{key}"
            if field.default is None or isinstance(field.default, bool | int | float | str):
                assert row[1] == f"`{json.dumps(field.default)}`", f"{page.name}: {title}.{key}"
    whole = prose(page)
    for model in (Pipeline, *(provider_class(kind).Config for kind in PROVIDERS)):
        for key in model.model_fields:
            assert f"| `{key}` |" in whole, f"{page.name}: {key}"
    assert all(f"`{kind}`" in whole for kind in PROVIDERS)


@pytest.mark.parametrize("language", ["", "_zh"])
def test_cli_names_every_command_option_and_exit_code(language: str) -> None:
    text = prose(DOCS / f"cli{language}.md")
    waiting: list[tuple[str, Any]] = [("fastdistill", get_command(app))]
    while waiting:
        path, command = waiting.pop()
        if hasattr(command, "commands"):
            waiting += [(f"{path} {name}", inner) for name, inner in command.commands.items()]
            continue
        assert f"`{path}" in text, path
        for parameter in command.params:
            shown = parameter.opts if parameter.opts[0].startswith("-") else [str(parameter.name).upper()]
            assert all(f"`{name}" in text for name in shown), f"{path} {parameter.name}"
    for code in ExitCode:
        assert f"| {code.value} | `{code.name}` |" in text
    readme = prose(ROOT / f"README{language}.md")
    assert all(f"| {code.value} | " in readme for code in ExitCode)


@pytest.mark.parametrize("language", ["", "_zh"])
def test_gates_names_every_reason_with_its_outcome_and_every_limit(language: str) -> None:
    page = DOCS / f"gates{language}.md"
    for rule in RuleReason:
        assert f"| `{rule}` | {rule.outcome} |" in section(page, "RuleFilter")
    text = prose(page)
    sql, rest = text.split("\n## PythonExecEval\n")
    python, maths = rest.split("\n## MathExecEval\n")
    reasons: dict[str, Iterable[SqlReason | PythonReason | MathReason]] = {
        sql: SqlReason,
        python: PythonReason,
        maths: MathReason,
    }
    for part, known in reasons.items():
        for reason in known:
            assert f"| `{reason}` | {reason.outcome} |" in part
    for part, limits in ((sql, SqlLimits()), (python, PythonLimits()), (maths, MathLimits())):
        for name, value in asdict(limits).items():
            assert f"| `{name}` | {value} |" in part
    assert all(f"\n| `{level}` |" in python for level in IsolationLevel)


@pytest.mark.parametrize("language", ["", "_zh"])
def test_teachers_names_every_provider_variable_and_what_is_probed(language: str) -> None:
    text = prose(DOCS / f"teachers{language}.md")
    providers = (ROOT / "src" / "fastdistill" / "model" / "providers").glob("*.py")
    code = "".join(path.read_text() for path in providers)
    variables = set(re.findall(r'"((?:OLLAMA|OPENAI|OPENROUTER|VLLM|SGLANG)_[A-Z_]+)"', code))
    names = {*PROVIDERS, *variables, *Capabilities.__dataclass_fields__}
    assert variables
    assert not [name for name in names if f"`{name}`" not in text]


# --- the blocks that run ---

QUESTIONS = 45


def teacher(call: Call, index: int) -> str:
    """The right query, in several dresses, or a wrong one; it depends on the prompt, the seed and the index only."""
    number = found[1] if (found := re.search(r"of player (\d+)", call.prompt)) else "0"
    right = f"SELECT team FROM table_1_1_1 WHERE player = 'player {number}'"
    answers = [right, f"```sql\n{right};\n```", right + ";", "SELECT player FROM table_1_1_1"]
    return answers[call.digest(index) % len(answers)]


def write_release(folder: Path) -> Path:
    """A small release of WikiSQL, packed as the official one."""
    data = folder / "data"
    data.mkdir(parents=True)
    for split in ("train", "dev"):
        query = {"sel": 2, "agg": 0}
        lines = [
            {
                "phase": 1,
                "table_id": "1-1-1",
                "question": f"What is the team of player {n}?",
                "sql": {**query, "conds": [[0, 0, f"Player {n}"]]},
            }
            for n in range(QUESTIONS)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        header = {"id": "1-1-1", "header": ["Player", "No.", "Team"], "types": ["text", "real", "text"], "rows": []}
        (data / f"{split}.tables.jsonl").write_text(json.dumps(header) + "\n")
        with closing(sqlite3.connect(data / f"{split}.db")) as database, database:
            database.execute("CREATE TABLE table_1_1_1 (col0 text, col1 real, col2 text)")
            rows = [(f"player {n}", n, f"team {n % 7}") for n in range(QUESTIONS)]
            database.executemany("INSERT INTO table_1_1_1 VALUES (?, ?, ?)", rows)
    with tarfile.open(folder / "data.tar.bz2", "w:bz2") as tar:
        tar.add(data, "data")
    return folder / "data.tar.bz2"


def play(page: Path, folder: Path, release: Path, urls: dict[str, str]) -> list[str]:
    """Runs a page's blocks in a folder; what each printed."""
    cached = folder / "home" / ".cache" / "fastdistill" / "datasets" / "wikisql" / release.name
    cached.parent.mkdir(parents=True)
    cached.symlink_to(release)
    (folder / "examples").symlink_to(ROOT / "examples")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
        "LANG": "C.UTF-8",
        "COLUMNS": "200",
        "OPENBLAS_NUM_THREADS": "1",
        **urls,
    }
    printed = []
    for block in blocks(page):
        if block.mark is None:
            continue
        if block.mark != "run":
            (folder / block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
            continue
        if block.language == "sql":
            ledger = max(folder.glob("artifacts/runs/*/ledger.sqlite"), key=lambda path: path.stat().st_mtime)
            with closing(sqlite3.connect(f"{ledger.as_uri()}?mode=ro", uri=True)) as connection:
                printed.append(str(connection.execute(block.text).fetchall()))
            continue
        command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
        done = subprocess.run(
            [*command, block.text],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{block.text}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return printed


PLAYED = [page for page in ENGLISH if any(block.mark for block in blocks(page))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    return {page: tmp_path_factory.mktemp(page.stem) for page in PLAYED}


@pytest.fixture(scope="module")
def plays(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[Path, Path]
) -> Iterator[dict[Path, Future[list[str]]]]:
    """Every page being played, two at a time."""
    release = write_release(tmp_path_factory.mktemp("release"))
    with (
        ollama_server(teacher, models=["llama3.1:8b", "student-model"]) as ollama,
        openai_server(teacher, models=["gpt-4o-mini"], api_key="sk-...") as openai,
        ThreadPoolExecutor(2) as pool,
    ):
        urls = {"OLLAMA_HOST": ollama.url, "OPENAI_BASE_URL": openai.url}
        yield {page: pool.submit(play, page, folder, release, urls) for page, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("page", PLAYED, ids=named)
def test_the_blocks_of_a_page_run(page: Path, plays: dict[Path, Future[list[str]]]) -> None:
    printed = plays[page].result()
    assert all(printed), "a block printed nothing"


@pytest.mark.slow
def test_the_readme_tells_what_its_commands_print(plays: dict[Path, Future[list[str]]]) -> None:
    printed = plays[ROOT / "README.md"].result()
    assert "0 answers paid" in printed[-1]
    assert any("2 of 2 accepted" in text for text in printed)
    assert "wikisql-train-00003" in printed[-1]
    assert "ready" in plays[DOCS / "teachers.md"].result()[0]


@pytest.mark.slow
def test_the_math_page_tells_what_its_gate_says(plays: dict[Path, Future[list[str]]]) -> None:
    _, run, verdicts, audited = plays[DOCS / "math_gsm8k.md"].result()
    assert "MathExecEval" in run
    outcomes = Counter((outcome, reason) for _, _, outcome, reason, *_ in ast.literal_eval(verdicts))
    assert outcomes[("pass", "match")] >= 5
    assert {("error", "ambiguous"), ("fail", "mismatch"), ("fail", "no_answer")} <= outcomes.keys()
    assert "times_ten" in audited and "false_accept" not in audited and "false_reject" not in audited


@pytest.mark.slow
def test_a_repeated_run_of_the_reproducibility_page_pays_nothing(plays: dict[Path, Future[list[str]]]) -> None:
    printed, shards = plays[DOCS / "reproducibility.md"].result()
    assert "0 answers paid, 80 from the store" in printed
    assert shards.count("40 new answers, 0 known ones") == 2


@pytest.mark.slow
@pytest.mark.parametrize("language", ["", "_zh"])
def test_reports_names_every_key_of_a_run_and_every_file(
    language: str, plays: dict[Path, Future[list[str]]], folders: dict[Path, Path]
) -> None:
    page = DOCS / "reports.md"
    plays[page].result()
    text = prose(DOCS / f"reports{language}.md")
    ledger_text = section(DOCS / f"reports{language}.md", "ledger.sqlite")
    (run,) = folders[page].glob("artifacts/runs/*")
    for report in ("manifest", "quality_report", "timing_report"):
        content = json.loads((run / f"{report}.json").read_text())
        assert not [key for key in content if f"`{key}`" not in text], report
        assert f"{report}.json" in text
    row = json.loads((run / "dist" / "sft" / "train.jsonl").read_text().splitlines()[0])
    assert not [column for column in row if f"`{column}`" not in text]
    with closing(sqlite3.connect(f"{(run / 'ledger.sqlite').as_uri()}?mode=ro", uri=True)) as ledger:
        for (table,) in ledger.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall():
            columns = [name for (name,) in ledger.execute("SELECT name FROM pragma_table_info(?)", (table,))]
            (described,) = re.findall(rf"^\| `{table}` \| (.*) \|$", ledger_text, re.M)
            assert not [column for column in columns if f"`{column}`" not in described], table
    shown = (ROOT / f"README{language}.md").read_text(encoding="utf-8")
    assert not [
        path.name for path in run.iterdir() if path.suffix in (".json", ".yaml", ".html") and path.name not in shown
    ]
