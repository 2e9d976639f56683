"""What a run may spend and when it has enough, in whole runs against a teacher that counts what it was asked for."""

import asyncio
import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistill import RunResult
from fastdistill.control.budget import Progress, Target, first_accepted
from fastdistill.control.config import parse_pipeline
from fastdistill.control.export import export_run
from fastdistill.control.ledger import read_samples
from fastdistill.control.session import execute, run_folder, unwatched
from fastdistill.core.errors import ConfigError, ExitCode, TeacherError, TooManyErrors
from fastdistill.core.step import Context, StreamStep
from fastdistill.core.types import Candidate, Completion, FinishReason, Prompt, Sample, Usage
from fastdistill.model.meter import TEMPLATE, InFlight, Meter
from tests.servers import Call, Fault, cut, garbled, hang, openai_server, rate_limited, reset, status

MOST = 40  # tokens of an answer, as the run's decode profile has it
LENGTH = 30  # tokens of an answer, as the teacher gives it
PRICE = {"prompt": 1.0, "completion": 1.0}  # US dollars for a million


class Teacher:
    """Right answers at a rate; which draws are right depends on the prompt and the seed only. Counts every draw."""

    def __init__(self, rate: float = 0.3, right: Callable[[str, int], bool] | None = None) -> None:
        self.rate = rate
        self.draws: list[tuple[str, int]] = []
        self.requests = 0
        self.prompt_tokens = 0
        self._right = right
        self._lock = threading.Lock()

    def right(self, prompt: str, seed: int) -> bool:
        if self._right is not None:
            return self._right(prompt, seed)
        return int.from_bytes(hashlib.sha256(f"{prompt} {seed}".encode()).digest()[:4], "big") / 2**32 < self.rate

    def script(self, call: Call, index: int) -> str:
        if not call.prompt.startswith("Question"):
            return "red"  # the probe
        seed = (call.seed or 0) + index
        with self._lock:
            self.draws.append((call.prompt, seed))
            if index == 0:
                self.requests += 1
                self.prompt_tokens += len(call.prompt.split())
        word = "right" if self.right(call.prompt, seed) else "wrong"
        return " ".join([word, str(seed), *["word"] * (LENGTH - 2)])

    @property
    def completion_tokens(self) -> int:
        return LENGTH * len(self.draws)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def question(number: int) -> str:
    return f"Question {number:04}"


def seeds_of(result: RunResult) -> dict[str, list[int]]:
    """The seeds of each sample's candidates, by prompt, in order of attempt."""
    found: dict[str, list[int]] = {}
    for sample in read_samples(result.path / "ledger.sqlite"):
        for candidate in sample.candidates:
            found.setdefault(candidate.prompt.messages[-1]["content"], []).append(candidate.seed or 0)
    return found


def pipeline(
    url: str, folder: Path, records: int, *, models: Mapping[str, Any] | None = None, n: int = 1, **parts: Any
) -> dict[str, Any]:
    """A pipeline with one cheap gate. `until`, `teachers` and `escalate_after` are the generator's."""
    path = folder / f"records{records}.jsonl"
    path.write_text(
        "".join(json.dumps({"task_id": f"q{at}", "question": question(at)}) + "\n" for at in range(records))
    )
    teacher = {"provider": "vllm", "model": "teacher", "base_url": url, "max_concurrency": 8, "hedge": False}
    generation = {key: parts.pop(key) for key in ("until", "teachers", "escalate_after") if key in parts}
    return {
        "name": "questions",
        "models": models or {"teacher": teacher | parts.pop("teacher", {})},
        "steps": [
            {"LoadJsonl": {"path": str(path)}},
            {"CanonicalizeFields": {"fields": ["question"]}},
            {
                "TextGeneration": {
                    "template": "{{ question }}",
                    "num_generations": n,
                    "decode_profile": {"max_tokens": MOST},
                    **generation,
                }
            },
            {"RuleFilter": {"required": ["^right"]}},
            {"SelectBest": {"k": 1}},
            {"ExportSFT": {"formats": ["jsonl"]}},
        ],
        **parts,
    }


def run(made: dict[str, Any], output: Path) -> RunResult:
    return parse_pipeline(made).run(output_dir=output)


def rows(result: RunResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.dataset / "sft" / "train.jsonl").read_text().splitlines()]


def data_set(result: RunResult) -> dict[str, str]:
    files = sorted(path for path in result.dataset.rglob("*") if path.is_file())
    return {str(path.relative_to(result.dataset)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_whole(result: RunResult) -> None:
    """The data set, its checksums and the reports are there and fit together."""
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert (manifest["status"], manifest["exit_code"]) == ("complete", result.exit_code)
    lines = (result.dataset / "checksums.txt").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert listed == {name: digest for name, digest in data_set(result).items() if name != "checksums.txt"}
    quality = json.loads((result.path / "quality_report.json").read_text())
    assert quality["samples"]["accepted"] >= len(rows(result)), "what finished beyond a target is counted too"
    assert quality["samples"]["failed"] == 0
    assert (result.path / "timing_report.json").exists()


def jittered(seed: int, most: float = 0.02) -> Callable[[Call], float]:
    return lambda call: random.Random(f"{seed} {call.prompt} {call.seed}").uniform(0, most)


# --- budgets ---


@pytest.mark.parametrize(("n", "habit"), [(1, {}), (4, {}), (4, {"honours_n": False})], ids=["1", "4", "4 one by one"])
@pytest.mark.parametrize("limit", ["max_tokens", "max_cost_usd"])
def test_a_budget_is_not_exceeded_and_used_up_to_what_the_next_request_could_cost(
    tmp_path: Path, limit: str, n: int, habit: dict[str, Any]
) -> None:
    teacher, allowed = Teacher(), 4_000
    with openai_server(teacher.script, latency=jittered(0), **habit) as server:
        budget = {limit: allowed if limit == "max_tokens" else allowed / 1e6}
        result = run(pipeline(server.url, tmp_path, 400, n=n, budget=budget, teacher={"price": PRICE}), tmp_path / "a")
    assert result.exit_code == ExitCode.BUDGET
    probed = result.timing["models"]["teacher"]["probe_tokens"]
    assert 15 <= probed <= 20
    assert teacher.tokens + probed <= allowed
    # A prompt counts a token for each character before anything is known of it.
    worst_in_flight = 8 * (len(question(0)) + n * MOST)
    assert teacher.tokens + probed > allowed - worst_in_flight - (len(question(0)) + n * MOST)
    assert f"budget.{limit}" in json.loads((result.path / "manifest.json").read_text())["message"]
    assert_whole(result)
    assert 0 < result.quality["samples"]["accepted"] == len(rows(result)) < 400


def test_a_budget_of_time_ends_the_run_and_what_is_in_flight_comes_home(tmp_path: Path) -> None:
    teacher = Teacher()
    with openai_server(teacher.script, latency=0.05) as server:
        made = pipeline(server.url, tmp_path, 2_000, budget={"max_wall_s": 1.0})
        result = run(made, tmp_path / "a")
        assert server.counters.in_flight == 0
    assert result.exit_code == ExitCode.BUDGET
    assert 0 < len(teacher.draws) < 2_000
    assert sum(len(seeds) for seeds in seeds_of(result).values()) == len(teacher.draws), "every answer was used"
    assert_whole(result)


def test_a_server_that_gives_no_usage_is_counted_at_the_worst(tmp_path: Path) -> None:
    teacher = Teacher()
    with openai_server(teacher.script, usage_of="none") as server:
        result = run(pipeline(server.url, tmp_path, 200, budget={"max_tokens": 2_000}), tmp_path / "a")
    worst = len(question(0)) + TEMPLATE + MOST
    assert result.exit_code == ExitCode.BUDGET and len(teacher.draws) == 2_000 // worst
    assert_whole(result)


def test_a_short_prompt_which_is_mostly_template_does_not_make_long_ones_dear() -> None:
    meter = Meter()
    meter.answered(Usage(30), characters=2)
    assert meter.most_prompt_tokens(4_000) == 4_000 + TEMPLATE
    meter.answered(Usage(1_000), characters=4_000)
    assert 1_000 < meter.most_prompt_tokens(4_000) < 1_200
    dense = Meter()
    dense.answered(Usage(TEMPLATE + 200), characters=100)
    assert dense.most_prompt_tokens(100) >= TEMPLATE + 200
    dense.answered(Usage(2_000), characters=1_000)
    assert dense.most_prompt_tokens(500) >= 1_000


def test_no_more_slots_are_used_than_there_are_where_the_limit_shrank() -> None:
    meter = Meter()
    with InFlight(meter, 0.0, 0), InFlight(meter, 0.0, 0), InFlight(meter, 0.0, 0):
        pass
    assert meter.report(1)["slot_utilisation"] == 1


@pytest.mark.parametrize("fault", [hang, cut, garbled, reset], ids=["hang", "cut", "garbled", "reset"])
def test_a_request_that_the_server_may_have_worked_on_counts_though_no_answer_came(
    tmp_path: Path, fault: Callable[..., Fault]
) -> None:
    asked: Counter[str] = Counter()

    def fails(call: Call) -> Fault | None:
        asked["question"] += call.prompt.startswith("Question")
        return fault(times=None) if call.prompt.startswith("Question") else None

    with openai_server(faults=fails) as server:
        config = {"timeout": 0.2, "max_retries": 1}
        made = pipeline(server.url, tmp_path, 60, budget={"max_tokens": 1_000}, teacher=config, max_error_rate=1)
        result = run(made, tmp_path / "a")
    worst = len(question(0)) + TEMPLATE + MOST
    assert result.exit_code == ExitCode.BUDGET
    assert result.timing["models"]["teacher"]["unknown_tokens"] == 1_000 // worst * worst
    assert asked["question"] == 1_000 // worst  # those among them that go out again, for a kept connection was dead


def test_a_request_that_was_turned_away_costs_nothing(tmp_path: Path) -> None:
    teacher = Teacher()
    faults = {"Question": rate_limited("0.01", times=30), "Question 0001": status(503, times=3)}
    with openai_server(teacher.script, faults=faults) as server:
        made = pipeline(server.url, tmp_path, 20, budget={"max_tokens": 10_000})
        result = run(made, tmp_path / "a")
    assert result.exit_code == 0 and result.timing["models"]["teacher"]["unknown_tokens"] == 0


def test_a_budget_of_time_cuts_the_wait_before_another_try_short(tmp_path: Path) -> None:
    with openai_server(faults={"Question": rate_limited("60", times=None)}) as server:
        made = parse_pipeline(pipeline(server.url, tmp_path, 20, budget={"max_wall_s": 0.5}))
        running = execute(made, run_folder(tmp_path / "a", "limited"), unwatched)
        result = asyncio.run(asyncio.wait_for(running, 20))
    assert result.exit_code == ExitCode.BUDGET and "max_wall_s" in result.manifest["message"]
    assert_whole(result)


def test_with_a_raised_budget_the_run_goes_on_and_pays_only_the_rest(tmp_path: Path) -> None:
    teacher = Teacher()
    with openai_server(teacher.script, latency=jittered(0)) as server:
        made = [
            pipeline(server.url, tmp_path, 150, n=2, **({"budget": {"max_tokens": tokens}} if tokens else {}))
            for tokens in (3_000, 3_000, 0)
        ]
        results = [run(each, tmp_path / "a") for each in made]
        assert max(Counter(teacher.draws).values()) == 1
        assert len(teacher.draws) == 300
        whole = run(made[-1], tmp_path / "b")
    assert [result.exit_code for result in results] == [7, 7, 0]
    assert len({result.run_id for result in results}) == 1, "a budget makes no other data set"
    read = [result.quality["samples"]["accepted"] for result in results]
    assert read == sorted(read) and read[0] < read[1] < read[2]
    assert data_set(results[-1]) == data_set(whole)


def test_what_is_stored_is_free(tmp_path: Path) -> None:
    teacher = Teacher()
    with openai_server(teacher.script) as server:
        first = run(pipeline(server.url, tmp_path, 50), tmp_path / "a")
        paid = len(teacher.draws)
        budget = {"max_tokens": 1, "max_cost_usd": 1e-9}
        again = run(pipeline(server.url, tmp_path, 50, budget=budget, teacher={"price": PRICE}), tmp_path / "a")
        assert len(teacher.draws) == paid
    assert again.exit_code == 0
    assert data_set(again) == data_set(first)


def test_a_budget_of_money_needs_prices(tmp_path: Path) -> None:
    for parts, message in (
        ({"budget": {"max_cost_usd": 1}}, r"needs a price at models\.teacher"),
        ({"teacher": {"budget": {"max_cost_usd": 1}}}, r"models\.teacher: budget\.max_cost_usd: needs a `price`"),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            parse_pipeline(pipeline("http://127.0.0.1:1", tmp_path, 1, **parts))


@pytest.mark.parametrize("n", [1, 4])
def test_a_teachers_own_budget_skips_what_it_does_not_answer(tmp_path: Path, n: int) -> None:
    teacher, allowed = Teacher(), 3_000
    with openai_server(teacher.script, latency=jittered(0)) as server:
        own = {"budget": {"max_tokens": allowed}}
        result = run(pipeline(server.url, tmp_path, 200, n=n, teacher=own), tmp_path / "a")
        assert teacher.tokens <= allowed
        skipped = [s for s in read_samples(result.path / "ledger.sqlite") if s.status == "skipped"]
        assert_whole(result)
        whole = run(pipeline(server.url, tmp_path, 200, n=n), tmp_path / "a")
    assert result.exit_code == ExitCode.BUDGET
    assert "models.teacher.budget.max_tokens" in result.manifest["message"]
    assert 0 < len(skipped) < 200 and {failure.reason for s in skipped for failure in s.failures} == {"budget_spent"}
    assert whole.exit_code == 0 and max(Counter(teacher.draws).values()) == 1


def test_the_strong_teachers_own_budget_leaves_what_the_weak_one_can_do(tmp_path: Path) -> None:
    weak, strong = Teacher(rate=0.5), Teacher(rate=1.0)
    with openai_server(weak.script) as one, openai_server(strong.script) as two:
        models = {
            "weak": {"provider": "vllm", "model": "teacher", "base_url": one.url},
            "strong": {"provider": "vllm", "model": "teacher", "base_url": two.url, "budget": {"max_tokens": 400}},
        }
        ladder = {"teachers": ["weak", "strong"], "escalate_after": 1, "until": {"accepted": 1}}
        result = run(pipeline("", tmp_path, 60, models=models, n=2, **ladder), tmp_path / "a")
    assert result.exit_code == ExitCode.BUDGET and 0 < strong.tokens <= 400
    assert result.quality["samples"]["completed"] == 60
    right = sum(weak.right(*draw) for draw in weak.draws)
    assert result.quality["samples"]["accepted"] == right + len(strong.draws)


@contextmanager
def two_teachers(weak: Teacher, strong: Teacher, **habit: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    """Makes models of a weak and a strong teacher that listen, with budgets of so many tokens."""
    with (
        openai_server(weak.script, models=["weak"], **habit) as one,
        openai_server(strong.script, models=["strong"], **habit) as two,
    ):

        def models(**tokens: int) -> dict[str, Any]:
            return {
                name: {"provider": "vllm", "model": name, "base_url": server.url, "hedge": False}
                | ({"budget": {"max_tokens": tokens[name]}} if name in tokens else {})
                for name, server in (("weak", one), ("strong", two))
            }

        yield models


def ladder(siblings: str, **parts: Any) -> dict[str, Any]:
    until = {"accepted": 1, "wave": 2, "siblings": siblings}
    return {"teachers": ["weak", "strong"], "escalate_after": 2, "until": until, "n": 8, **parts}


@pytest.mark.parametrize("siblings", ["keep", "cancel"])
def test_where_the_weak_teachers_budget_is_spent_the_strong_one_goes_on(tmp_path: Path, siblings: str) -> None:
    weak, strong = Teacher(rate=0.5), Teacher(rate=0.5)
    with two_teachers(weak, strong, latency=jittered(0)) as models:
        made = ladder(siblings, models=models(weak=2_000))
        result = run(pipeline("", tmp_path, 80, **made), tmp_path / "a")
        assert_whole(result)
        samples = list(read_samples(result.path / "ledger.sqlite"))
        whole = run(pipeline("", tmp_path, 80, **ladder(siblings, models=models())), tmp_path / "a")
    assert result.exit_code == ExitCode.BUDGET and "models.weak.budget" in result.manifest["message"]
    assert result.quality["samples"]["completed"] == 80
    left_out = [sample for sample in samples if sample.failures]
    assert len(left_out) > 20
    for sample in left_out:
        lost = [failure.attempt or 0 for failure in sample.failures if failure.reason == "budget_spent"]
        by_weak, by_strong = (
            [c.attempt for c in sample.candidates if c.prompt.model == name] for name in ("weak", "strong")
        )
        of_weak = 4 if by_strong else 2 * (max(by_weak) // 2) + 2
        assert sorted([*lost, *by_weak]) == [*range(of_weak)] and len(lost) == len(sample.failures)
        assert by_strong == [*range(4, 4 + len(by_strong))] and (by_strong or sample.accepted)
    (failure,) = result.quality["failures"]
    assert failure["reason"] == "budget_spent" and failure["count"] == sum(len(s.failures) for s in left_out)
    assert whole.exit_code == 0 and not whole.quality["failures"]
    if siblings == "keep":  # what was called off is asked for again
        assert max(Counter(weak.draws).values()) == max(Counter(strong.draws).values()) == 1


def test_which_answers_are_fast_changes_nothing_where_the_weak_teacher_is_left_out(tmp_path: Path) -> None:
    made = []
    for number, siblings in enumerate(["keep", "keep", "cancel"]):
        weak, strong = Teacher(), Teacher(rate=0.4)
        with two_teachers(weak, strong, latency=jittered(number, 0.05)) as models:
            parts = ladder(siblings, models=models(weak=1))
            first = run(pipeline("", tmp_path, 40, **parts), tmp_path / str(number))
            before = data_set(first), strong.tokens
            again = run(pipeline("", tmp_path, 40, **parts), tmp_path / str(number))
            assert weak.draws == [] and (data_set(again), strong.tokens) == before, "what is stored is free"
        made.append((again, before))
    assert made[0][1] == made[1][1]
    assert made[0][0].manifest["content_sha256"] == made[1][0].manifest["content_sha256"]
    assert 0 < len(rows(made[0][0])) == len(rows(made[2][0])) and rows(made[0][0]) == rows(made[2][0])


@pytest.mark.parametrize("siblings", ["keep", "cancel"])
def test_a_sample_is_skipped_once_no_teacher_of_its_ladder_may_be_asked(tmp_path: Path, siblings: str) -> None:
    weak, strong = Teacher(), Teacher()
    with two_teachers(weak, strong) as models:
        made = pipeline("", tmp_path, 20, **ladder(siblings, models=models(weak=1, strong=1)))
        result = run(made, tmp_path / "a")
    assert {sample.status for sample in read_samples(result.path / "ledger.sqlite")} == {"skipped"}
    assert result.exit_code == ExitCode.BUDGET and weak.draws == strong.draws == []
    assert_whole(result)


def test_a_spent_budget_is_not_what_too_many_samples_failed_for(tmp_path: Path) -> None:
    weak, strong = Teacher(), Teacher()
    with two_teachers(weak, strong, faults={"Question": status(400, times=None)}) as models:
        made = pipeline("", tmp_path, 60, **ladder("keep", models=models(weak=1), n=6))
        with pytest.raises(TooManyErrors, match="most often bad_request at TextGeneration"):
            run(made, tmp_path / "a")


def test_what_was_not_asked_for_is_not_what_too_many_samples_failed_for(tmp_path: Path) -> None:
    teacher = Teacher()
    with openai_server(teacher.script, honours_n=False) as server:
        made = pipeline(server.url, tmp_path, 30, n=100, budget={"max_tokens": 2_000})
        with (tmp_path / "records30.jsonl").open("a") as file:
            file.writelines('{"task_id": "none"}\n' for _ in range(10))
        with pytest.raises(TooManyErrors, match=r"10 of 40 .* most often missing_field at CanonicalizeFields"):
            run(made, tmp_path / "a")


@pytest.mark.parametrize(
    "enough",
    [{"budget": {"max_tokens": 2_000}}, {"teacher": {"budget": {"max_tokens": 2_000}}}, {"target": {"accepted": 9}}],
)
def test_a_race_ends_where_nothing_more_is_asked(tmp_path: Path, enough: dict[str, Any]) -> None:
    teacher = Teacher(rate=0.5)
    with openai_server(teacher.script, latency=jittered(0)) as server:
        until = {"accepted": 3, "wave": 2, "siblings": "cancel"}
        made = parse_pipeline(pipeline(server.url, tmp_path, 60, n=8, until=until, **enough))
        running = execute(made, run_folder(tmp_path / "a", "raced"), unwatched)
        result = asyncio.run(asyncio.wait_for(running, 60))  # it would go on for ever
    assert_whole(result)
    left_alone = 0
    for sample in read_samples(result.path / "ledger.sqlite"):
        lost = [failure.attempt for failure in sample.failures]
        if sample.candidates:
            drawn = [*(candidate.attempt for candidate in sample.candidates), *lost]
            assert sorted(drawn, key=str) == [*range(len(drawn))], "each draw is an answer or says why there is none"
            left_alone += bool(lost)
    assert left_alone > 0


def test_a_race_ends_where_the_run_is_stopped(tmp_path: Path) -> None:
    def key_expires(call: Call) -> Fault | None:
        return status(401, times=None) if call.number > 40 and call.prompt.startswith("Question") else None

    with openai_server(Teacher(rate=0.0).script, faults=key_expires) as server:
        until = {"accepted": 1, "wave": 2, "siblings": "cancel"}
        made = parse_pipeline(pipeline(server.url, tmp_path, 10, n=16, until=until))
        running = execute(made, run_folder(tmp_path / "a", "raced"), unwatched)
        with pytest.raises(TeacherError, match="401"):
            asyncio.run(asyncio.wait_for(running, 60))


@pytest.mark.parametrize("place", ["run", "model"])
def test_what_is_called_off_counts_with_all_that_it_may_have_cost(tmp_path: Path, place: str) -> None:
    teacher = Teacher(rate=1.0)
    budget: dict[str, Any] = {"budget": {"max_tokens": 2_000}}
    with openai_server(teacher.script, latency=jittered(0)) as server:
        until = {"accepted": 1, "wave": 4, "siblings": "cancel"}
        parts = budget if place == "run" else {"teacher": budget}
        result = run(pipeline(server.url, tmp_path, 60, n=4, until=until, **parts), tmp_path / "a")
    assert result.exit_code == ExitCode.BUDGET
    meter = result.timing["models"]["teacher"]
    assert meter["unknown_tokens"] > 0
    assert teacher.tokens <= 2_000
    assert 1_800 < meter["prompt_tokens"] + meter["completion_tokens"] + meter["unknown_tokens"] <= 2_000
    assert_whole(result)


def test_what_is_answered_goes_through_all_steps_though_the_budget_is_spent_before_the_last_of_them(
    tmp_path: Path,
) -> None:
    """A step that looks at all samples parts those that work on single ones."""
    made = []
    with openai_server(Teacher(rate=0.5).script, latency=jittered(0)) as server:
        for filtered in (False, True):
            plan = pipeline(server.url, tmp_path, 400, budget={"max_tokens": 4_000}, teacher={"max_concurrency": 1})
            plan["steps"].insert(3, {"Deduplicate": {}} if filtered else {"RuleFilter": {"name": "any"}})
            made.append(run(plan, tmp_path / str(filtered)))
    whole, parted = made
    assert whole.exit_code == parted.exit_code == ExitCode.BUDGET
    assert len(rows(parted)) > 10
    assert [row["messages"] for row in rows(parted)] == [row["messages"] for row in rows(whole)]
    samples = parted.quality["samples"]
    assert samples["completed"] == whole.quality["samples"]["completed"]
    assert samples["read"] == len(list(read_samples(parted.path / "ledger.sqlite")))
    assert_whole(parted)


# --- targets ---


def test_a_target_is_met_exactly_with_the_same_data_set_at_any_concurrency_and_order(tmp_path: Path) -> None:
    made = []
    for number, (concurrency, habit) in enumerate([(1, {}), (32, {}), (32, {"honours_n": False})]):
        teacher = Teacher()
        with openai_server(teacher.script, latency=jittered(number), **habit) as server:
            config = {"max_concurrency": concurrency}
            parts: dict[str, Any] = {"target": {"accepted": 25}, "until": {"accepted": 1}, "teacher": config}
            made.append(run(pipeline(server.url, tmp_path, 120, n=4, **parts), tmp_path / str(number)))
    assert {result.exit_code for result in made} == {0}
    assert [len(rows(result)) for result in made] == [25] * 3
    assert all(rows_as_written(result) == rows_as_written(made[0]) for result in made)
    expected = [at for at in range(120) if any(map(right_of(made[0], at), range(4)))][:25]
    assert [row["fd_task_id"] for row in rows(made[0])] == [f"q{at}" for at in expected]
    assert_whole(made[0])


def test_what_finishes_beyond_a_target_is_in_no_report(tmp_path: Path) -> None:
    made = []
    for concurrency in (1, 32):
        teacher = Teacher()
        with openai_server(teacher.script, latency=jittered(concurrency)) as server:
            parts: dict[str, Any] = {"target": {"accepted": 10}, "teacher": {"max_concurrency": concurrency}}
            made.append(run(pipeline(server.url, tmp_path, 120, **parts), tmp_path / str(concurrency)))
    assert [result.quality["samples"]["accepted"] for result in made] == [10, 10]
    assert data_set(made[0]) == data_set(made[1])
    assert made[0].manifest["content_sha256"] == made[1].manifest["content_sha256"]


def rows_as_written(result: RunResult) -> dict[str, str]:
    return {name: digest for name, digest in data_set(result).items() if name.startswith("sft")}


def right_of(result: RunResult, number: int) -> Callable[[int], bool]:
    """Whether the attempt-th draw of a question is right, for the seeds that a run's first draw shows."""
    seeds = seeds_of(result).get(question(number))
    teacher = Teacher()
    return lambda attempt: seeds is not None and teacher.right(question(number), seeds[0] + attempt)


def test_beyond_a_target_no_more_is_asked_for_than_was_open(tmp_path: Path) -> None:
    teacher = Teacher(rate=0.5)
    with openai_server(teacher.script, latency=jittered(0)) as server:
        result = run(pipeline(server.url, tmp_path, 2_000, target={"accepted": 50}), tmp_path / "a")
    last = int(rows(result)[-1]["fd_task_id"][1:])
    assert len(rows(result)) == 50
    assert last + 1 <= len(teacher.draws) <= last + 1 + 64, "64 samples are open at a time"


def test_no_record_is_begun_once_as_many_as_the_target_are_accepted(tmp_path: Path) -> None:
    teacher = Teacher(rate=1.0)
    with openai_server(teacher.script, latency=lambda call: 1.0 if call.prompt == question(0) else 0.01) as server:
        result = run(pipeline(server.url, tmp_path, 2_000, target={"accepted": 20}), tmp_path / "a")
    assert [row["fd_task_id"] for row in rows(result)] == [f"q{at}" for at in range(20)]
    assert len(teacher.draws) <= 20 + 64, "the slow first one is waited for, with at most 64 samples open"


def test_once_a_target_is_assured_samples_beyond_it_are_asked_for_no_more(tmp_path: Path) -> None:
    teacher = Teacher(right=lambda prompt, _: question(1) <= prompt <= question(20))
    with openai_server(teacher.script, latency=lambda call: 1.0 if call.prompt > question(20) else 0.01) as server:
        parts: dict[str, Any] = {"target": {"accepted": 20}, "until": {"accepted": 1}}
        result = run(pipeline(server.url, tmp_path, 2_000, n=8, **parts), tmp_path / "a")
    assert [row["fd_task_id"] for row in rows(result)] == [f"q{at}" for at in range(1, 21)]
    asked = Counter(prompt for prompt, _ in teacher.draws)
    assert asked[question(0)] == 8, "it comes before the last that counts, and might take its place"
    beyond = sum(count for prompt, count in asked.items() if prompt > question(20))
    assert beyond <= 2 * 8, "what was in flight comes home; 64 samples were open, with eight waves each to come"
    assert result.quality["samples"]["read"] == 21


def test_a_run_that_met_its_target_needs_no_teacher_to_run_again(tmp_path: Path) -> None:
    """Neither for samples beyond the target, of which only some waves were asked for when it was met."""
    asked = Counter[str]()

    def right(prompt: str, _: int) -> bool:
        asked[prompt] += 1
        return prompt < question(40) and asked[prompt] == 4

    teacher = Teacher(right=right)
    with openai_server(teacher.script, latency=lambda call: 1.0 if call.prompt >= question(40) else 0.0) as server:
        parts: dict[str, Any] = {"target": {"accepted": 40}, "until": {"accepted": 1}}
        made = pipeline(server.url, tmp_path, 60, n=4, teacher={"max_concurrency": 64}, **parts)
        first = run(made, tmp_path / "a")
        assert 0 < asked[question(50)] < 4, "it was asked for beside the others, and is not done"
        contacts = server.counters.paths.total()
        again = run(made, tmp_path / "a")
        assert server.counters.paths.total() == contacts
    assert data_set(again) == data_set(first)


def test_samples_that_wait_for_each_others_answers_meet_a_target(tmp_path: Path) -> None:
    teacher = Teacher(rate=0.3)
    with openai_server(teacher.script, latency=jittered(0)) as server:
        parts: dict[str, Any] = {"target": {"accepted": 45}, "until": {"accepted": 1}}
        made = pipeline(server.url, tmp_path, 60, n=4, teacher={"max_concurrency": 1}, **parts)
        made["steps"][2]["TextGeneration"]["template"] = "{{ question[:12] }}"  # ten ask the very same
        for _ in range(2):
            result = run(made, tmp_path / "a")
            assert result.exit_code == 0
    assert result.timing["models"]["teacher"]["answers_paid"] == 0


def test_samples_that_need_the_same_answer_hold_up_no_others_of_a_target(tmp_path: Path) -> None:
    with openai_server(Teacher(rate=1.0).script, latency=lambda call: 0.05) as server:
        made = pipeline(server.url, tmp_path, 200, target={"accepted": 200}, teacher={"max_concurrency": 32})
        each_two_ask_the_same = "{{ question.split()[-1] | int // 2 }}"
        made["steps"][2]["TextGeneration"]["template"] = each_two_ask_the_same
        run(made, tmp_path / "a")
        assert server.counters.peak > 10


class Sorted(StreamStep):
    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample]:
        yield from sorted(samples, key=lambda sample: -sample.index)


class Silent(StreamStep):
    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample]:
        yield from (sample for sample in samples if sample.index % 3)


@pytest.mark.parametrize("step", [Sorted(), Silent()])
def test_samples_that_a_target_can_not_count_end_the_run_with_what_is_wrong(tmp_path: Path, step: StreamStep) -> None:
    with openai_server(Teacher().script) as server:
        made = parse_pipeline(pipeline(server.url, tmp_path, 200, target={"accepted": 20}))
        steps = (*made.steps[:2], step, *made.steps[2:])
        running = execute(made, run_folder(tmp_path / "a", "target"), unwatched, steps)
        with pytest.raises(ConfigError, match="target: counts samples in input order"):
            asyncio.run(asyncio.wait_for(running, 60))


@pytest.mark.parametrize(("on_exhausted", "code"), [("keep", 0), ("fail", 5)])
def test_records_that_do_not_suffice_for_a_target_give_what_there_is(
    tmp_path: Path, on_exhausted: str, code: int
) -> None:
    teacher = Teacher()
    target = {"accepted": 60, "on_exhausted": on_exhausted}
    with openai_server(teacher.script) as server:
        result = run(pipeline(server.url, tmp_path, 60, target=target), tmp_path / "a")
    assert result.exit_code == code
    assert len(rows(result)) == sum(teacher.right(*draw) for draw in teacher.draws) < 60
    assert_whole(result)


def test_an_accepted_candidate_of_a_sample_that_failed_does_not_count_towards_a_target(tmp_path: Path) -> None:
    teacher = Teacher(rate=1.0)

    def judge(call: Call, index: int) -> str:
        return '{"criteria": {"right": true}, "score": 5}'

    with openai_server(teacher.script) as server, openai_server(judge, models=["judge"]) as other:
        made = pipeline(server.url, tmp_path, 60, target={"accepted": 15}, max_error_rate=1)
        made["models"]["judge"] = {"provider": "vllm", "model": "judge", "base_url": other.url}
        step = {"task": "{{ question }}", "reference": "{{ gold }}", "criteria": {"right": "?"}, "structured": False}
        made["steps"].insert(4, {"LLMJudge": step})
        records = [
            {"task_id": f"q{at}", "question": question(at)} | ({"gold": "g"} if at % 3 else {}) for at in range(60)
        ]
        (tmp_path / "records60.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        result = run(made, tmp_path / "a")
    assert [row["fd_task_id"] for row in rows(result)] == [f"q{at}" for at in range(60) if at % 3][:15]
    assert result.quality["samples"]["accepted"] == 15
    export_run(result.run_id, ["jsonl"], [], tmp_path / "dist", tmp_path / "a")
    written = [
        {path.relative_to(dist): path.read_bytes() for path in dist.rglob("*.*")}
        for dist in (result.dataset, tmp_path / "dist")
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "step",
    [
        {"Deduplicate": {}},
        {"Decontaminate": {"against": ["x.jsonl"], "fields": ["question"]}},
        {"Shard": {"index": 0, "of": 2}},
    ],
)
def test_a_target_is_refused_where_accepted_samples_could_be_left_out_again(
    tmp_path: Path, step: dict[str, Any]
) -> None:
    made = pipeline("http://127.0.0.1:1", tmp_path, 3, target={"accepted": 2})
    made["steps"].insert(5, step)
    with pytest.raises(ConfigError, match=rf"target: steps\[5\]\.{next(iter(step))} leaves out accepted samples"):
        parse_pipeline(made)
    parse_pipeline(made | {"target": None})


def test_a_target_and_a_budget_end_at_whichever_comes_first(tmp_path: Path) -> None:
    for target, tokens, code in ((10, 10**6, 0), (10**3, 2_000, 7)):
        teacher = Teacher()
        with openai_server(teacher.script) as server:
            parts: dict[str, Any] = {"target": {"accepted": target}, "budget": {"max_tokens": tokens}}
            result = run(pipeline(server.url, tmp_path, 300, **parts), tmp_path / str(code))
        assert result.exit_code == code
        assert len(rows(result)) <= target
        assert_whole(result)


def _sample(index: int, accepted: bool) -> Sample:
    prompt = Prompt("vllm", "teacher", (), {})
    candidate = Candidate("c", 0, 0, "k", prompt, Completion("", FinishReason.STOP), "")
    return Sample(index, "s", {}, candidates=(candidate,) if accepted else ())


@given(st.lists(st.booleans(), max_size=40), st.randoms(use_true_random=False), st.integers(1, 10))
def test_nothing_is_asked_for_beyond_a_target_that_stored_answers_make_full(
    accepted: list[bool], dice: random.Random, target: int
) -> None:
    progress = Progress(target)
    counting = [at for at, yes in enumerate(accepted) if yes][:target]
    waiting = list(range(counting[-1] + 1 if len(counting) == target else len(accepted)))
    beyond = range(len(waiting), len(accepted))
    while not progress.reached and waiting:
        assert progress.may_ask(waiting[0]), "or all would wait for each other"
        assert not any(map(progress.may_ask, beyond))
        at = dice.choice(waiting)
        progress.finished(_sample(at, accepted[at]))
        waiting.remove(at)


@given(st.lists(st.sampled_from("af"), max_size=40), st.randoms(use_true_random=False))
def test_the_first_sample_for_which_nothing_was_asked_is_known(kinds: list[str], dice: random.Random) -> None:
    """Of samples that ask (a) and finish (f), or finish alone, in any order."""
    progress, asked, finished = Progress(1_000), set[int](), set[int]()
    waiting = [*enumerate(kinds)]
    while waiting:
        at, kind = dice.choice(waiting)
        if kind == "a" and at not in asked:
            progress.asks(at)
            asked.add(at)
        else:
            progress.finished(_sample(at, False))
            finished.add(at)
            waiting.remove((at, kind))
        assert progress.free == next(it for it in range(len(kinds) + 1) if it not in asked | finished)


@given(st.lists(st.booleans(), max_size=60), st.randoms(use_true_random=False), st.integers(1, 20))
def test_only_what_is_accepted_before_the_first_unfinished_sample_counts(
    accepted: list[bool], dice: random.Random, target: int
) -> None:
    order = list(range(len(accepted)))
    dice.shuffle(order)
    progress, up_to, finished = Progress(), Progress(target), set[int]()
    counted: list[int] = []
    for index in order:
        progress.finished(_sample(index, accepted[index]))
        counted += [sample.index for sample in up_to.finished(_sample(index, accepted[index]))]
        finished.add(index)
        done = next((at for at in range(len(accepted)) if at not in finished), len(accepted))
        assert progress.accepted == sum(accepted[:done])
        assert up_to.accepted == min(target, progress.accepted)
        assert up_to.reached == (up_to.accepted == target)
        assert up_to.assured == (sum(accepted[at] for at in finished) >= target)
        for at in {*order} - finished:
            enough_before = sum(accepted[it] for it in finished if it < at) >= target
            assert up_to.beyond(at) == (enough_before and not up_to.reached)
    kept = list(first_accepted((_sample(at, yes) for at, yes in enumerate(accepted)), Target(accepted=target)))
    assert sum(bool(sample.accepted) for sample in kept) == min(target, sum(accepted))
    assert [sample.index for sample in kept] == list(range(len(kept)))
    assert len(kept) == len(accepted) or kept[-1].accepted
    assert counted == [sample.index for sample in kept], "what counts is what is kept"


# --- waves ---


def draws_in_theory(teacher: Teacher, result: RunResult, *, n: int, wave: int, accepted: int = 1) -> int:
    """Draws of all samples if each stops after the first wave with enough accepted ones."""
    total = 0
    for prompt, seeds in seeds_of(result).items():
        asked = found = 0
        while asked < n and found < accepted:
            step = range(asked, min(asked + wave, n))
            found += sum(teacher.right(prompt, seeds[0] + attempt) for attempt in step)
            asked += len(step)
        total += asked
    return total


@pytest.mark.parametrize(("wave", "accepted"), [(1, 1), (3, 1), (2, 2)])
def test_as_many_draws_are_asked_for_as_the_passes_say(tmp_path: Path, wave: int, accepted: int) -> None:
    teacher = Teacher()
    with openai_server(teacher.script, latency=jittered(1)) as server:
        until = {"wave": wave, "accepted": accepted}
        result = run(pipeline(server.url, tmp_path, 60, n=8, until=until), tmp_path / "a")
    assert max(Counter(teacher.draws).values()) == 1
    assert len(teacher.draws) == draws_in_theory(teacher, result, n=8, wave=wave, accepted=accepted)
    for seeds in seeds_of(result).values():
        assert seeds == list(range(seeds[0], seeds[0] + len(seeds)))


def test_which_attempts_are_made_and_kept_does_not_depend_on_which_answer_is_fast(tmp_path: Path) -> None:
    made = []
    for number in range(2):
        teacher = Teacher()
        with openai_server(teacher.script, latency=jittered(number, 0.05), honours_n=False) as server:
            parts: dict[str, Any] = {"until": {"accepted": 2, "wave": 3}, "teacher": {"max_concurrency": 32}}
            result = run(pipeline(server.url, tmp_path, 40, n=8, **parts), tmp_path / str(number))
        made.append((data_set(result), sorted(teacher.draws), seeds_of(result)))
    assert made[0] == made[1]


def test_at_a_pass_rate_of_three_in_ten_until_takes_less_than_half_of_the_tokens(tmp_path: Path) -> None:
    results, teachers = [], []
    for until in (None, {"accepted": 1}):
        teacher = Teacher(rate=0.3)
        with openai_server(teacher.script) as server:
            parts: dict[str, Any] = {} if until is None else {"until": until}
            results.append(run(pipeline(server.url, tmp_path, 120, n=8, **parts), tmp_path / str(until is None)))
        teachers.append(teacher)
    fixed, waves = teachers
    accepted = [result.quality["samples"]["accepted"] for result in results]
    assert accepted[0] == accepted[1] > 100
    # With k = 1 and no score, the first accepted attempt is the best one: the very same rows.
    assert rows(results[0]) == rows(results[1])
    assert fixed.tokens / waves.tokens >= 2.0, "prompts included, though each wave sends the prompt again"
    assert fixed.completion_tokens / waves.completion_tokens >= 2.3


def test_the_next_teacher_is_asked_after_so_many_waves_and_the_rows_say_who_answered(tmp_path: Path) -> None:
    weak = Teacher(right=lambda prompt, seed: int(prompt[-4:]) % 2 == 0)
    strong = Teacher(right=lambda prompt, seed: int(prompt[-4:]) % 4 != 3)
    with (
        openai_server(weak.script, models=["weak"]) as small,
        openai_server(strong.script, models=["strong"]) as large,
    ):
        models = {
            name: {"provider": "vllm", "model": name, "base_url": server.url, "hedge": False}
            for name, server in (("weak", small), ("strong", large))
        }
        parts: dict[str, Any] = {
            "teachers": ["weak", "strong"],
            "escalate_after": 2,
            "until": {"accepted": 1, "wave": 1},
        }
        result = run(pipeline("", tmp_path, 40, n=5, models=models, **parts), tmp_path / "a")
    asked = {at: (prompts(weak)[question(at)], prompts(strong)[question(at)]) for at in range(40)}
    assert {asked[at] for at in range(0, 40, 2)} == {(1, 0)}
    assert {asked[at] for at in range(1, 40, 4)} == {(2, 1)}
    assert {asked[at] for at in range(3, 40, 4)} == {(2, 3)}, "the last one has all waves that are left"
    assert [(row["fd_task_id"], row["fd_model"]) for row in rows(result)] == [
        (f"q{at}", "weak" if at % 2 == 0 else "strong") for at in range(40) if at % 4 != 3
    ]


def prompts(teacher: Teacher) -> Counter[str]:
    return Counter(prompt for prompt, _ in teacher.draws)


@pytest.mark.parametrize("wave", [1, 3])
def test_a_draw_that_breaks_the_server_does_not_keep_the_waves_going(tmp_path: Path, wave: int) -> None:
    def poisoned(call: Call) -> Fault | None:
        # The last draw but one, of a prompt that has no right answer.
        broken = call.prompt == question(3) and call.seed is not None and call.seed % 3 == 1
        return status(500, "CUDA error", times=None) if broken else None

    teacher = Teacher(right=lambda prompt, seed: prompt != question(3))
    with openai_server(teacher.script, faults=poisoned, honours_n=False) as server:
        made = pipeline(server.url, tmp_path, 20, n=6, until={"wave": wave}, teacher={"max_retries": 1})
        result = run(made, tmp_path / "a")
    assert [row["fd_task_id"] for row in rows(result)] == [f"q{at}" for at in range(20) if at != 3]
    answered = {seed for prompt, seed in teacher.draws if prompt == question(3)}
    assert len(answered) <= 4
    others: Sequence[int] = [count for prompt, count in prompts(teacher).items() if prompt != question(3)]
    assert set(others) == {wave}
