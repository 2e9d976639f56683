"""The response store as several processes see it: what `put` returned for is there, whatever happens next."""

import asyncio
import json
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.control.journal import left_behind
from fastdistill.control.store import ResponseStore, read_completion, write_completion
from fastdistill.core.errors import EnvironmentFault
from fastdistill.core.types import Answer, Completion, Draw, FinishReason, LogprobBasis, Prompt, TokenLogprob, Usage
from tests.world import holds

PROMPT = Prompt("vllm", "m", ({"role": "user", "content": "How many?"},), {"temperature": 1.0})


def answer(text: str, attempt: int = 0, prompt: Prompt = PROMPT) -> Answer:
    draw = Draw(attempt, attempt)
    return Answer(draw, draw.key(prompt), Completion(text, FinishReason.STOP), stored=False)


def put(path: Path, answers: Sequence[Answer]) -> None:
    async def go() -> None:
        async with ResponseStore(path) as store:
            await store.put(PROMPT, answers)

    asyncio.run(go())


def journals(folder: Path) -> list[Path]:
    return [*folder.glob("*.journal")]


def journal_sizes(folder: Path) -> list[int]:
    sizes = []
    for journal in journals(folder):
        with suppress(FileNotFoundError):  # it is gone by now
            sizes.append(journal.stat().st_size)
    return sizes


def stored(path: Path, keys: Sequence[str]) -> list[Completion | None]:
    async def go() -> list[Completion | None]:
        async with ResponseStore(path) as store:
            return [store.get(key) for key in keys]

    return asyncio.run(go())


def test_what_can_not_be_written_costs_itself_alone(tmp_path: Path) -> None:
    odd = Prompt("vllm", "m", PROMPT.messages, {"options": MappingProxyType({"a": 1})})  # canonical, and no JSON

    async def go() -> None:
        async with ResponseStore(tmp_path / "responses.sqlite") as store:
            with pytest.raises(TypeError):
                await asyncio.wait_for(store.put(odd, [answer("a", prompt=odd)]), 10)
            huge = Draw(0, 2**70)
            with pytest.raises(OverflowError):
                await store.put(PROMPT, [Answer(huge, huge.key(PROMPT), answer("a").completion, stored=False)])
            await asyncio.wait_for(store.put(PROMPT, [answer("b")]), 10)

    asyncio.run(go())
    (kept,) = stored(tmp_path / "responses.sqlite", [answer("b").key])
    assert kept is not None


SCORED = Completion(
    'it says ,"logprobs":"eJx",',
    FinishReason.STOP,
    logprobs=tuple(
        TokenLogprob(f" t{at}", -at / 7, tuple((f" t{n}", -n / 3) for n in range(20)), at, tuple(range(20)))
        for at in range(50)
    ),
    logprob_basis=LogprobBasis.RAW,
)


def test_log_probabilities_are_packed_and_all_else_stays_readable_with_sql(tmp_path: Path) -> None:
    scored = write_completion(SCORED)
    assert read_completion(scored) == SCORED
    assert len(scored) < len(json.dumps(msgspec.to_builtins(SCORED))) / 4
    plain = Completion(SCORED.text, FinishReason.STOP, Usage(3, 50))
    with closing(sqlite3.connect(":memory:")) as database:
        for each in (SCORED, plain):
            query = "SELECT json_extract(:each, '$.text'), json_extract(:each, '$.usage.completion_tokens')"
            found = database.execute(query, {"each": write_completion(each)}).fetchone()
            assert found == (each.text, each.usage.completion_tokens)


def test_log_probabilities_of_earlier_versions_are_read(tmp_path: Path) -> None:
    tokens = [{"token": "a", "logprob": -0.5, "top": [["b", -1.5]]}]
    earlier = {"text": "a", "finish_reason": "stop", "logprobs": tokens}
    found = read_completion(json.dumps(earlier))
    assert found == Completion("a", FinishReason.STOP, logprobs=(TokenLogprob("a", -0.5, (("b", -1.5),)),))
    spaced = json.dumps(earlier, separators=(",", ":"))
    assert read_completion(spaced) == found


text = st.text(st.characters(exclude_categories=["Cs"]))
counts = st.integers(0, 2**40)
logprobs = st.floats(max_value=0, allow_infinity=False, allow_nan=False)
completions = st.builds(
    Completion,
    text=text,
    finish_reason=st.sampled_from(FinishReason),
    usage=st.builds(Usage, counts, counts, counts, counts),
    thinking=st.none() | text,
    model=st.none() | text,
    build=st.none() | text,
    logprobs=st.none()
    | st.lists(
        st.builds(TokenLogprob, text, logprobs, st.lists(st.tuples(text, logprobs), max_size=2).map(tuple)), max_size=3
    ).map(tuple),
)


@settings(max_examples=12, deadline=None)
@given(st.lists(completions, min_size=1, max_size=20))
def test_an_answer_comes_back_as_it_was_put(given: list[Completion]) -> None:
    draws = [Draw(attempt, None if attempt % 2 else attempt) for attempt in range(len(given))]
    answers = [Answer(draw, draw.key(PROMPT), each, stored=False) for draw, each in zip(draws, given, strict=True)]
    with TemporaryDirectory() as folder:
        put(Path(folder) / "responses.sqlite", answers)
        assert stored(Path(folder) / "responses.sqlite", [each.key for each in answers]) == given


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    put(tmp_path / "responses.sqlite", [answer("a")])
    assert stored(tmp_path / "responses.sqlite", ["0" * 64]) == [None]


def test_the_first_answer_under_a_key_stays(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    put(path, [answer("first")])
    put(path, [answer("second"), answer("another", 1)])
    assert [each.text for each in stored(path, [answer("").key, answer("", 1).key]) if each] == ["first", "another"]


def test_what_was_asked_lies_beside_the_answer(tmp_path: Path) -> None:
    put(tmp_path / "responses.sqlite", [answer("a")])
    connection = sqlite3.connect(tmp_path / "responses.sqlite")
    row = connection.execute(
        "SELECT p.provider, p.model, p.messages, p.parameters, r.seed, r.attempt FROM responses r"
        " JOIN prompts p ON p.id = r.prompt"
    ).fetchone()
    connection.close()
    assert row[:2] == ("vllm", "m") and row[4:] == (0, 0)
    assert (json.loads(row[2]), json.loads(row[3])) == ([*PROMPT.messages], PROMPT.parameters)


def test_what_others_put_in_a_new_file_is_found_once_this_one_has_put_something(tmp_path: Path) -> None:
    async def go() -> list[Completion | None]:
        async with ResponseStore(tmp_path / "new.sqlite") as first, ResponseStore(tmp_path / "new.sqlite") as second:
            await second.put(PROMPT, [answer("another's", 1)])
            assert await holds(second, 1)
            await first.put(PROMPT, [answer("its own")])
            assert await holds(first, 2)
            return [first.get(answer("", attempt).key) for attempt in range(3)]

    own, others, nobodys = asyncio.run(go())
    assert own and others and (own.text, others.text, nobodys) == ("its own", "another's", None)


PUTS_AND_WAITS = """
import asyncio, sys, time
from pathlib import Path
from tests.control.test_store import PROMPT, answer
from fastdistill.control.store import ResponseStore

async def main():
    async with ResponseStore(Path(sys.argv[1])) as store:
        print("open", flush=True)
        sys.stdin.readline()
        for attempt in range(3):
            await store.put(PROMPT, [answer(f"text {attempt}", attempt)])
        assert all(store.get(answer("", attempt).key) for attempt in range(3))
        print("put", flush=True)
        time.sleep(60)

asyncio.run(main())
"""
KEYS = [answer("", attempt).key for attempt in range(3)]
PUT = [Completion(f"text {attempt}", FinishReason.STOP) for attempt in range(3)]


@contextmanager
def putting(path: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that has put `PUT` and waits, and could not write to the file since it opened it."""
    arguments = [sys.executable, "-c", PUTS_AND_WAITS, str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == b"open\n"
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"put\n"
            try:
                yield process
            finally:
                process.kill()


def test_what_put_returned_for_survives_kill_9_though_nothing_is_committed(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    with putting(path) as process:
        assert count(path) == 0
        process.kill()
        process.wait()
    assert stored(path, KEYS) == PUT
    assert stored(path, KEYS) == PUT and journals(tmp_path) == []


def test_what_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    with putting(path) as process:
        process.kill()
        process.wait()
        (journal,) = journals(tmp_path)
        whole = journal.read_bytes().rstrip(b"\0")
        journal.write_bytes(whole[:-1])
    assert stored(path, KEYS) == [*PUT[:2], None]


def test_the_journal_of_a_process_at_work_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    with putting(path), closing(sqlite3.connect(path)) as connection:
        (journal,) = journals(tmp_path)
        whole = journal.read_bytes()
        assert [*left_behind(path)] == [] and journal.read_bytes() == whole
        assert connection.execute("SELECT count(*) FROM responses").fetchone() == (0,)


def test_what_put_returned_for_is_seen_by_another_process_soon(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    with putting(path):
        pass
    with subprocess.Popen([sys.executable, "-c", WRITES, str(path), "another"]) as other:
        assert other.wait(60) == 0
    assert count(path) == 200


def test_what_could_not_be_committed_is_there_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    put_: list[str] = []

    async def go() -> None:
        async with ResponseStore(path) as store:
            with closing(sqlite3.connect(path)) as connection:
                connection.execute("DROP TABLE responses")
            for attempt in range(3):
                await store.put(PROMPT, [answer(f"text {attempt}", attempt)])
                put_.append(KEYS[attempt])

    with pytest.raises(EnvironmentFault, match="no such table"):
        asyncio.run(go())
    assert put_ and stored(path, put_) == PUT[: len(put_)]


def test_a_journal_does_not_grow_without_end_nor_does_what_waits(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"

    async def go() -> list[list[int]]:
        sizes = []
        async with ResponseStore(path) as store:
            for attempt in range(100):
                await store.put(PROMPT, [answer("x" * 2**20, attempt)])
                sizes.append(journal_sizes(tmp_path))
        return sizes

    sizes = asyncio.run(go())
    assert max(map(max, sizes)) < 1.1 * 2**20 and max(map(sum, sizes)) < 24 * 2**20
    assert count(path) == 100 and journals(tmp_path) == []


def test_a_full_disk_is_told_and_costs_no_answer_that_was_put(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    with subprocess.Popen([sys.executable, "-c", FILLS, str(path)], stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate(timeout=60)
    put, told = said.splitlines()
    assert int(put) > 5 and told.startswith(str(path))
    assert None not in stored(path, [answer("", attempt).key for attempt in range(int(put))])


FILLS = """
import asyncio, resource, sys
from pathlib import Path
from tests.control.test_store import PROMPT, answer
from fastdistill.control.store import ResponseStore
from fastdistill.core.errors import EnvironmentFault

async def main():
    put = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, resource.RLIM_INFINITY))
    try:
        async with ResponseStore(Path(sys.argv[1])) as store:
            while True:
                await store.put(PROMPT, [answer("x" * 100_000, put)])
                put += 1
    except EnvironmentFault as error:
        print(put, error, sep="\\n")

asyncio.run(main())
"""

WRITES = """
import asyncio, sys
from pathlib import Path
from tests.control.test_store import PROMPT, answer
from fastdistill.control.store import ResponseStore

async def main():
    async with ResponseStore(Path(sys.argv[1])) as store:
        for first in range(0, 200, 20):
            await asyncio.gather(*(store.put(PROMPT, [answer(sys.argv[2], n)]) for n in range(first, first + 20)))
            assert all(store.get(answer("", n).key) for n in range(first, first + 20))

asyncio.run(main())
"""


def test_two_processes_fill_one_store(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITES, str(path), name]) for name in ("left", "right")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = stored(path, [answer("", n).key for n in range(200)])
    assert {each.text if each else None for each in found} <= {"left", "right"}
    assert count(path) == 200


def test_a_store_that_another_process_is_making_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"

    async def go() -> None:
        async with ResponseStore(path) as store:
            await store.put(PROMPT, [answer("a", 0)])

    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.3, other.execute, ("COMMIT",))
        timer.start()
        asyncio.run(go())
        timer.join()
    assert count(path) == 1


@pytest.mark.parametrize("text", ["paid", "paid" * 50_000], ids=len)
def test_an_answer_is_stored_though_who_put_it_is_cancelled(tmp_path: Path, text: str) -> None:
    async def go() -> None:
        async with ResponseStore(tmp_path / "responses.sqlite") as store:
            tasks = [asyncio.create_task(store.put(PROMPT, [answer(text, n)])) for n in range(50)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            assert all(isinstance(end, asyncio.CancelledError | None) for end in await asyncio.gather(
                *tasks, return_exceptions=True))  # fmt: skip

    asyncio.run(go())
    assert count(tmp_path / "responses.sqlite") == 50


def test_a_few_go_on_at_a_time_so_that_answers_that_come_in_are_stored_before(tmp_path: Path) -> None:
    went_on: Counter[int] = Counter()

    async def go() -> None:
        round_ = 0

        async def put_one(attempt: int) -> None:
            await store.put(PROMPT, [answer("a", attempt)])
            went_on[round_] += 1

        async with ResponseStore(tmp_path / "responses.sqlite") as store:
            waiting = [asyncio.create_task(put_one(attempt)) for attempt in range(500)]
            while went_on.total() < len(waiting):
                round_ += 1
                await asyncio.sleep(0)

    asyncio.run(go())
    assert went_on.total() == 500 and max(went_on.values()) <= 16


def test_a_file_that_is_no_database_is_told_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_bytes(b"this was once a text file\n" * 400)
    with pytest.raises(EnvironmentFault, match=r"responses\.sqlite: file is not a database; .*move it away"):
        stored(path, ["a"])
    assert path.read_bytes().startswith(b"this was once")


def test_a_damaged_page_is_told_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    put(path, [answer("long " * 500, n) for n in range(100)])
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with pytest.raises(EnvironmentFault, match=r"responses\.sqlite: .*malformed; .*move it away"):
        stored(path, [answer("", n).key for n in range(100)])


@pytest.mark.parametrize("damaged", ["""'{"text": "a"'""", "CAST(x'ff' AS TEXT)"])
def test_an_entry_that_cannot_be_read_is_told_with_what_to_do(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "responses.sqlite"
    put(path, [answer("a")])
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(f"UPDATE responses SET completion = {damaged}")
    connection.close()
    with pytest.raises(EnvironmentFault, match=r"responses\.sqlite: .*move it away"):
        stored(path, [answer("").key])


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="check that the folder exists"):
        stored(tmp_path / "none" / "responses.sqlite", ["a"])


def count(path: Path) -> int:
    connection = sqlite3.connect(path)
    (found,) = connection.execute("SELECT count(*) FROM responses").fetchone()
    connection.close()
    return int(found)


def test_a_prompt_that_is_asked_again_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"

    async def go() -> None:
        async with ResponseStore(path) as store:
            await asyncio.gather(*(store.put(PROMPT, [answer("side by side", n)]) for n in range(3)))
            await store.put(PROMPT, [answer("later", 3)])

    asyncio.run(go())
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT count(*), count(DISTINCT r.prompt), count(DISTINCT p.id) FROM responses r"
                               " JOIN prompts p ON p.id = r.prompt").fetchone()  # fmt: skip
    connection.close()
    assert found == (4, 1, 1)


def test_a_store_whose_prompts_have_hashes_for_ids_takes_more_answers(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE prompts (id BLOB PRIMARY KEY, provider TEXT, model TEXT, messages TEXT, parameters TEXT);"
        "CREATE TABLE responses (key BLOB PRIMARY KEY, prompt BLOB, seed INTEGER, attempt INTEGER, completion TEXT);"
        "INSERT INTO prompts VALUES (x'00ff', 'vllm', 'm', '[]', '{}');"
    )
    connection.close()
    put(path, [answer("a")])
    put(path, [answer("b", 1)])
    assert [each.text for each in stored(path, [answer("").key, answer("", 1).key]) if each] == ["a", "b"]
    connection = sqlite3.connect(path)
    joined = connection.execute("SELECT p.model FROM responses r JOIN prompts p ON p.id = r.prompt").fetchall()
    connection.close()
    assert joined == [("m",), ("m",)]
