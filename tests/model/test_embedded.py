"""The embedded teacher: its tokenizer, its numpy inference, its engine and its worker process."""

from __future__ import annotations

import os

# Before numpy is imported: on a busy machine a second BLAS thread makes these tests ten times slower.
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import asyncio
import fcntl
import json
import math
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.core.types import Completion, Message, Prompt, Usage
from fastdistill.model.embedded import worker
from fastdistill.model.embedded.bpe import Tokenizer
from fastdistill.model.embedded.inference import Engine, log_softmax, sample
from fastdistill.model.embedded.network import Cache, Decoder, load_weights
from fastdistill.model.embedded.wire import Request, Result
from fastdistill.model.provider import ErrorKind, ProviderError
from fastdistill.model.providers.embedded import EmbeddedConfig, EmbeddedProvider
from lab.grammar import Example, examples
from lab.weights import save_weights

WEIGHTS = load_weights(worker.HERE)
GOLDEN = json.loads(Path(__file__).with_name("embedded_golden.json").read_text(encoding="utf-8"))
Messages = tuple[Message, ...]


def prompt(example: Example) -> Messages:
    user = f"Schema: {example.schema}\nQuestion: {example.question}\nSQL:"
    return ({"role": "system", "content": "Return SQL only."}, {"role": "user", "content": user})


QUESTIONS = list(islice(examples(11, "heldout"), 40))
PROMPT = prompt(QUESTIONS[0])


def ask(*requests: Request, slots: int = 32) -> list[Result]:
    engine = Engine(WEIGHTS, slots)
    for index, request in enumerate(requests):
        engine.submit(msgspec.structs.replace(request, id=index))
    done: dict[int, Result] = {}
    while engine.busy:
        done |= {result.id: msgspec.structs.replace(result, id=0) for result in engine.step()}
    return [done[index] for index in range(len(requests))]


def answer(request: Request) -> Completion:
    return ask(request)[0].choices[0]


# --- Files and tokenizer --------------------------------------------------------------------------------------------


def test_the_model_takes_at_most_3_mb() -> None:
    assert sum((worker.HERE / name).stat().st_size for name in ("weights.npz", "model.json")) <= 3_000_000


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    for name in ("weights.npz", "model.json"):
        (tmp_path / name).write_bytes((worker.HERE / name).read_bytes())
    with (tmp_path / "weights.npz").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="does not match the sha256"):
        load_weights(tmp_path)


def test_weights_survive_saving(tmp_path: Path) -> None:
    save_weights(tmp_path, WEIGHTS.architecture, WEIGHTS.tokenizer, WEIGHTS.tensors, {})
    again = load_weights(tmp_path)
    assert again.sha256 == WEIGHTS.sha256
    assert again.tokenizer.vocabulary == WEIGHTS.tokenizer.vocabulary


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert WEIGHTS.tokenizer.decode(WEIGHTS.tokenizer.encode(text)) == text


def test_merges_apply_in_order_of_rank() -> None:
    a, b, c = b"abc"
    tokenizer = Tokenizer([(b, c), (a, b), (a, 256)])
    assert tokenizer.encode("abc") == [258]
    assert tokenizer.encode("abab") == [257, 257]


def test_special_tokens_in_text_stay_text() -> None:
    ids = WEIGHTS.tokenizer.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert ids.count(WEIGHTS.tokenizer.im_end) == 1
    assert WEIGHTS.tokenizer.decode(ids) == "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"


# --- Network --------------------------------------------------------------------------------------------------------


def test_golden_is_of_these_weights() -> None:
    assert GOLDEN["sha256"] == WEIGHTS.sha256, "run lab/record_golden.py after each training"


@pytest.mark.parametrize("golden", GOLDEN["answers"])
def test_greedy_answer_is_that_of_torch(golden: dict[str, Any]) -> None:
    choice = answer(Request(messages=golden["messages"], temperature=0, logprobs=True))
    assert choice.text == golden["text"]
    assert choice.logprobs is not None
    assert [entry.logprob for entry in choice.logprobs] == pytest.approx(golden["logprobs"], abs=2e-3)


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole() -> None:
    decoder = Decoder(WEIGHTS)
    tokens = WEIGHTS.tokenizer.encode_chat(PROMPT)
    whole = decoder.forward([(tokens, Cache.empty(decoder.shape, len(tokens)))])
    cache = Cache.empty(decoder.shape, len(tokens))
    decoder.forward([(tokens[:30], cache)])
    pieces = decoder.forward([(tokens[30:], cache)])
    assert pieces == pytest.approx(whole, abs=1e-3)


def test_most_of_forty_held_out_questions_are_answered_right() -> None:
    completions = ask(*(Request(messages=prompt(example), temperature=0) for example in QUESTIONS))
    right = [is_right(e, c.choices[0].text) for e, c in zip(QUESTIONS, completions, strict=True)]
    assert sum(right) >= 0.6 * len(QUESTIONS)


def is_right(example: Example, sql: str) -> bool:
    with closing(sqlite3.connect(":memory:")) as connection:
        example.db.fill(connection, seed=1)
        try:
            found = connection.execute(sql).fetchall()
        except sqlite3.Error:
            return False
        return Counter(found) == Counter(connection.execute(example.gold_sql))


# --- Engine ---------------------------------------------------------------------------------------------------------


def test_an_answer_does_not_depend_on_what_runs_beside_it() -> None:
    requests = [
        Request(messages=prompt(example), seed=seed, max_tokens=48) for seed, example in enumerate(QUESTIONS[:11])
    ]
    assert ask(*requests, slots=11) == ask(*requests, slots=4) == [ask(request)[0] for request in requests]


def test_choice_i_under_seed_s_is_choice_0_under_seed_s_plus_i() -> None:
    request = Request(messages=PROMPT, n=4, seed=20)
    many = ask(request)[0].choices
    alone = [answer(msgspec.structs.replace(request, n=1, seed=20 + index)) for index in range(4)]
    assert many[0] == alone[0]
    unasked = [msgspec.structs.replace(each, usage=Usage(0, each.usage.completion_tokens)) for each in alone[1:]]
    assert list(many[1:]) == unasked, "the prompt is counted once"


def test_more_choices_than_slots_are_all_answered() -> None:
    texts = [choice.text for choice in ask(Request(messages=PROMPT, n=12, seed=0), slots=4)[0].choices]
    assert len(texts) == 12
    assert len(set(texts)) > 1


def test_without_a_seed_choices_differ() -> None:
    choices = ask(Request(messages=PROMPT, n=16, temperature=2.0))[0].choices
    assert len({choice.text for choice in choices}) > 4


def test_max_tokens_ends_an_answer_by_length() -> None:
    choice = answer(Request(messages=PROMPT, temperature=0, max_tokens=3))
    assert (choice.finish_reason, choice.usage.completion_tokens) == ("length", 3)


def test_a_stop_text_is_cut_off() -> None:
    whole = answer(Request(messages=PROMPT, temperature=0))
    cut = answer(Request(messages=PROMPT, temperature=0, stop=("nowhere", " FROM")))
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "stop")
    assert cut.text == whole.text.partition(" FROM")[0]
    assert cut.usage.completion_tokens < whole.usage.completion_tokens


def test_log_probabilities_are_those_of_the_model_whatever_the_temperature() -> None:
    greedy = answer(Request(messages=PROMPT, temperature=0, logprobs=True, top_logprobs=5))
    almost = answer(Request(messages=PROMPT, temperature=1e-4, seed=1, logprobs=True, top_logprobs=5))
    assert greedy == almost
    assert greedy.logprobs is not None
    assert len(greedy.logprobs) == greedy.usage.completion_tokens
    for entry in greedy.logprobs:
        assert entry.top[0] == (entry.token, entry.logprob)
        assert len(entry.top) == 5
        assert sum(math.exp(logprob) for _, logprob in entry.top) <= 1


def test_probabilities_sum_to_one() -> None:
    logits = np.random.default_rng(0).standard_normal(768).astype(np.float32) * 10
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1)


LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Request(), {0, 1, 2, 3}),
        (Request(top_k=2), {0, 1}),
        (Request(top_p=0.7), {0, 1}),
        (Request(top_p=0.8), {0, 1, 2}),
        (Request(min_p=0.25), {0, 1, 2}),
        (Request(top_k=3, top_p=0.6), {0, 1}),  # of three, 0.5 / 0.9 is less than 0.6
        (Request(temperature=1e-300), {0}),
        (Request(temperature=0.0), {0}),
    ],
)
def test_sampling_draws_from_what_the_filters_leave(sampling: Request, possible: set[int]) -> None:
    rng = np.random.default_rng(0)
    assert {sample(LOGITS, sampling, rng) for _ in range(200)} == possible


def test_sampling_follows_the_probabilities() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(sample(LOGITS, Request(), rng) for _ in range(4000))
    for token, share in enumerate((0.5, 0.25, 0.15, 0.1)):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.04)


def test_a_prompt_as_long_as_the_context_is_refused() -> None:
    engine = Engine(WEIGHTS)
    refused = engine.submit(Request(messages=({"role": "user", "content": "x1" * 300},)))
    assert refused is not None and "context is 512 tokens" in str(refused.too_long) and not engine.busy


def test_an_answer_ends_where_the_context_does() -> None:
    request = Request(messages=({"role": "user", "content": "1" * 480},), temperature=0, max_tokens=1000)
    completion = ask(request)[0]
    choice = completion.choices[0]
    assert choice.finish_reason == "stop" or choice.usage.prompt_tokens + choice.usage.completion_tokens == 512


def test_a_cancelled_request_leaves_and_the_others_go_on() -> None:
    engine = Engine(WEIGHTS, slots=2)
    for number in range(3):
        engine.submit(Request(id=number, messages=PROMPT, n=2, seed=1))
    engine.step()
    engine.cancel(0)
    engine.cancel(1)
    done: list[int] = []
    while engine.busy:
        done += [result.id for result in engine.step()]
    assert done == [2]


# --- Worker ---------------------------------------------------------------------------------------------------------


@contextmanager
def running_worker() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "fastdistill.model.embedded.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)) as process:
        try:
            yield process
        finally:
            process.kill()


def send(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def receive(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    message: dict[str, Any] = json.loads(process.stdout.readline())
    return message


def test_worker_answers_over_pipes_and_ends_with_its_input() -> None:
    with running_worker() as process:
        assert receive(process) == {"model": f"embedded-{WEIGHTS.sha256[:12]}", "context": 512}
        send(process, {"id": 1, "messages": PROMPT, "temperature": 0, "logprobs": True, "top_logprobs": 1})
        expected = answer(Request(messages=PROMPT, temperature=0, logprobs=True, top_logprobs=1))
        result = receive(process)
        assert (result["id"], len(result["choices"])) == (1, 1)
        choice = result["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
        assert choice["usage"]["completion_tokens"] == len(choice["logprobs"])
        assert choice["logprobs"][0]["top"] == [[choice["logprobs"][0]["token"], choice["logprobs"][0]["logprob"]]]
        assert choice["usage"]["prompt_tokens"] == len(WEIGHTS.tokenizer.encode_chat(PROMPT))

        send(process, {"id": 2, "messages": [{"role": "user", "content": "x1" * 300}]})
        refused = receive(process)
        assert refused["id"] == 2 and "context is 512 tokens" in refused["too_long"]

        # What is under way when the input ends is finished.
        for key in range(10):
            send(process, {"id": key, "messages": PROMPT, "n": 4, "seed": key})
        assert process.stdin is not None
        process.stdin.close()
        assert sorted(receive(process)["id"] for _ in range(10)) == list(range(10))
        assert process.wait(timeout=60) == 0


def test_worker_ends_quietly_when_nobody_reads() -> None:
    with running_worker() as process:
        receive(process)
        assert process.stdout is not None
        process.stdout.close()
        send(process, {"id": 1, "messages": PROMPT})
        assert process.wait(timeout=60) == 0


# --- Provider -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"max_tokens": "two"}, "$.max_tokens"),
        ({"top_p": 0.0}, "$.top_p"),
        ({"top_logprobs": 21}, "$.top_logprobs"),
        ({"stop": ("",)}, "$.stop"),
        ({"stop": " ", "temperature": -1.0}, "$.stop"),
    ],
)
def test_what_the_model_does_not_take_is_an_error_at_once(parameters: dict[str, Any], place: str) -> None:
    refused = Prompt("embedded", "text2sql", ({"role": "user", "content": "x"},), parameters)

    async def go() -> ProviderError:
        async with aclosing(EmbeddedProvider(EmbeddedConfig())) as provider:
            with pytest.raises(ProviderError) as caught:
                await asyncio.wait_for(provider.complete(refused, seed=1, n=1), 60)
            return caught.value

    error = asyncio.run(go())
    assert error.kind is ErrorKind.BAD_REQUEST
    assert place in str(error)


def test_files_where_the_command_runs_are_not_taken_for_pythons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)

    async def go() -> None:
        async with aclosing(EmbeddedProvider(EmbeddedConfig())) as provider:
            await provider.probe()

    asyncio.run(asyncio.wait_for(go(), 60))


def test_a_request_that_takes_too_long_is_called_off_and_the_next_is_answered() -> None:
    def asked(tokens: int) -> Prompt:
        return Prompt("embedded", "text2sql", PROMPT, {"temperature": 5.0, "max_tokens": tokens})

    async def go() -> None:
        async with aclosing(EmbeddedProvider(EmbeddedConfig(timeout=0.5))) as provider:
            await provider.probe()
            with pytest.raises(ProviderError, match="no answer in") as caught:
                await provider.complete(asked(400), seed=1, n=400)
            assert caught.value.kind is ErrorKind.TIMEOUT
            while not answers:  # the step that was under way ends first
                with suppress(ProviderError):
                    answers.extend(await provider.complete(asked(1), seed=1, n=1))

    answers: list[Completion] = []
    asyncio.run(asyncio.wait_for(go(), 60))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_process_that_is_killed_within_an_answer_breaks_that_off_and_is_started_again() -> None:
    scored = Prompt("embedded", "text2sql", PROMPT, {"max_tokens": 64, "logprobs": True, "top_logprobs": 20})

    async def go() -> None:
        async with aclosing(EmbeddedProvider(EmbeddedConfig())) as provider:
            await provider.probe()
            asked = asyncio.create_task(provider.complete(scored, seed=1, n=32))
            await asyncio.sleep(0.1)  # for it to be sent
            _kill_within_an_answer()
            with pytest.raises(ProviderError) as caught:
                await asked
            assert caught.value.kind is ErrorKind.RESET
            assert len(await provider.complete(scored, seed=1, n=1)) == 1

    asyncio.run(asyncio.wait_for(go(), 60))


def _kill_within_an_answer() -> None:
    """Holds the loop, so that nothing is read of an answer until it fills the pipe, which is smaller than it."""
    (pid,) = (int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split())
    with Path(f"/proc/{pid}/fd/1").open("rb") as pipe:
        while int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder) < 60_000:
            time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


def test_a_long_word_is_encoded_as_the_short_ones_in_it_are() -> None:
    word = "select" * 20_000
    assert WEIGHTS.tokenizer.encode(word) == WEIGHTS.tokenizer.encode("select") * 20_000
