"""What a run shows while it works, and the table it closes with. Only looks on: no figure is made here."""

import os
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any, TextIO, TypeAlias

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from fastdistill.control.folder import ENDED, artifacts_root
from fastdistill.control.ledger import read_samples
from fastdistill.control.run import ActiveRun
from fastdistill.control.session import RunResult
from fastdistill.control.tally import Tally
from fastdistill.control.terminal import clock, counted, cut, dollars, percent, printable, say, show_table, tallied
from fastdistill.core.errors import EnvironmentFault
from fastdistill.core.types import Outcome, Status

REFRESH = 0.25  # seconds between two pictures on a terminal
LOG_EVERY = 10.0  # seconds between two lines elsewhere
SPAN = 30.0  # seconds that all speeds, and so the time left, look back

STYLES = {"accepted": "green", "undecided": "yellow", "failed": "red", "duplicates": "dim", "contaminated": "dim"}


def live(run: ActiveRun) -> AbstractContextManager[None]:
    """Shows a run's progress on stderr (`session.Watch`): a live display on a terminal, else a line every 10 s.

    NO_COLOR and TERM=dumb ask for the lines on a terminal, too.
    """
    Thread(target=_count, args=(run,), name="count", daemon=True).start()
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown") or not sys.stderr.isatty()
    return log_lines(run, sys.stderr) if plain else display(run)


@contextmanager
def display(run: ActiveRun, console: Console | None = None) -> Iterator[None]:
    """A live display that is gone when the run has ended well, and stays when it has not."""
    screen = Live(
        console=console or Console(stderr=True),
        get_renderable=Onlooker(run).picture,
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


def log_lines(run: ActiveRun, stream: TextIO, every: float = LOG_EVERY) -> AbstractContextManager[None]:
    """One line every so many seconds, and a last one at the end."""
    onlooker = Onlooker(run)
    return _repeated(every, lambda: print(onlooker.line(), file=stream, flush=True))


class Onlooker:
    """Says how far a run is, and how fast it has been of late, at first since its beginning."""

    def __init__(self, run: ActiveRun) -> None:
        self._run = run
        # When; samples, accepted samples and each model's completion tokens by then.
        self._seen: deque[tuple[float, ...]] = deque([(run.begun, 0, 0, *[0] * len(run.models))])

    def line(self) -> str:
        """`fastdistill 2:10  1,240 of 2,000 samples (62%), 12.4/s, ...  accepted 812, rejected 9  teacher 32/32 ...`"""
        return "fastdistill " + "  ".join(self._told())

    def picture(self) -> Text:
        """What a log has, line by line, and the gates."""
        headline, *others = self._told(_gates_now(self._run.tally))
        return Text.assemble((headline, "bold"), *(f"\n{line}" for line in others))

    def _told(self, gates: Iterable[str] = ()) -> Iterator[str]:
        """For how long a run has worked, how far and how fast it is, and how long it will yet take; then its parts."""
        run, tally, (samples_per_s, accepted_per_s, *tokens_per_s) = self._run, self._run.tally, self._speeds()
        done, total, per_s, what = tally.samples, run.total, samples_per_s, "samples"
        if run.target is not None:
            done, total, per_s, what = tally.accepted_samples, run.target, accepted_per_s, "accepted"
        reached, left = f"{done:,} {what}", ""
        if total is not None:
            reached = f"{done:,} of {total:,} {what} ({done / max(total, 1):.0%})"
            left = f", ETA {clock(max(total - done, 0) / per_s) if per_s > 0 else '–'}"
        pace = f"{samples_per_s:.1f}/s, {60 * accepted_per_s:,.0f} accepted/min{left}"
        yield f"{clock(perf_counter() - run.begun)}  {reached}, {pace}"
        yield ", ".join(f"{name} {count:,}" for name, count in _counts(tally).items() if count or name == "accepted")
        yield from gates
        for (name, model), speed in zip(run.models.items(), tokens_per_s, strict=True):
            meter = model.meter
            words = f"{printable(name)} {meter.in_flight}/{model.router.capacity} in flight, {meter.answers:,} paid"
            words += f", {meter.stored:,} stored, {speed:,.0f} tok/s"
            words += "" if meter.cost is None else f", {dollars(meter.cost)}"
            yield words + (f", retries: {tallied(dict(meter.retries))}" if meter.retries else "")
        if run.stopping:
            in_flight = sum(model.meter.in_flight for model in run.models.values())
            # The last picture of a run that has ended badly stays, when nothing is left to wait for.
            coming = f": {in_flight} requests in flight are coming home; Ctrl-C again ends at once"
            yield "stopping" + (coming if in_flight else "")

    def _speeds(self) -> list[float]:
        """Samples, accepted samples and each model's completion tokens, a second."""
        tally, tokens = self._run.tally, [model.meter.completion_tokens for model in self._run.models.values()]
        self._seen.append((perf_counter(), tally.samples, tally.accepted_samples, *tokens))
        (now, *counts), seen = self._seen[-1], self._seen
        while now - seen[1][0] >= SPAN:
            seen.popleft()
        then, *before = seen[0]
        return [(count - earlier) / max(now - then, 1e-3) for count, earlier in zip(counts, before, strict=True)]


def _gates_now(tally: Tally) -> Iterator[str]:
    for step in tally.steps:
        if gate := tally.gates.get(step.name):
            passed, failed, errors = (gate.outcomes[kind] for kind in (Outcome.PASS, Outcome.FAIL, Outcome.ERROR))
            rate = f"{passed / (passed + failed):.1%}" if passed + failed else "–"
            name = cut(printable(step.name), 24)
            yield f"{name:<24} {passed:>9,} pass {failed:>9,} fail {errors:>7,} error {rate:>7}"


def summary(result: RunResult, console: Console | None = None) -> None:
    """Prints what a run came to, and where what it wrote lies."""
    quality, timing = result.quality, result.timing
    gates = {stage["step"]: stage["candidates"] for stage in quality["stages"] if "candidates" in stage}
    title = Text.assemble((result.run_id, "bold"), f"  {result.manifest['status']}  {clock(timing['wall_s'])}")
    say(title, console=console)
    for headers, found in (
        (("", ">", "", ""), _funnel(quality, result.manifest["message"])),
        (("gate", ">judged", ">pass", ">fail", ">error", "pass rate, 95% interval"), _gates(gates)),
        (("gate", "reasons"), _reasons(gates)),
        (("failed at", ">count", "reason", "for example"), _failures(quality["failures"])),
        (("", ""), _models(quality["tokens"], timing["models"])),
        (("floor", ">required", "reached", ""), _floor(quality["floor"])),
        (("export", "written"), [(s["step"], counted(s["report"])) for s in quality["stages"] if "report" in s]),
    ):
        if rows := list(found):
            say(console=console)
            show_table(headers, rows, console)
    say(console=console)
    for name, words in _whereabouts(result):
        say(Text(f"{name:<9}", "bold") + Text(words), console=console)


_Cells: TypeAlias = Iterator[tuple[RenderableType, ...]]


def _funnel(quality: Mapping[str, Any], message: str) -> _Cells:
    """How many samples were read, and where they went."""
    samples, candidates = quality["samples"], quality["candidates"]
    up_to = " up to the target" if message.startswith("target: ") else ""  # answers beyond it are paid for, too
    notes = {
        "completed": f"{candidates['generated']:,} candidates{up_to}, {candidates['selected']:,} selected",
        "elsewhere": "of other shards",
        "accepted": f"{percent(samples['accept_rate'])} of the decided" if samples["completed"] else "",
        "undecided": "a gate could not judge" if samples["undecided"] else "",
    }
    before = ["read", "duplicates", "contaminated", *(["elsewhere"] if samples.get("elsewhere") else []), "failed"]
    for name in (*before, "skipped", "completed", "accepted", "undecided"):
        count = samples.get(name, 0)
        style = STYLES.get(name, "") if count else "dim"
        bar = ProgressBar(max(samples["read"], 1), count, 20, complete_style=style, finished_style=style)
        yield Text(name, style), Text(f"{count:,}", style), bar, Text(notes.get(name, ""), "dim")


def _gates(gates: Mapping[str, Mapping[str, Any]]) -> _Cells:
    for name, gate in gates.items():
        counts = [f"{gate[count]:,}" for count in ("judged", "pass", "fail", "error")]
        yield name, *counts, percent(gate["pass_rate"])


def _reasons(gates: Mapping[str, Mapping[str, Any]]) -> _Cells:
    """Why gates judged as they did, for those that did not pass everything, and what execution said."""
    for name, gate in gates.items():
        if gate["pass"] < gate["judged"]:
            yield name, tallied(gate["reasons"])
            if errors := {error["error"]: error["count"] for error in gate.get("exec_errors", ())}:
                yield "  execution", tallied(errors)


def _failures(failures: Sequence[Mapping[str, Any]]) -> _Cells:
    for failure in sorted(failures, key=lambda failure: -failure["count"])[:5]:
        example = failure["examples"][0] if failure["examples"] else ""
        yield failure["step"], f"{failure['count']:,}", failure["reason"], cut(example)


def _models(tokens: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> _Cells:
    if tokens["prompt"] or tokens["completion"]:
        per_1000 = tokens["accepted_samples_per_1000_tokens"]
        yielded = "" if per_1000 is None else f"; {per_1000:g} accepted samples per 1000"
        yield Text("tokens", "bold"), f"{tokens['prompt']:,} prompt, {tokens['completion']:,} completion{yielded}"
    for name, model in models.items():
        words = f"{model['answers_paid']:,} answers paid, {model['answers_from_store']:,} from the store"
        if model["requests"]:
            rates = [(model["requests_per_s"], "requests/s"), (model["completion_tokens_per_s"], "completion tokens/s")]
            words += "".join(f"; {rate:,.1f} {unit}" for rate, unit in rates if rate is not None)
            words += f"; {model['slot_utilisation']:.0%} of {model['concurrency']} slots used"
        if hedged := model.get("hedged"):
            words += f"; {hedged:,} asked a second time"
        if model["retries"]:
            words += f"; retries: {tallied(model['retries'])}"
        if lost := sum(took["total_s"] for took in model.get("failed", {}).values()):
            words += f"; failed requests held slots for {lost:,.1f} s"
        if model["cost_usd"] is not None:
            words += f"; {dollars(model['cost_usd'])}"
        yield Text(printable(name), "bold"), words


def _floor(checks: Sequence[Mapping[str, Any]]) -> _Cells:
    for check in checks:
        required, reached = check["required"], check["reached"]
        is_rate = isinstance(reached, Mapping)
        shown = (f"{required:.1%}", percent(reached)) if is_rate else (f"{required:,}", f"{reached:,}")
        met, style = ("met", "green") if check["met"] else ("missed", "bold red")
        yield tuple(Text(printable(cell), style) for cell in (check["requirement"], *shown, met))


def _whereabouts(result: RunResult) -> Iterator[tuple[str, str]]:
    files = {
        "dataset": result.dataset,
        "report": result.path / "report.html",
        "quality": result.path / "quality_report.json",
        "timing": result.path / "timing_report.json",
        "manifest": result.path / "manifest.json",
    }
    yield from ((name, str(path)) for name, path in files.items() if path.exists())
    if result.manifest.get("kind") == "regate":
        parent, reused = result.manifest["parent_run_id"], tallied(result.manifest["verdicts_reused"])
        yield "judged", f"the candidates of {parent} again; verdicts taken over from it: {reused or 'none'}"
    if sample_id := _example(result.path / "ledger.sqlite"):
        root = result.path.parent.parent
        # The option is needed only where the command would not look anyway.
        where = "" if root.absolute() == artifacts_root().absolute() else f" --output-dir {shlex.quote(str(root))}"
        yield "a sample", f"fastdistill explain {result.run_id} {sample_id}{where}"


def _example(ledger: Path) -> str:
    """The short id of a sample worth a look: the first with a candidate that a gate held back, else the first."""
    told = """instr(sample, '"outcome":"fail"') OR instr(sample, '"outcome":"error"')"""  # no JSON is parsed for it
    with suppress(EnvironmentFault):  # it has gone, or is another version's
        for where in (told, ENDED):
            for sample in read_samples(ledger, where):
                return sample.sample_id[:12]
    return ""


@contextmanager
def _repeated(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Acts every so many seconds and at the end, in a thread, so that the event loop never waits for a terminal."""
    ended = Event()

    def work() -> None:
        works = True
        while works:
            works = not ended.wait(seconds)
            with suppress(OSError, ValueError):  # the terminal went away, or the stream was closed
                act()

    thread = Thread(target=work, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _counts(tally: Tally) -> dict[str, int]:
    """What became of the samples so far; each is in one of these."""
    accepted, undecided, statuses = tally.accepted_samples, tally.undecided_samples, tally.statuses
    return {
        "accepted": accepted,
        "rejected": max(statuses[Status.OPEN] - accepted - undecided, 0),
        "undecided": undecided,
        "failed": statuses[Status.FAILED],
        "duplicates": statuses[Status.DUPLICATE],
        "contaminated": statuses[Status.CONTAMINATED],
        "elsewhere": statuses[Status.ELSEWHERE],
        "skipped": statuses[Status.SKIPPED],
    }


def _count(run: ActiveRun) -> None:
    """Counts the records in a thread, for the time left; a file that can't be read is the run's own business."""
    with suppress(Exception):
        run.total = sum(step.count() for step in run.tally.steps) or None
