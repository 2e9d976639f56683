import asyncio
import dataclasses
import io
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import ClassVar

import pytest
from msgspec.structs import replace
from rich.console import Console

from fastdistill import ExportSFT
from fastdistill.control.budget import Budget, Target
from fastdistill.control.folder import RunFolder
from fastdistill.control.ledger import Ledger
from fastdistill.control.progress import Onlooker, display, live, log_lines, summary
from fastdistill.control.reports import Proofs
from fastdistill.control.run import ActiveRun
from fastdistill.control.session import Interrupted, Pipeline, RunResult
from fastdistill.control.tally import Tally
from fastdistill.control.terminal import clock, dollars
from fastdistill.core.canonical import digest
from fastdistill.core.errors import NotAsked, SampleError
from fastdistill.core.step import Gate
from fastdistill.core.timing import Timer
from fastdistill.core.types import (
    Answer,
    Candidate,
    Completion,
    Draw,
    Failure,
    FinishReason,
    Outcome,
    Prompt,
    Sample,
    Status,
    Usage,
    Verdict,
)
from fastdistill.data.generate import TextGeneration
from fastdistill.data.load import LoadJsonl
from fastdistill.data.prepare import CanonicalizeFields
from fastdistill.data.rules import RuleFilter
from fastdistill.model.client import ModelClient
from fastdistill.model.provider import Capabilities, ErrorKind, Load, ModelConfig, Price

HOSTILE = "<script>alert('x')</script> [bold]\x1b[2J"


class ExecutionGate(Gate):
    """Stands where SQLiteExecEval would; the verdicts here are made by hand."""


class ScriptedTeacher:
    Config: ClassVar[type[ModelConfig]] = ModelConfig
    notes: tuple[str, ...] = ()

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        return [COMPLETION] * n

    async def probe(self, like: Prompt | None = None) -> Capabilities:
        return Capabilities("http://127.0.0.1:1/v1", server=HOSTILE, served_model="served-7b", notes=("a note",))

    async def load(self) -> Load | None:
        return None

    async def aclose(self) -> None:
        pass


class EmptyStore:
    def get(self, key: str) -> Completion | None:
        return None

    async def put(self, prompt: Prompt, answers: Sequence[Answer]) -> None:
        pass


class NoBrake:
    def check(self, tokens: int, dollars: float) -> bool:
        return False

    async def pause(self, seconds: float) -> None:
        pass

    def turn(self) -> None:
        return None

    def asks(self) -> None:
        pass


COMPLETION = Completion("SELECT 1", FinishReason.STOP, Usage(100, 20), model="served-7b", build="sha256:beef")
PROMPT = Prompt("scripted", "teacher-7b", ({"role": "user", "content": "?"},), {})


def pipeline() -> Pipeline:
    return Pipeline.model_validate(
        {
            "name": "text2sql",
            "models": {
                "teacher": ModelConfig(
                    provider="scripted", model="teacher-7b", max_concurrency=8, price=Price(prompt=1, completion=2)
                )
            },
            "steps": (
                LoadJsonl(rows=({"question": "?"},)),
                CanonicalizeFields(fields=("question",)),
                TextGeneration(template="{{ question }}"),
                RuleFilter(),
                ExecutionGate(),
            ),
            "require": {"min_accepted": 1, "accept_rate": 0.9},
        }
    )


def judged(index: int, *verdicts: tuple[Outcome, str, str | None]) -> Sample:
    """A sample with one candidate; a verdict is outcome, reason and what execution said."""
    sample_id, draw = digest(index), Draw(0, index)
    candidate = Candidate(
        draw.candidate_id(sample_id, PROMPT), 0, index, draw.key(PROMPT), PROMPT, COMPLETION, COMPLETION.text
    )
    for gate, (outcome, reason, said) in zip(("RuleFilter", "ExecutionGate"), verdicts, strict=False):
        detail = {} if gate == "RuleFilter" else {"exec_pass": said is None, "exec_error": said}
        candidate = candidate.judged(Verdict(gate, "0" * 16, outcome, reason, 0.5, detail))
    return Sample(index, f"rows:{index}", {}, sample_id=sample_id, candidates=(candidate,))


PASS, FAIL, ERROR = Outcome.PASS, Outcome.FAIL, Outcome.ERROR
SAMPLES = (
    *(judged(index, (PASS, "ok", None), (PASS, "match", None)) for index in range(6)),
    judged(6, (FAIL, "too_long", None)),
    judged(7, (PASS, "ok", None), (FAIL, "sql_error", f"no such column: {HOSTILE}")),
    judged(8, (PASS, "ok", None), (ERROR, "infra_timeout", None)),
    Sample(9, "rows:9", {}, sample_id=digest(9)).failed(
        "TextGeneration", SampleError("timeout", f"no answer {HOSTILE}")
    ),
    replace(
        Sample(10, "rows:10", {}, sample_id=digest(0)),
        status=Status.DUPLICATE,
        failures=(Failure("CanonicalizeFields", "duplicate", "rows:10: the same task as rows:0"),),
    ),
)


async def work(plan: Pipeline, folder: RunFolder, target: Target | None) -> tuple[ActiveRun, RunResult]:
    """What a run does, with samples made by hand in place of the steps."""
    tally = Tally(plan.steps)
    proofs = Proofs(plan, folder, tally)
    teacher = ModelClient("teacher", plan.models["teacher"], [ScriptedTeacher()], EmptyStore(), NoBrake())
    await teacher.ready()
    async with Ledger(folder.ledger) as ledger:
        run = ActiveRun(
            dist=folder.dist_in_work,
            ledger=ledger,
            models={"teacher": teacher},
            tally=tally,
            max_error_rate=1,
            target=target,
            budget=Budget(),
        )
        for sample in SAMPLES:
            with Timer() as timer:
                timer.turn_to(run.time_of(plan.steps[2]))
                if sample.candidates:
                    await teacher.generate(PROMPT, [Draw(0, sample.index)])
            await run.finished(sample, last=True)
        teacher.meter.retries[ErrorKind.RATE_LIMITED] += 3
        teacher.meter.hedged += 2
        run.close()
    (folder.dist_in_work / "train.jsonl").write_text("{}\n")
    proofs.finish_dist()
    return run, proofs.finish(run)


def ran(tmp_path: Path, target: Target | None = None) -> tuple[ActiveRun, RunResult]:
    folder = RunFolder(tmp_path, "text2sql-0123abcd")
    with folder.held():
        folder.begin_dist()
        return asyncio.run(work(pipeline(), folder, target))


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, height=50, color_system="standard")


def shown(console: Console) -> str:
    """What a person reads: the output without its control sequences."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_board_shows_samples_gates_and_models_at_80_columns(tmp_path: Path) -> None:
    run, _ = ran(tmp_path)
    console = terminal()
    console.print(Onlooker(run).picture())
    lines = words(shown(console))
    assert all(len(line) <= 80 for line in shown(console).splitlines())
    assert re.match(r"0:0\d 11 samples, ", lines[0])
    assert lines[1] == "accepted 6, rejected 2, undecided 1, failed 1, duplicates 1"
    assert "RuleFilter 8 pass 1 fail 0 error 88.9%" in lines
    assert "ExecutionGate 6 pass 1 fail 1 error 85.7%" in lines
    teacher = r"teacher 0/8 in flight, 9 paid, 0 stored, [\d,]+ tok/s, \$0\.0013, retries: rate_limited 3"
    assert re.search(teacher, " ".join(lines))


def test_samples_that_a_budget_left_out_are_shown(tmp_path: Path) -> None:
    run, _ = ran(tmp_path)
    run.tally.add(SAMPLES[9].failed("TextGeneration", NotAsked("not_asked", "budget.max_tokens")))
    assert "skipped 1" in Onlooker(run).picture().plain


def test_time_left_is_told_only_when_the_total_is_known(tmp_path: Path) -> None:
    run, _ = ran(tmp_path)
    assert "ETA" not in Onlooker(run).line()
    run.total = 22
    console = terminal()
    console.print(Onlooker(run).picture())
    assert "11 of 22 samples (50%)" in shown(console)
    assert re.search(r"ETA \d+:\d\d", shown(console))
    assert "11 of 22 samples (50%)" in Onlooker(run).line()


def test_a_run_with_a_target_is_as_far_as_its_accepted_samples_are(tmp_path: Path) -> None:
    run, result = ran(tmp_path, Target(accepted=6))
    run.total = 600
    assert "6 of 6 accepted (100%)" in Onlooker(run).line() and "ETA 0:00" in Onlooker(run).line()
    console = terminal()
    console.print(Onlooker(run).picture())
    assert "6 of 6 accepted (100%)" in shown(console)
    summary(
        dataclasses.replace(result, manifest={**result.manifest, "message": "target: 6 samples are accepted"}), console
    )
    assert "6 candidates up to the target" in " ".join(words(shown(console)))


def test_speed_is_that_of_the_last_seconds(tmp_path: Path) -> None:
    run, _ = ran(tmp_path)
    run.begun = time.perf_counter() - 90
    assert re.search(r" 0\.1/s, 4 accepted/min .* 2 tok/s", Onlooker(run).line())


def test_a_run_that_winds_down_says_so(tmp_path: Path) -> None:
    run, _ = ran(tmp_path)
    run.stop(Interrupted("interrupted"))
    run.models["teacher"].meter.in_flight = 2
    console = terminal()
    console.print(Onlooker(run).picture())
    assert "stopping: 2 requests in flight" in shown(console)
    assert "stopping: 2 requests in flight" in Onlooker(run).line()
    run.models["teacher"].meter.in_flight = 0
    assert Onlooker(run).line().endswith("  stopping")  # and no more of Ctrl-C


def test_without_a_terminal_there_are_plain_lines_and_one_at_the_end(tmp_path: Path) -> None:
    run, _ = ran(tmp_path)
    stream = io.StringIO()
    with log_lines(run, stream, every=0.01):
        time.sleep(0.1)
        before_end = stream.getvalue().count("\n")
    lines = stream.getvalue().splitlines()
    assert 1 <= before_end < len(lines)
    assert "\x1b" not in stream.getvalue()
    assert re.match(
        r"fastdistill 0:0\d  11 samples, [\d.]+/s, [\d,]+ accepted/min"
        r"  accepted 6, rejected 2, undecided 1, failed 1, duplicates 1  teacher 0/8 in flight,"
        r" 9 paid, 0 stored, [\d,]+ tok/s, \$0\.0013, retries: rate_limited 3",
        lines[-1],
    )


def test_live_is_plain_where_stderr_is_no_terminal(tmp_path: Path) -> None:
    run, _ = ran(tmp_path)
    with redirect_stderr(io.StringIO()) as stream, live(run):
        pass
    assert len(stream.getvalue().splitlines()) == 1


def test_a_stream_that_breaks_does_not_end_the_run(tmp_path: Path) -> None:
    run, _ = ran(tmp_path)
    stream = io.StringIO()
    with log_lines(run, stream, every=0.01):
        stream.close()
        time.sleep(0.05)


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_can_ask_for_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert "\x1b" not in on_a_terminal(ran(tmp_path)[0])


def test_a_terminal_gets_a_live_display_and_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    written = on_a_terminal(ran(tmp_path)[0], seconds=0.3)
    assert "ExecutionGate" in written
    assert written.index("\x1b[?25l") < written.rindex("\x1b[?25h")
    assert "\x1b[?25l" not in written[written.rindex("\x1b[?25h") :]


@pytest.mark.parametrize("ending", [ValueError, KeyboardInterrupt, asyncio.CancelledError])
def test_a_broken_run_restores_the_terminal_and_leaves_the_picture(tmp_path: Path, ending: type[BaseException]) -> None:
    run, _ = ran(tmp_path)
    console, stdout, stderr = terminal(), sys.stdout, sys.stderr
    with pytest.raises(ending), display(run, console):
        raise ending
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert "\x1b[2K" not in written[written.rindex("ExecutionGate") :]
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


def on_a_terminal(run: ActiveRun, seconds: float = 0) -> str:
    """Watches a run on a pseudo-terminal; returns what that was sent."""
    master, slave = os.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen, os.fdopen(slave, "w") as stderr:
        with redirect_stderr(stderr), live(run):
            time.sleep(seconds)
        stderr.flush()
        written = b""
        while select.select([screen], [], [], 0.3)[0]:  # a terminal gives what it has by and by
            written += screen.read(1 << 16)
        return written.decode()


def test_summary_tells_what_was_reached_and_where_it_lies(tmp_path: Path) -> None:
    _, result = ran(tmp_path)
    console = terminal()
    summary(result, console)
    lines = words(shown(console))
    assert lines[0].startswith("text2sql-0123abcd below_floor 0:0")
    for line in (
        "RuleFilter 9 8 1 0 88.9% [56.5, 98.0]",
        "ExecutionGate 8 6 1 1 85.7% [48.7, 97.4]",
        "ExecutionGate infra_timeout 1, sql_error 1",
        "execution no such column 1",
        "min_accepted 1 6 met",
        "accept_rate 90.0% 75.0% [40.9, 92.9] missed",
        f"dataset {result.path}/dist",
        f"manifest {result.path}/manifest.json",
        f"a sample fastdistill explain text2sql-0123abcd {digest(6)[:12]} --output-dir {tmp_path}",
    ):
        assert line in lines
    for name, count in {"read": 11, "duplicates": 1, "failed": 1, "completed": 9, "accepted": 6}.items():
        assert any(line.startswith(f"{name} {count} ") for line in lines), name
    assert "900 prompt, 180 completion; 5.5556 accepted samples per 1000" in shown(console)
    assert "9 answers paid, 0 from the store" in shown(console)
    assert "2 asked a second time" in " ".join(lines)


def test_summary_tells_of_a_split_that_no_sample_came_to(tmp_path: Path) -> None:
    steps = (LoadJsonl(rows=({"q": "a"},)), CanonicalizeFields(fields=("q",)), ExportSFT(validation=0.5))
    console = terminal()
    summary(Pipeline(name="empty", steps=steps).run(output_dir=tmp_path), console)
    assert "ExportSFT train_samples 0, validation_samples 0" in words(shown(console))


def test_summary_fits_80_columns_but_for_what_is_copied(tmp_path: Path) -> None:
    _, result = ran(tmp_path)
    console = terminal()
    summary(result, console)
    tables = shown(console).partition("\ndataset")[0]
    assert max(len(line) for line in tables.splitlines()) <= 80


def test_an_error_message_cannot_steer_the_terminal(tmp_path: Path) -> None:
    _, result = ran(tmp_path)
    console = terminal()
    summary(result, console)
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[2J" not in console.file.getvalue()
    assert "[bold]" in shown(console)


def test_importing_the_command_line_does_not_import_rich() -> None:
    program = "import sys, fastdistill.control.cli; sys.exit('rich' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_amounts_read_well() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]
    assert [dollars(amount) for amount in (None, 0, 0.0042, 1234.5)] == ["–", "$0.00", "$0.0042", "$1,234.50"]
