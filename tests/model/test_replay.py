"""Recorded answers: found by messages, by the last user message or by the sample, and never made up."""

import asyncio
import gzip
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from fastdistill import CanonicalizeFields, LoadJsonl, TextGeneration
from fastdistill.control.budget import Budget
from fastdistill.control.session import Pipeline, RunResult
from fastdistill.control.store import ResponseStore
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import ExitCode, FatalError, InputError, SampleError
from fastdistill.core.types import Answer, Draw, FinishReason, Sample, TokenLogprob, Usage
from fastdistill.model.client import ModelClient
from fastdistill.model.providers.replay import ReplayConfig, ReplayProvider
from tests.model.test_client import Brake

SYSTEM = {"role": "system", "content": "Be short."}


def write(path: Path, *lines: object) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ask(
    files: Path | Sequence[Path],
    messages: Sequence[dict[str, str]],
    attempts: Sequence[int] = (0,),
    sample: Sample | None = None,
    store: Path | None = None,
) -> list[Answer | SampleError]:
    async def run() -> list[Answer | SampleError]:
        config = ReplayConfig.model_validate({"path": files})
        first = files if isinstance(files, Path) else files[0]
        async with ResponseStore(store or first.with_suffix(".sqlite")) as responses:
            client = ModelClient("teacher", config, [ReplayProvider(config)], responses, Brake())
            try:
                prompt = client.prompt(messages, DecodeProfile(), {}, sample)
                return await client.generate(prompt, [Draw(at, 77) for at in attempts])
            finally:
                await client.aclose()

    return asyncio.run(run())


def texts(answers: Sequence[Answer | SampleError]) -> list[str]:
    return [answer.completion.text if isinstance(answer, Answer) else answer.reason for answer in answers]


def test_answers_to_the_same_prompt_are_attempts_in_the_order_of_the_files(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {"prompt": "Q", "completions": ["a", "b"]}, {"prompt": "P", "completion": "p"})
    two = write(tmp_path / "two.jsonl.gz", {"prompt": "Q", "completion": "c"})
    assert texts(ask([one, two], [SYSTEM, user("Q")], range(3))) == ["a", "b", "c"]
    assert texts(ask([two, one], [SYSTEM, user("Q")], (2, 0))) == ["b", "c"], "by attempt, whatever is asked together"


def test_a_draw_beyond_what_is_recorded_is_lost_alone_and_says_so(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", {"prompt": "Q", "completions": ["a", "b"]})
    found = ask(file, [user("Q")], range(3))
    assert texts(found) == ["a", "b", "not_recorded"]
    assert "attempt 2 is not recorded: the prompt has 2 answers" in str(found[2])
    (lost,) = ask(file, [user("Z" * 200)])
    assert isinstance(lost, SampleError)
    assert f"end in '{'Z' * 80}'" in str(lost)


def test_the_closest_form_answers_alone(tmp_path: Path) -> None:
    file = write(
        tmp_path / "r.jsonl",
        {"prompt": "Q", "completions": ["by prompt", "by prompt"]},
        {"messages": [SYSTEM, user("Q")], "completion": "by messages"},
        {"key": "task-1", "completion": "by task"},
        {"key": "s" * 64, "completion": "by sample"},
    )
    sample = Sample(0, "r:1", {}, "task-1", "0" * 64)
    assert texts(ask(file, [user("Q")])) == ["by prompt"]
    assert texts(ask(file, [SYSTEM, user("Q")], (0, 1))) == ["by messages", "not_recorded"]
    assert texts(ask(file, [SYSTEM, user("Q")], sample=sample)) == ["by task"]
    assert texts(ask(file, [user("other")], sample=Sample(0, "r:1", {}, "", "s" * 64))) == ["by sample"]


def test_samples_that_ask_the_same_have_answers_of_their_own(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", *({"key": key, "completion": f"of {key}"} for key in (1, 2)))
    found = [ask(file, [user("Q")], sample=Sample(0, "r", {}, key, key * 64)) for key in ("1", "2")]
    assert [texts(answers) for answers in found] == [["of 1"], ["of 2"]]


def test_an_answer_may_be_an_object(tmp_path: Path) -> None:
    whole = {
        "text": "4",
        "finish_reason": "length",
        "thinking": "2 + 2",
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
        "logprobs": [{"token": "4", "logprob": -0.5, "top": [["4", -0.5]]}],
        "logprob_basis": "raw",  # every answer of a run has the field
    }
    file = write(tmp_path / "r.jsonl", {"prompt": "Q", "completions": [whole, "<think>hm</think>5"]})
    first, second = ask(file, [user("Q")], (0, 1))
    assert isinstance(first, Answer) and isinstance(second, Answer)
    seen = first.completion
    assert (seen.text, seen.finish_reason, seen.thinking) == ("4", FinishReason.LENGTH, "2 + 2")
    assert (seen.usage, seen.model, seen.logprob_basis) == (Usage(3, 1), "replay", "raw")
    assert seen.logprobs == (TokenLogprob("4", -0.5, (("4", -0.5),)),)
    assert (second.completion.text, second.completion.thinking) == ("5", "hm")


def test_a_changed_recording_is_never_answered_from_the_store(tmp_path: Path) -> None:
    file, store = tmp_path / "r.jsonl", tmp_path / "responses.sqlite"
    for answer, stored in (("old", False), ("old", True), ("new", False)):
        write(file, {"prompt": "Q", "completion": answer})
        (found,) = ask(file, [user("Q")], store=store)
        assert isinstance(found, Answer)
        assert (found.completion.text, found.stored) == (answer, stored)


HALF = "(a lone surrogate is no character); write both of its pair, or \\ufffd in its place"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "truncated"),
        ("[1]", "array"),
        ('{"prompt": "Q"}', "needs completions"),
        ('{"prompt": "Q", "completions": []}', "needs completions"),
        ('{"completion": "a"}', "needs one of messages, prompt, key"),
        ('{"prompt": "Q", "key": "1", "completion": "a"}', "needs one of"),
        ('{"prompt": "Q", "completion": {"txt": "a"}}', "txt"),
        ('{"prompt": "Q", "completion": {"text": "a", "finish_reason": "tool_calls"}}', "tool_calls"),
        ('{"messages": [{"role": "user", "content": null}], "completion": "a"}', "null"),
        ('{"prompt": "\\ud800", "completion": "a"}', HALF),
        ('{"prompt": "Q", "completions": ["\\ud83d\\u0041"]}', HALF),
        ('{"prompt": "Q", "completions": [{"text": "\\ude00"}]}', HALF),
        ('{"prompt": "Q", "completion": "\\ud800"}', HALF),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = write(tmp_path / "r.jsonl", {"prompt": "P", "completion": "p"})
    file.write_text(file.read_text() + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"r\.jsonl:3: not a line of a recording") as caught:
        ask(file, [user("P")])
    assert problem in str(caught.value)


def test_a_file_that_is_none_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: No such file"):
        run(tmp_path, tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="empty"):
        ask(tmp_path / "empty.jsonl", [user("Q")])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "Q", "completion": "a"}\n' * 99)[:-9])
    with pytest.raises(InputError, match="can't be read to its end"):
        ask(tmp_path / "cut.jsonl.gz", [user("Q")])


def test_a_file_that_changes_under_a_run_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", {"prompt": "Q", "completion": "a"})

    async def probe() -> None:
        config = ReplayConfig(path=file)
        config.parameters()
        write(file, {"prompt": "Q", "completion": "b"})
        provider = ReplayProvider(config)
        for _ in range(2):
            with pytest.raises(FatalError, match="was changed after this run had begun"):
                await provider.probe()

    asyncio.run(probe())


def run(folder: Path, file: Path) -> RunResult:
    return Pipeline(
        name="replayed",
        models={"teacher": ReplayConfig(path=file)},
        steps=(
            LoadJsonl(rows=tuple({"task_id": n, "question": f"Q{n}"} for n in range(20))),
            CanonicalizeFields(fields=("question",)),
            TextGeneration(template="{{ question }}", num_generations=3),
        ),
        budget=Budget(max_cost_usd=0.01),
    ).run(output_dir=folder / "artifacts")


def test_a_run_replays_what_is_recorded_and_counts_what_is_not(tmp_path: Path) -> None:
    lines = [{"key": n, "completions": [f"{n}{letter}" for letter in "abc"]} for n in range(18)]
    file = write(tmp_path / "r.jsonl", *lines, {"prompt": "Q18", "completion": "only"})
    result = run(tmp_path, file)
    assert result.exit_code is ExitCode.PARTIAL, "the last sample has no answer"
    assert result.quality["candidates"]["generated"] == 3 * 18 + 1
    with closing(sqlite3.connect(result.path / "ledger.sqlite")) as ledger:
        answers = ledger.execute("SELECT s.task_id, c.attempt, c.answer FROM candidates c JOIN samples s USING (idx)")
        seen = {(int(task), attempt): answer for task, attempt, answer in answers}
        (failures,) = ledger.execute("SELECT failures FROM samples WHERE task_id = '19'").fetchone()
    assert seen == {(n, at): f"{n}{'abc'[at]}" for n in range(18) for at in range(3)} | {(18, 0): "only"}
    assert "not_recorded" in failures
    (endpoint,) = result.manifest["models"]["teacher"]["endpoints"]
    assert endpoint["notes"] == ("55 answers to 19 prompts",)
