"""What a run shows while it works, and the table it closes with. Only looks on: no figure is made here.

rich is imported when something is drawn, not before, so that commands which draw nothing start fast.
"""

import os
import shlex
import sqlite3
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

from fastdistill.core.stats import Rate
from fastdistill.core.types import Outcome, Status

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod, RenderableType
    from rich.table import Table
    from rich.text import Text

    from fastdistill.control.run import ActiveRun
    from fastdistill.control.session import RunResult
    from fastdistill.control.tally import Tally
    from fastdistill.model.client import ModelClient

REFRESH = 0.25  # seconds between two pictures on a terminal
LOG_EVERY = 10.0  # seconds between two lines elsewhere
TOKENS_SPAN = 10.0  # seconds that tokens/s looks back
SAMPLES_SPAN = 60.0  # seconds that samples/s, accepted/min and the time left look back

STYLES = {
    "accepted": "green",
    "rejected": "",
    "undecided": "yellow",
    "failed": "red",
    "duplicates": "dim",
    "contaminated": "dim",
}


@contextmanager
def live(run: "ActiveRun") -> Iterator[None]:
    """Shows a run's progress on stderr (`session.Watch`): a live display on a terminal, else a line every 10 s.

    NO_COLOR and TERM=dumb ask for the lines on a terminal, too.
    """
    Thread(target=_count, args=(run,), name="count", daemon=True).start()
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown") or not sys.stderr.isatty()
    with log_lines(run, sys.stderr) if plain else display(run):
        yield


@contextmanager
def display(run: "ActiveRun", console: "Console | None" = None) -> Iterator[None]:
    """A live display that is gone when the run has ended well, and stays when it has not."""
    from rich.console import Console
    from rich.live import Live

    recent = Recent()
    screen = Live(
        console=console or Console(stderr=True),
        get_renderable=lambda: board(run, recent),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,  # what a program prints there is its own
    )
    # A terminal that goes away midway must not end the run.
    with suppress(OSError):
        screen.start(refresh=True)
    try:
        with _repeated(REFRESH, screen.refresh):
            yield
    except BaseException:
        screen.transient = False
        raise
    finally:
        with suppress(OSError):
            screen.stop()


@contextmanager
def log_lines(run: "ActiveRun", stream: TextIO, every: float = LOG_EVERY) -> Iterator[None]:
    """One line every so many seconds, and a last one at the end."""
    recent = Recent()
    recent.look(run)

    def write() -> None:
        print(log_line(run, recent), file=stream, flush=True)

    try:
        with _repeated(every, write):
            yield
    finally:
        with suppress(OSError, ValueError):  # the stream broke, or was closed
            write()


def log_line(run: "ActiveRun", recent: "Recent") -> str:
    """`fastdistill 2:10  1,240 of 2,000 samples (62%), 12.4/s: accepted 812, rejected 401  teacher 32/32, ...`"""
    speed = recent.look(run)
    elapsed, done, left = _headline(run, speed)
    counts = ", ".join(f"{name} {count:,}" for name, count in _counts(run.tally).items() if count or name == "accepted")
    parts = [f"fastdistill {elapsed}  {done}, {speed.samples:.1f}/s{', ' if left else ''}{left}: {counts}"]
    for name, model in run.models.items():
        meter = model.meter
        slots = f"{name} {meter.in_flight}/{model.router.capacity} in flight"
        retries = f", {sum(dict(meter.retries).values())} retries" if meter.retries else ""
        cost = "" if meter.cost is None else f", {dollars(meter.cost)}"
        parts.append(f"{slots}, {speed.tokens.get(name, 0.0):,.0f} tok/s{retries}{cost}")
    if run.stopping:
        parts.append("stopping")
    return "  ".join(parts)


@dataclass(frozen=True, slots=True)
class Speed:
    """Per second. `tokens` are completion tokens by model."""

    samples: float
    accepted: float
    tokens: Mapping[str, float]


class Recent:
    """What was seen of a run in the last minute, to tell how fast it is now."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int, Mapping[str, int]]] = deque()  # when; samples, accepted, tokens

    def look(self, run: "ActiveRun") -> Speed:
        tokens = {name: model.meter.usage.completion_tokens for name, model in run.models.items()}
        now, samples, accepted = perf_counter(), run.tally.samples, run.tally.accepted_samples
        # A run is timed from its beginning, whenever the first look was.
        begun = run.begun, 0, 0, dict.fromkeys(tokens, 0)
        self._seen.append((now, samples, accepted, tokens) if self._seen else begun)
        while len(self._seen) > 2 and now - self._seen[1][0] >= SAMPLES_SPAN:
            self._seen.popleft()
        since, samples_then, accepted_then, _ = self._seen[0]
        long_ago = (seen for seen in reversed(self._seen) if now - seen[0] >= TOKENS_SPAN)
        lately, _, _, tokens_then = next(long_ago, self._seen[0])
        span, token_span = max(now - since, 1e-3), max(now - lately, 1e-3)
        per_s = {name: (count - tokens_then[name]) / token_span for name, count in tokens.items()}
        return Speed((samples - samples_then) / span, (accepted - accepted_then) / span, per_s)


def board(run: "ActiveRun", recent: Recent) -> "RenderableType":
    """The live picture: samples, gates, models."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    speed = recent.look(run)
    total, tally = run.total, run.tally
    elapsed, done, left = _headline(run, speed)
    pace = f"  {speed.samples:.1f}/s  {60 * speed.accepted:,.0f} accepted/min  {elapsed}{'  ' if left else ''}{left}"
    parts: list[RenderableType] = [Text.assemble((done, "bold"), pace)]
    if total is not None:
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=max(total, 1), completed=min(tally.samples, total)))
        parts.append(bar)
    counts = [(f"{name} {count:,}", STYLES[name] if count else "dim") for name, count in _counts(tally).items()]
    parts.append(Text("  ").join(Text(words, style) for words, style in counts))
    if tally.gates:
        parts += [Text(), _gates_now(tally)]
    if run.models:
        parts += [Text(), _models_now(run.models, speed)]
    if run.stopping:
        in_flight = sum(model.meter.in_flight for model in run.models.values())
        words = f"stopping: {in_flight} requests in flight are coming home; Ctrl-C again ends at once"
        parts += [Text(), Text(words, "bold yellow")]
    return Group(*parts)


def _gates_now(tally: "Tally") -> "Text":
    rows = [("gate", "pass", "fail", "error", "rate", "")]
    for step in tally.steps:
        if gate := tally.gates.get(step.name):
            passed, failed, errors = (gate.outcomes[kind] for kind in (Outcome.PASS, Outcome.FAIL, Outcome.ERROR))
            rate = f"{passed / (passed + failed):.1%}" if passed + failed else "–"
            rows.append((step.name, f"{passed:,}", f"{failed:,}", f"{errors:,}", rate, ""))
    return _columns(rows)


def _models_now(models: "Mapping[str, ModelClient]", speed: Speed) -> "Text":
    priced = any(model.meter.price is not None for model in models.values())
    rows = [["model", "in flight", "paid", "stored", "tok/s", *(["cost"] if priced else []), "retries"]]
    for name, model in models.items():
        meter = model.meter
        row = [name, f"{meter.in_flight}/{model.router.capacity}", f"{meter.answers:,}", f"{meter.stored:,}"]
        row += [f"{speed.tokens.get(name, 0.0):,.0f}", *([dollars(meter.cost)] if priced else [])]
        rows.append([*row, _tallied(dict(meter.retries)) or "–"])
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> "Text":
    """Names to the left, figures to the right, words last. A rich table costs ten times as much, 4 times a second."""
    from rich.cells import cell_len
    from rich.text import Text

    cells = [[_cut(_printable(cell), 24) for cell in row[:-1]] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    text = Text(no_wrap=True, overflow="ellipsis")
    for at, ((name, *figures), row) in enumerate(zip(cells, rows, strict=True)):
        pads = [" " * (width - cell_len(cell)) for width, cell in zip(widths, (name, *figures), strict=True)]
        aligned = [name + pads[0], *(pad + figure for pad, figure in zip(pads[1:], figures, strict=True)), row[-1]]
        text.append(("\n" if at else "") + "  ".join(aligned).rstrip(), "" if at else "bold")
    return text


def summary(result: "RunResult", console: "Console") -> None:
    """Prints what a run came to, and where what it wrote lies."""
    from rich.text import Text

    quality, timing, manifest = result.quality, result.timing, result.manifest
    title = Text.assemble((result.run_id, "bold"), f"  {manifest['status']}  {clock(timing['wall_s'])}")
    console.print(title, soft_wrap=True)
    gates = {stage["step"]: stage["candidates"] for stage in quality["stages"] if "candidates" in stage}
    sections = [_funnel(quality), _gates(gates), _reasons(gates), _failures(quality["failures"])]
    for table in (*sections, _models(quality["tokens"], timing["models"]), _floor(quality["floor"])):
        if table.row_count:
            console.print()
            console.print(table)
    console.print()
    for name, words in _whereabouts(result):
        # Never wrapped: a path or a command is there to be copied.
        console.print(Text(f"{name:<9}", "bold") + Text(words), soft_wrap=True)


def _funnel(quality: Mapping[str, Any]) -> "Table":
    """How many samples were read, and where they went."""
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    samples, candidates = quality["samples"], quality["candidates"]
    notes = {
        "completed": f"{candidates['generated']:,} candidates, {candidates['selected']:,} selected",
        "accepted": f"{_interval(samples['accept_rate'])} of the decided" if samples["completed"] else "",
        "undecided": "a gate could not judge" if samples["undecided"] else "",
    }
    table = _table("", ">", "", "")
    for name in ("read", "duplicates", "contaminated", "failed", "completed", "accepted", "undecided"):
        style = STYLES.get(name, "") if samples[name] else "dim"
        bar = ProgressBar(max(samples["read"], 1), samples[name], 20, complete_style=style, finished_style=style)
        table.add_row(Text(name, style), Text(f"{samples[name]:,}", style), bar, Text(notes.get(name, ""), "dim"))
    return table


def _gates(gates: Mapping[str, Mapping[str, Any]]) -> "Table":
    table = _table("gate", ">judged", ">pass", ">fail", ">error", "pass rate, 95% interval")
    for name, gate in gates.items():
        counts = [f"{gate[count]:,}" for count in ("judged", "pass", "fail", "error")]
        _row(table, name, *counts, _interval(gate["pass_rate"]))
    return table


def _reasons(gates: Mapping[str, Mapping[str, Any]]) -> "Table":
    """Why gates judged as they did, for those that did not pass everything, and what execution said."""
    table = _table("gate", "reasons")
    for name, gate in gates.items():
        if gate["pass"] < gate["judged"]:
            _row(table, name, _tallied(gate["reasons"]))
            if errors := {error["error"]: error["count"] for error in gate.get("exec_errors", ())}:
                _row(table, "  execution", _tallied(errors))
    return table


def _failures(failures: Sequence[Mapping[str, Any]]) -> "Table":
    table = _table("failed at", ">count", "reason", "for example")
    for failure in sorted(failures, key=lambda failure: -failure["count"])[:5]:
        example = failure["examples"][0] if failure["examples"] else ""
        _row(table, failure["step"], f"{failure['count']:,}", failure["reason"], _cut(example))
    return table


def _models(tokens: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> "Table":
    from rich.text import Text

    table = _table("", "")
    if tokens["prompt"] or tokens["completion"]:
        per_1000 = tokens["accepted_samples_per_1000_tokens"]
        yielded = "" if per_1000 is None else f"; {per_1000:g} accepted samples per 1000"
        words = f"{tokens['prompt']:,} prompt, {tokens['completion']:,} completion{yielded}"
        table.add_row(Text("tokens", "bold"), Text(words))
    for name, model in models.items():
        words = f"{model['answers_paid']:,} answers paid, {model['answers_from_store']:,} from the store"
        if model["requests"]:
            rates = [(model["requests_per_s"], "requests/s"), (model["completion_tokens_per_s"], "completion tokens/s")]
            words += "".join(f"; {rate:,.1f} {unit}" for rate, unit in rates if rate is not None)
            words += f"; {model['slot_utilisation']:.0%} of {model['concurrency']} slots used"
        if model["retries"]:
            words += f"; retries: {_tallied(model['retries'])}"
        if lost := sum(took["total_s"] for took in model.get("failed", {}).values()):
            words += f"; failed requests held slots for {lost:,.1f} s"
        if model["cost_usd"] is not None:
            words += f"; {dollars(model['cost_usd'])}"
        table.add_row(Text(_printable(name), "bold"), Text(words))
    return table


def _floor(checks: Sequence[Mapping[str, Any]]) -> "Table":
    table = _table("floor", ">required", "reached", "")
    for check in checks:
        required, reached = check["required"], check["reached"]
        is_rate = isinstance(reached, Mapping)
        shown = (f"{required:.1%}", _interval(reached)) if is_rate else (f"{required:,}", f"{reached:,}")
        met, style = ("met", "green") if check["met"] else ("missed", "bold red")
        _row(table, check["requirement"], *shown, met, style=style)
    return table


def _whereabouts(result: "RunResult") -> Iterator[tuple[str, str]]:
    from fastdistill.control.folder import artifacts_root

    files = {
        "dataset": result.dataset,
        "report": result.path / "report.html",
        "quality": result.path / "quality_report.json",
        "timing": result.path / "timing_report.json",
        "manifest": result.path / "manifest.json",
    }
    yield from ((name, str(path)) for name, path in files.items() if path.exists())
    if parent := result.manifest.get("parent_run_id"):
        reused = _tallied(result.manifest["verdicts_reused"])
        yield "judged", f"the candidates of {parent} again; verdicts taken over from it: {reused or 'none'}"
    if sample_id := _example(result.path / "ledger.sqlite"):
        root = result.path.parent.parent
        # The option is needed only where the command would not look anyway.
        where = "" if root.absolute() == artifacts_root().absolute() else f" --output-dir {shlex.quote(str(root))}"
        yield "a sample", f"fastdistill explain {result.run_id} {sample_id}{where}"


def _example(ledger: Path) -> str:
    """The short id of a sample worth a look: the first with a candidate that a gate held back, else the first."""
    from fastdistill.control.writer import connect

    held_back = "SELECT idx FROM candidates WHERE outcome <> 'pass' ORDER BY idx LIMIT 1"
    first = "SELECT idx FROM samples WHERE sample_id <> '' ORDER BY idx LIMIT 1"
    query = f"SELECT sample_id FROM samples WHERE idx = coalesce(({held_back}), ({first}))"
    with suppress(sqlite3.Error), closing(connect(ledger, readonly=True)) as connection:
        for (sample_id,) in connection.execute(query):
            return str(sample_id)[:12]
    return ""


def clock(seconds: float) -> str:
    """`2:10`, `1:02:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def dollars(amount: float | None) -> str:
    """`$12.30`, and `$0.0042` where cents would hide it."""
    if amount is None:
        return "–"
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:.4f}"


@contextmanager
def _repeated(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` every so many seconds in a thread of its own, so that the event loop never waits for a terminal."""
    ended = Event()

    def work() -> None:
        while not ended.wait(seconds):
            with suppress(OSError, ValueError):  # the terminal went away, or the stream was closed
                act()

    thread = Thread(target=work, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _counts(tally: "Tally") -> dict[str, int]:
    """What became of the samples so far; each is in one of these."""
    accepted, undecided, statuses = tally.accepted_samples, tally.undecided_samples, tally.statuses
    return {
        "accepted": accepted,
        "rejected": max(statuses[Status.OPEN] - accepted - undecided, 0),
        "undecided": undecided,
        "failed": statuses[Status.FAILED],
        "duplicates": statuses[Status.DUPLICATE],
        "contaminated": statuses[Status.CONTAMINATED],
    }


def _count(run: "ActiveRun") -> None:
    """Counts the records in a thread, for the time left; a file that can't be read is the run's own business."""
    with suppress(Exception):
        run.total = sum(step.count() for step in run.tally.steps) or None


def _headline(run: "ActiveRun", speed: Speed) -> tuple[str, str, str]:
    """For how long a run has worked, how far it is, and (where the total is known) how long it will yet take."""
    elapsed, done, total = clock(perf_counter() - run.begun), run.tally.samples, run.total
    if total is None:
        return elapsed, f"{done:,} samples", ""
    left = clock(max(total - done, 0) / speed.samples) if speed.samples > 0 else "–"
    return elapsed, f"{done:,} of {total:,} samples ({done / max(total, 1):.0%})", f"ETA {left}"


def _interval(rate: Mapping[str, Any]) -> str:
    from fastdistill.control.card import percent

    return percent(Rate(**rate))


def _tallied(counts: Mapping[str, int], most: int = 6) -> str:
    """`timeout 3, reset 1`: the most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{name} {count:,}" for name, count in ranked[:most]]
    return ", ".join(words + ([f"{len(ranked) - most} more kinds"] if len(ranked) > most else []))


def _table(*headers: str) -> "Table":
    """A plain table; `>` before a header puts its column to the right, and an empty first one leaves them all out."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=bool(headers[0]))
    for at, header in enumerate(headers):
        right = header.startswith(">")
        justify: JustifyMethod = "right" if right else "left"
        table.add_column(header.removeprefix(">"), justify=justify, no_wrap=right or at == 0, overflow="fold")
    return table


def _row(table: "Table", *cells: str, style: str = "") -> None:
    from rich.text import Text

    # As Text, for a string would be read as markup; and names and messages may come from a model or a server.
    table.add_row(*(Text(_printable(cell)) for cell in cells), style=style)


def _printable(text: str) -> str:
    """Text that can't steer the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def _cut(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
