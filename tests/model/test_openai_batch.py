"""The Batch API through the provider interface, against a local server that speaks it: nothing is paid for twice."""

import asyncio
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from fastdistill.control.config import parse_pipeline
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import EnvironmentFault, ExitCode, FatalError, NotAsked, TeacherError
from fastdistill.core.types import Completion, Prompt
from fastdistill.model.provider import ATTEMPT, ErrorKind, ProviderError
from fastdistill.model.providers.openai import OpenAIConfig, OpenAIProvider
from fastdistill.model.providers.openai_batch import AT_ONCE, BatchProvider
from tests.servers import Batch, Call, OpenAIServer, Server, openai_server, status
from tests.world import ANSWERS, RECORDS, config, make_database, write_records

POLL = 0.05  # seconds
QUIET = 0.2


class Brake:
    """Lets everything through until it is told not to."""

    def __init__(self) -> None:
        self.reason: Exception | None = None
        self.stopped = asyncio.Event()

    def check(self, tokens: int, dollars: float) -> bool:
        if self.reason is not None:
            raise self.reason
        return False

    async def pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopped.wait(), seconds)

    def stop(self, reason: Exception) -> None:
        self.reason = reason
        self.stopped.set()

    def turn(self) -> None:
        return None

    def asks(self) -> None:
        pass


def model(url: str, *, size: int = 100, **fields: Any) -> OpenAIConfig:
    batch = {"size": size, "poll_s": POLL, "quiet_s": QUIET}
    return OpenAIConfig.model_validate({"model": "teacher", "base_url": url, "batch": batch, "api_key": "k", **fields})


def prompt(text: str, **decode: Any) -> Prompt:
    parameters = DecodeProfile(**decode).parameters()
    return Prompt("openai", "teacher", ({"role": "user", "content": text},), parameters)


PROMPTS = [prompt(f"question {number}") for number in range(7)]

Result = list[Completion] | BaseException


def ask(
    server: Server, folder: Path, prompts: Sequence[Prompt] = PROMPTS, *, seed: int | None = 7, **fields: Any
) -> list[Result]:
    """One process's life: what each prompt comes to."""
    return talk(server, folder, lambda provider, _: together(provider, prompts, seed), **fields)


def talk(
    server: Server,
    folder: Path,
    talking: Callable[[BatchProvider, Brake], Awaitable[list[Result]]],
    **fields: Any,
) -> list[Result]:
    async def go() -> list[Result]:
        settings, brake = model(server.url, **fields), Brake()
        provider = OpenAIProvider.in_run(settings, folder, brake)
        assert isinstance(provider, BatchProvider)
        async with provider:
            return await talking(provider, brake)

    return asyncio.run(go())


async def together(provider: BatchProvider, prompts: Sequence[Prompt], seed: int | None = 7) -> list[Result]:
    return await asyncio.gather(*(provider.complete(p, seed=seed, n=1) for p in prompts), return_exceptions=True)


def texts(results: Sequence[Result]) -> list[str]:
    return [result[0].text if isinstance(result, list) else repr(result) for result in results]


def lines(server: OpenAIServer) -> list[int]:
    """Lines of each batch that was made."""
    return [len(server.files[batch["input_file_id"]].splitlines()) for batch in server.batches]


def unbatched(server: Server, prompts: Sequence[Prompt] = PROMPTS) -> list[str]:
    async def go() -> list[str]:
        async with OpenAIProvider(model(server.url, batch=False)) as provider:
            return [(await provider.complete(each, seed=7, n=1))[0].text for each in prompts]

    return asyncio.run(go())


# --- the config ---


def test_batch_is_a_switch_or_its_options() -> None:
    assert model("http://x", batch=False).batch is None
    switched = model("http://x", batch=True)
    assert switched.batch is not None
    assert (switched.batch.size, switched.batch.completion_window) == (10_000, "24h")
    assert switched.max_concurrency == 10_000, "a whole batch is in flight"
    assert model("http://x", batch={"size": 5}, max_concurrency=20).max_concurrency == 20
    assert OpenAIConfig.model_validate(switched.model_dump()) == switched.model_copy(update={"api_key": None})


def test_a_batch_is_not_hedged() -> None:
    assert not model("http://x", provider="vllm").hedges
    with pytest.raises(ValidationError, match="hedge"):
        model("http://x", hedge=True)


def test_batches_are_at_one_server() -> None:
    with pytest.raises(ValidationError, match="one base_url"):
        model("", base_url=["http://x", "http://y"])


@pytest.mark.parametrize("size", [0, 50_001])
def test_a_batch_holds_no_more_than_the_api_takes(size: int) -> None:
    with pytest.raises(ValidationError, match="size"):
        model("http://x", size=size)


def test_the_official_api_is_given_the_limit_under_the_name_that_every_model_takes(tmp_path: Path) -> None:
    settings = model("https://api.openai.com/v1")
    assert settings.batch is not None
    provider = BatchProvider(settings, settings.batch, tmp_path, Brake())
    assert provider._body(prompt("x", max_tokens=9), 1, 1)["max_completion_tokens"] == 9


def test_a_probe_costs_nothing(tmp_path: Path) -> None:
    async def probe() -> None:
        async with OpenAIProvider.in_run(model(server.url), tmp_path, Brake()) as provider:
            found = await provider.probe()
            assert (found.models, found.n) == (("teacher",), None)

    with openai_server() as server:
        asyncio.run(probe())
    assert server.counters.requests == 0


# --- what goes out, and what comes back ---


def test_requests_go_out_as_one_batch_and_get_the_answers_that_they_would_get_alone(tmp_path: Path) -> None:
    with openai_server(api_key="k", batches={1: Batch(seconds=0.2)}) as server:
        answers = ask(server, tmp_path)
        assert texts(answers) == unbatched(server)
    assert lines(server) == [7]
    (batch,) = server.batches
    assert (batch["endpoint"], batch["completion_window"]) == ("/v1/chat/completions", "24h")
    first = json.loads(server.files[batch["input_file_id"]].splitlines()[0])
    assert (first["method"], first["url"], first["body"]) == ("POST", "/v1/chat/completions", server.counters.bodies[0])


def test_a_full_batch_makes_room_for_the_next(tmp_path: Path) -> None:
    with openai_server() as server:
        answers = ask(server, tmp_path, size=3)
        assert texts(answers) == unbatched(server)
    assert lines(server) == [3, 3, 1]


def test_a_line_that_failed_costs_no_other_and_can_be_asked_again(tmp_path: Path) -> None:
    async def twice(provider: BatchProvider, brake: Brake) -> list[Result]:
        first = await together(provider, PROMPTS)
        return [*first, *await together(provider, PROMPTS[2:4])]

    faults = {"question 2": status(500), "question 3": status(400, "bad", times=None)}
    with openai_server(faults=faults) as server:
        results = talk(server, tmp_path, twice)
        plain = unbatched(server, [p for p in PROMPTS if p is not PROMPTS[3]])
    assert texts(results[:2] + results[4:8]) == [*plain[:2], *plain[3:], plain[2]]
    kinds = [result.kind for result in results if isinstance(result, ProviderError)]
    assert kinds == [ErrorKind.SERVER, ErrorKind.BAD_REQUEST, ErrorKind.BAD_REQUEST]
    assert lines(server) == [7, 2]


def test_what_the_server_refuses_by_name_is_left_out_of_the_next_batch(tmp_path: Path) -> None:
    with openai_server(refuses=("top_k",)) as server:
        answers = ask(server, tmp_path, PROMPTS[:2])
        assert texts(answers) == unbatched(server, PROMPTS[:2])
    assert lines(server) == [2, 2]


def test_an_expired_batch_keeps_its_answers_and_the_rest_is_asked_again(tmp_path: Path) -> None:
    async def twice(provider: BatchProvider, brake: Brake) -> list[Result]:
        first = await together(provider, PROMPTS)
        return [*first[:4], *await together(provider, PROMPTS[4:]), *first[4:]]

    with openai_server(batches={1: Batch(ends="expired", answered=4)}) as server:
        results = talk(server, tmp_path, twice)
        assert texts(results[:7]) == unbatched(server)
    assert lines(server) == [7, 3]
    expired = [result for result in results if isinstance(result, ProviderError)]
    assert [error.kind for error in expired] == [ErrorKind.OVERLOADED] * 3
    assert "batch_1 is expired, batch_expired: not executed" in str(expired[0])


def test_a_batch_that_somebody_cancelled_stops_the_run_and_the_next_asks_for_the_rest(tmp_path: Path) -> None:
    with openai_server(batches={1: Batch(ends="cancelled", answered=4)}) as server:
        results = ask(server, tmp_path)
        again = ask(server, tmp_path)
        assert texts(again) == unbatched(server)
    assert [type(result) for result in results] == [list] * 4 + [TeacherError] * 3
    assert lines(server) == [7, 3]


def test_a_batch_that_fails_is_told_in_the_servers_words_and_is_not_on_record(tmp_path: Path) -> None:
    with openai_server(batches={1: Batch(ends="failed", code="invalid_json_line")}) as server:
        results = ask(server, tmp_path)
        assert {str(result) for result in results} == {
            f"openai: {server.url}: batch batch_1 failed: scripted: invalid_json_line"
        }
        assert not list(tmp_path.rglob("*.json"))
        assert texts(ask(server, tmp_path)) == unbatched(server)
    assert lines(server) == [7, 7]


def test_a_batch_that_is_too_much_for_the_account_waits_for_another(tmp_path: Path) -> None:
    full = Batch(ends="failed", code="token_limit_exceeded")
    with openai_server(batches={1: Batch(seconds=1), 2: full}) as server:
        answers = ask(server, tmp_path, size=6)
        assert texts(answers) == unbatched(server)
    assert lines(server)[0] == 6
    assert {*lines(server)[1:]} == {1}
    with openai_server(batches={1: full}) as server:
        [error] = ask(server, tmp_path, PROMPTS[:1])
    assert "lower `batch.size`" in str(error)


def test_a_file_that_is_too_large_for_the_server_is_told_with_the_remedy(tmp_path: Path) -> None:
    with openai_server(largest_file=1000) as server:
        [error] = ask(server, tmp_path, [prompt("long " * 300)])
    assert isinstance(error, TeacherError) and "or lower `batch.size` (POST /files)" in str(error)


def test_a_server_without_a_batch_api_is_one_clear_error(tmp_path: Path) -> None:
    with openai_server() as server:
        [error] = talk(
            server, tmp_path, lambda provider, _: together(provider, PROMPTS[:1]), base_url=f"{server.url}/nothing"
        )
    assert isinstance(error, TeacherError)
    assert "404" in str(error) and "POST /files" in str(error)


def test_lines_come_in_any_order_and_one_that_is_spoilt_costs_no_other(tmp_path: Path) -> None:
    def spoil(output: list[str]) -> list[str]:
        unknown = json.dumps(json.loads(output[0]) | {"custom_id": "nobody's"})
        again = json.dumps(json.loads(output[0]) | {"response": {"status_code": 500, "body": {}}})
        return [output[3][:40], unknown, "", *output[4:][::-1], output[0], again, "null", output[1]]

    with openai_server(batches={1: Batch(spoils=spoil)}) as server:
        answers = ask(server, tmp_path)
        plain = unbatched(server)
    assert texts(answers[:2] + answers[4:]) == plain[:2] + plain[4:]
    assert [error.kind for error in answers[2:4] if isinstance(error, ProviderError)] == [ErrorKind.OVERLOADED] * 2


def test_half_a_character_costs_no_answer(tmp_path: Path) -> None:
    with openai_server(lambda *_: "SELECT '\ud83d") as server:
        assert texts(ask(server, tmp_path)) == ["SELECT '\ufffd"] * len(PROMPTS)
    assert lines(server) == [len({prompt.digest for prompt in PROMPTS})]


@pytest.mark.parametrize("seed", [7, None])
def test_answers_that_can_not_be_read_are_left_for_the_next_run(tmp_path: Path, seed: int | None) -> None:
    whole: list[list[str]] = []

    def spoil(output: list[str]) -> list[str]:
        whole.append(output)
        return ["<html>", "sign in</html>"]

    with openai_server(batches={1: Batch(spoils=spoil)}) as server:
        results = ask(server, tmp_path, seed=seed, max_retries=1)
        assert all(isinstance(result, TeacherError) and "/content should bring" in str(result) for result in results)
        server.files[server.batches[0]["output_file_id"]] = "\n".join(whole[0]).encode()
        answers = ask(server, tmp_path, seed=seed)
    assert all(isinstance(answer, list) for answer in answers)
    assert lines(server) == [7]


def test_answers_of_a_batch_leave_the_event_loop_to_others_in_between(tmp_path: Path) -> None:
    """Neither those who wait for a batch nor those who wait for the records of earlier ones go on all at once."""
    turns: list[int] = []

    class Counting(asyncio.SelectorEventLoop):
        def call_soon(self, *args: Any, **context: Any) -> asyncio.Handle:  # type: ignore[override]
            turns[-1:] = [turns[-1] + 1] if turns else []
            return super().call_soon(*args, **context)

    async def go() -> None:
        async def take_turns() -> None:
            while True:
                turns.append(0)
                await asyncio.sleep(0)

        provider = OpenAIProvider.in_run(model(server.url, size=160), tmp_path, Brake())
        async with provider:
            asked = [asyncio.create_task(provider.complete(prompt(f"{at}"), seed=7, n=1)) for at in range(160)]
            await asyncio.sleep(0)
            other = asyncio.create_task(take_turns())
            assert all([len(answers) == 1 for answers in await asyncio.gather(*asked)])
            other.cancel()

    with openai_server() as server, asyncio.Runner(loop_factory=Counting) as runner:
        runner.run(go())
    assert max(turns[1:]) < 5 * AT_ONCE


# --- nothing is paid for twice ---


def test_a_server_that_is_away_for_a_moment_costs_nothing(tmp_path: Path) -> None:
    with openai_server(batches={1: Batch(unseen=3)}) as server:
        answers = ask(server, tmp_path)
        assert texts(answers) == unbatched(server)
    assert lines(server) == [7]


@pytest.mark.parametrize("breaks", ["before", "after"])
def test_a_batch_whose_making_broke_off_is_looked_for_before_it_is_made_again(tmp_path: Path, breaks: Any) -> None:
    with openai_server(batches={1: Batch(breaks=breaks)}) as server:
        answers = ask(server, tmp_path)
        assert texts(answers) == unbatched(server)
    assert lines(server) == [7]


@pytest.mark.parametrize("breaks", ["before", "after"])
def test_a_run_that_died_while_making_a_batch_is_followed_by_one_that_looks_for_it(tmp_path: Path, breaks: Any) -> None:
    with openai_server(batches={3: Batch(breaks=breaks)}) as server:
        ask(server, tmp_path / "others", PROMPTS[:2], size=1)
        results = ask(server, tmp_path, max_retries=0)
        ask(server, tmp_path / "others", PROMPTS[2:4], size=1)
        answers = ask(server, tmp_path)
        assert texts(answers) == unbatched(server)
    assert {type(result) for result in results} == {TeacherError}
    assert sorted(lines(server)) == [1, 1, 1, 1, 7]


def test_a_batch_that_is_not_made_yet_stays_on_record_whoever_looks(tmp_path: Path) -> None:
    with openai_server(batches={1: Batch(breaks="before")}) as server:
        ask(server, tmp_path, max_retries=0)
        records = list(tmp_path.rglob("*.json"))
        ask(server, tmp_path, [prompt("another model's")])  # which shares the folder, and may make batches meanwhile
    assert len(records) == 1 and records[0].exists()


def test_a_record_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "17.json").write_text("{")
    with openai_server() as server:
        [error] = ask(server, tmp_path, PROMPTS[:1])
    assert isinstance(error, EnvironmentFault)
    assert "17.json is no record of a batch" in str(error) and "remove it" in str(error)


async def looked_at(server: Server) -> None:
    while not server.counters.paths["/v1/batches/batch_1"]:  # noqa: ASYNC110 - of another loop
        await asyncio.sleep(0.01)


def leave(server: Server, folder: Path, prompts: Sequence[Prompt] = PROMPTS, seed: int | None = 7) -> None:
    """Asks, and is gone while the batch is at the server."""

    async def start(provider: BatchProvider, brake: Brake) -> list[Result]:
        asking = asyncio.ensure_future(together(provider, prompts, seed))
        await looked_at(server)
        assert not asking.done()
        asking.cancel()
        await asyncio.wait([asking])
        return []

    talk(server, folder, start)


@pytest.mark.parametrize("seed", [7, None])
def test_a_batch_of_an_earlier_run_is_gone_on_with(tmp_path: Path, seed: int | None) -> None:
    with openai_server(batches={1: Batch(seconds=1)}) as server:
        leave(server, tmp_path, [*PROMPTS, *PROMPTS], seed)
        answers = ask(server, tmp_path, [*PROMPTS, *PROMPTS, prompt("new")], seed=seed)
    assert all(isinstance(answer, list) for answer in answers)
    assert lines(server) == [14, 1]


def test_lines_of_an_earlier_run_that_failed_are_asked_anew(tmp_path: Path) -> None:
    with openai_server(faults={"question 2": status(500)}, batches={1: Batch(seconds=1)}) as server:
        leave(server, tmp_path)
        answers = ask(server, tmp_path)
        assert texts(answers) == unbatched(server)
    assert lines(server) == [7, 1]


@pytest.mark.parametrize("seed", [7, None])
def test_an_answer_that_was_read_and_not_stored_is_read_again_for_the_same_draw_alone(
    tmp_path: Path, seed: int | None
) -> None:
    def drawn(attempt: int, **fields: Any) -> list[str]:
        async def ask_for(provider: BatchProvider, brake: Brake) -> list[Result]:
            ATTEMPT.set(attempt)
            return await together(provider, PROMPTS[:2], None if seed is None else seed + attempt)

        return texts(talk(server, tmp_path, ask_for, **fields))

    with openai_server(lambda call, index: str(call.number)) as server:
        first, second = drawn(0), drawn(1)
        assert lines(server) == [2, 2], "another draw of the same prompts is another answer"
        assert (drawn(0), drawn(1)) == (first, second), "the run was killed before it had stored what it read"
        assert lines(server) == [2, 2]
        assert drawn(0, revision="of May") != first, "another state of the model"
        assert lines(server) == [2, 2, 2]


def test_a_batch_that_the_server_has_forgotten_is_told_with_its_record(tmp_path: Path) -> None:
    with openai_server() as server:
        ask(server, tmp_path)
        [record] = tmp_path.rglob("*.json")
        server.batches[0]["id"] = "another"
        told = ask(server, tmp_path)
        assert all(isinstance(each, TeacherError) and "or remove it to ask anew" in str(each) for each in told)
        assert str(record) in str(told[0])
        record.unlink()
        assert all(isinstance(answer, list) for answer in ask(server, tmp_path))


def test_records_are_dropped_when_the_server_has_deleted_the_answers(tmp_path: Path) -> None:
    with openai_server() as server:
        ask(server, tmp_path)
        (record,) = tmp_path.rglob("*.json")
        old = record.rename(record.with_name(f"{int(record.stem) - 31 * 86_400 * 10**9}.json"))
        ask(server, tmp_path)
    assert lines(server) == [7, 7]
    assert not old.exists()


def test_a_run_that_must_stop_leaves_its_batch_at_the_server_and_says_so(tmp_path: Path) -> None:
    async def interrupted(provider: BatchProvider, brake: Brake) -> list[Result]:
        asking = asyncio.ensure_future(together(provider, PROMPTS))
        await looked_at(server)
        brake.stop(FatalError("interrupted"))
        return await asking

    with openai_server(batches={1: Batch(seconds=60)}) as server:
        results = talk(server, tmp_path, interrupted)
    assert {str(result) for result in results} == {
        "interrupted; still at the server, for the next run to read: batch_1"
    }


def test_what_was_let_through_comes_home_when_the_run_has_enough(tmp_path: Path) -> None:
    async def enough(provider: BatchProvider, brake: Brake) -> list[Result]:
        brake.stop(NotAsked("not_asked", "the budget is used up"))
        return await together(provider, PROMPTS)

    with openai_server(batches={1: Batch(seconds=0.3)}) as server:
        assert texts(talk(server, tmp_path, enough)) == unbatched(server)


# --- whole runs ---


def teacher(call: Call, index: int) -> str:
    """Depends on the prompt and on seed + index: the same draw, asked for alone or with others."""
    answers = next((answers for key, answers in ANSWERS.items() if key in call.prompt), ["red"])
    drawn = hashlib.sha256(f"{call.prompt} {(call.seed or 0) + index}".encode()).digest()
    return answers[drawn[0] % len(answers)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The data set of a run without batches."""
    folder = tmp_path_factory.mktemp("unbatched")
    with openai_server(teacher) as server:
        made = config(server.url, write_records(folder), make_database(folder), provider="openai")
        parse_pipeline(made).run(output_dir=folder / "out")
    return data_set(folder / "out")


def pipeline(folder: Path, server: Server) -> dict[str, Any]:
    made = config(server.url, write_records(folder), make_database(folder), provider="openai")
    made["models"]["teacher"] |= {"batch": {"poll_s": POLL, "quiet_s": 0.5}, "max_concurrency": None}
    return made


def data_set(output: Path) -> dict[str, bytes]:
    (dist,) = output.glob("runs/*/dist")
    return {str(path.relative_to(dist)): path.read_bytes() for path in sorted(dist.rglob("*")) if path.is_file()}


@contextmanager
def started(folder: Path, made: dict[str, Any]) -> "Iterator[subprocess.Popen[str]]":
    (path := folder / "pipeline.yaml").write_text(yaml.safe_dump(made))
    command = [sys.executable, "-m", "fastdistill.control.cli", "pipeline", "run", "--quiet"]
    arguments = ["--config", str(path), "--output-dir", str(folder / "out")]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_with_failed_lines_and_an_expired_batch_ends_in_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    faults = {"Italy": status(500), "Norway": status(429)}
    with openai_server(teacher, faults=faults, batches={1: Batch(ends="expired", answered=100)}) as server:
        result = parse_pipeline(pipeline(tmp_path, server)).run(output_dir=tmp_path / "out")
    assert data_set(tmp_path / "out") == undisturbed
    assert lines(server)[0] == 3 * len(RECORDS)
    assert sum(lines(server)) == 3 * len(RECORDS) + 82
    (timing,) = result.timing["models"].values()
    assert timing["retries"] == {"overloaded": 80, "rate_limited": 1, "server_error": 1}
    assert server.counters.resent == 0


def test_a_run_that_is_killed_and_interrupted_pays_for_one_batch(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    def looks() -> int:
        return server.counters.paths["/v1/batches/batch_1"]

    released: list[bool] = []
    with openai_server(teacher, batches={1: Batch(held=lambda: not released)}) as server:
        made = pipeline(tmp_path, server)
        with started(tmp_path, made):
            wait_until(looks)  # and is killed with -9
        before = looks()
        with started(tmp_path, made) as process:
            wait_until(lambda: looks() > before + 5)
            process.send_signal(signal.SIGINT)
            _, message = process.communicate(timeout=30)
            assert process.returncode == 130
            assert "for the next run to read: batch_1" in message
        before = looks()
        with started(tmp_path, made) as process:
            wait_until(lambda: looks() > before)
            released.append(True)
            _, message = process.communicate()
            assert process.returncode == 0, message
    assert data_set(tmp_path / "out") == undisturbed
    assert lines(server) == [3 * len(RECORDS)]
    assert server.counters.requests == 3 * len(RECORDS)


def test_a_run_whose_time_is_up_leaves_its_batch_to_the_next(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    released: list[bool] = []
    with openai_server(teacher, batches={1: Batch(held=lambda: not released)}) as server:
        made = pipeline(tmp_path, server)
        late = parse_pipeline(made | {"budget": {"max_wall_s": 2}}).run(output_dir=tmp_path / "out")
        assert late.exit_code == ExitCode.BUDGET
        assert server.batches[0]["status"] == "in_progress"
        released.append(True)
        parse_pipeline(made).run(output_dir=tmp_path / "out")
    assert data_set(tmp_path / "out") == undisturbed
    assert lines(server) == [3 * len(RECORDS)]
