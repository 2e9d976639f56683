"""The transport against real sockets: what breaks, how it is named, and what a stale connection costs (nothing)."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from functools import partial

import pytest

from fastdistill.core.types import FinishReason
from fastdistill.model.http1 import Http1Transport
from fastdistill.model.https import AiohttpTransport
from fastdistill.model.provider import ErrorKind, ProviderError
from fastdistill.model.transport import (
    Fault,
    Response,
    Transport,
    error_kind,
    retry_after,
    split_thinking,
    transport_for,
)
from tests.servers import NOWHERE, cut, garbled, hang, openai_server, reset

BODY = b'{"model": "teacher", "messages": [{"role": "user", "content": "hi"}]}'


Transports = Callable[..., Transport]
MAX_BODY = 2**20
DIRECT = partial(Http1Transport, max_body=MAX_BODY, keep=4)


@pytest.fixture(params=[Http1Transport, AiohttpTransport])
def kind(request: pytest.FixtureRequest) -> Transports:
    return partial(request.param, max_body=MAX_BODY, keep=4)


def post(kind: Transports, url: str, *, times: int = 1, timeout: float = 5.0) -> Response:
    async def go() -> Response:
        async with aclosing(kind()) as client:
            for _ in range(times):
                response = await client.request("POST", url, headers={}, body=BODY, timeout=timeout)
            return response

    return asyncio.run(go())


def failure(kind: Transports, url: str, *, times: int = 1, timeout: float = 5.0) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        post(kind, url, times=times, timeout=timeout)
    return caught.value


@contextmanager
def raw_server(*connections: list[bytes]) -> Iterator[tuple[str, list[int]]]:
    """Answers each connection's requests with the given bytes, one after the other, and then closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    served = [0] * len(connections)

    def serve() -> None:
        for index, answers in enumerate(connections):
            try:
                peer, _ = listener.accept()
            except OSError:  # shut down: fewer connections came
                return
            with peer:
                for answer in answers:
                    peer.recv(65536)
                    peer.sendall(answer)
                    served[index] += 1

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", served
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept(); to close it alone does not
        thread.join()
        listener.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_an_answer_comes_whole_with_its_headers_whatever_the_status(kind: Transports) -> None:
    with openai_server() as server:
        found = post(kind, f"{server.url}/chat/completions")
        missing = post(kind, f"{server.url}/nothing")
    assert (found.status, missing.status) == (200, 404)
    assert found.headers["content-type"].startswith("application/json")
    assert b'"choices"' in found.body


def test_connections_are_kept(kind: Transports) -> None:
    with raw_server([OK, OK, OK]) as (url, served):
        assert post(kind, url, times=3).body == b"ok"
    assert served == [3]


def test_nobody_listening_is_refused(kind: Transports) -> None:
    assert failure(kind, NOWHERE).kind is ErrorKind.REFUSED


def test_an_unknown_host_is_refused(kind: Transports) -> None:
    assert failure(kind, "http://no-such-host.invalid/").kind is ErrorKind.REFUSED


def test_a_connection_broken_before_or_within_the_answer_is_a_reset(kind: Transports) -> None:
    for fault in (reset(), cut()):
        with openai_server(faults={1: fault}) as server:
            assert failure(kind, f"{server.url}/chat/completions").kind is ErrorKind.RESET


def test_no_answer_in_time_is_a_timeout(kind: Transports) -> None:
    with openai_server(faults={1: hang()}) as server:
        error = failure(kind, f"{server.url}/chat/completions", timeout=0.2)
    assert error.kind is ErrorKind.TIMEOUT
    assert "0.2 s" in str(error)


def test_what_is_not_http_is_garbled(kind: Transports) -> None:
    with raw_server([b"SSH-2.0-OpenSSH_9.2\r\n\r\n"]) as (url, _):
        assert failure(kind, url).kind is ErrorKind.GARBLED


def test_an_answer_beyond_the_cap_is_not_read_on(kind: Transports) -> None:
    with openai_server(faults={1: garbled(b"x" * (MAX_BODY + 1))}) as server:
        error = failure(kind, f"{server.url}/chat/completions")
    assert error.kind is ErrorKind.GARBLED
    assert str(MAX_BODY) in str(error)


def test_a_header_with_a_line_end_is_refused(kind: Transports) -> None:
    async def go(url: str) -> None:
        async with aclosing(kind()) as client:
            await client.request("POST", url, headers={"Authorization": "a\nb"}, body=BODY, timeout=5)

    with raw_server([OK]) as (url, _), pytest.raises(ProviderError) as caught:
        asyncio.run(go(url))
    assert caught.value.kind is ErrorKind.BAD_REQUEST


def test_redirects_are_not_followed(kind: Transports) -> None:
    with raw_server([b"HTTP/1.1 301 Moved\r\nLocation: http://x.invalid/\r\nContent-Length: 0\r\n\r\n"]) as (url, _):
        response = post(kind, url)
    assert (response.status, response.headers["location"]) == (301, "http://x.invalid/")


def test_a_kept_connection_closed_by_the_server_does_not_count_as_a_failure() -> None:
    # The first connection answers once, takes the second request and closes without a byte; that is the race.
    with raw_server([OK, b""], [OK]) as (url, served):
        assert post(DIRECT, url, times=2).body == b"ok"
    assert served == [2, 1]


def test_a_kept_connection_that_broke_within_its_answer_is_a_failure(kind: Transports) -> None:
    with raw_server([OK, b"HTTP/1.1 200 OK\r\nContent-"], [OK]) as (url, served):
        assert failure(kind, url, times=2).kind is ErrorKind.RESET
        post(kind, url)
    assert served == [2, 1]


def test_only_one_connection_is_opened_in_place_of_a_stale_one() -> None:
    with raw_server([OK, b""], [b""], [OK]) as (url, _):
        assert failure(DIRECT, url, times=2).kind is ErrorKind.RESET
        post(DIRECT, url)


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server([OK]) as (url, _), openai_server() as server:
        monkeypatch.setenv("http_proxy", url.removeprefix("http://").rstrip("/"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert type(transport_for("http://teacher.invalid/")) is AiohttpTransport
        assert post(partial(transport_for, "http://teacher.invalid/"), "http://teacher.invalid/").body == b"ok"
        assert type(transport_for(server.url)) is Http1Transport
        assert type(transport_for("https://teacher.invalid/")) is Http1Transport


@pytest.mark.parametrize(
    ("body", "message", "parameter"),
    [
        (b'{"error": {"message": "no", "type": "t", "code": "c", "param": "top_k"}}', "no", "top_k"),
        (b'{"error": {"message": "no", "code": 400}}', "no", None),
        (b'{"error": "no"}', "no", None),
        (b'{"detail": "no"}', "no", None),
        (b'{"detail": [{"loc": ["body", "top_k"], "msg": "no"}]}', "top_k: no", "top_k"),
        (b'{"object": "error", "message": "no", "param": null}', "no", None),
        (b'[{"error": {"message": "no"}}]', "no", None),
        (b'{"error": {"message": "no", "metadata": {"raw": "upstream"}}}', "no: upstream", None),
        (b"Internal Server Error", "Internal Server Error", None),
        (b"", "(empty body)", None),
        (b"<html>\n<head><title>502</title></head><body><h1>Bad Gateway</h1><!-- pad --></body>", "Bad Gateway", None),
        (b"\xff\xfe", "\ufffd\ufffd", None),
        (b"null", "None", None),
        (b"{}", "{}", None),
        (b'{"detail": [{"loc": 5, "msg": "no"}]}', ": no", None),
        (b"[" * 99_999, "[" * 600 + " \N{HORIZONTAL ELLIPSIS}", None),
    ],
)
def test_error_bodies_of_every_shape_are_read(body: bytes, message: str, parameter: str | None) -> None:
    fault = Fault.read(body)
    assert (fault.message, fault.parameter) == (message, parameter)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Unrecognized request argument supplied: top_k", "top_k"),
        ("Unrecognized request arguments supplied: top_k, min_p", "top_k"),
        ("Unsupported parameter: 'max_tokens' is not supported with this model.", "max_tokens"),
        ("max_tokens is too large. (parameter=max_tokens, value=5000)", "max_tokens"),
        ("top_k must be -1 (disable), or at least 1, got 0.", "top_k"),
        ("Unexpected keys in the request: {'min_p'}", "min_p"),
        ("n_cmpl cannot be greater than the number of slots, please increase -np", "n_cmpl"),
    ],
)
def test_a_refused_parameter_is_found_by_name(text: str, name: str) -> None:
    assert name in Fault(text).refused_names()


@pytest.mark.parametrize(
    "text",
    [
        "This model's maximum context length is 512 tokens. However, you requested 600 tokens",
        "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
        "request (1234 tokens) exceeds the available context size (512 tokens), try increasing it",
        "prompt too long; exceeded max context length by 12 tokens",
        "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 289650 tokens.",
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_the_servers_words(text: str) -> None:
    assert Fault(text).says_too_long


def test_retry_after_is_seconds_a_date_or_milliseconds() -> None:
    now = datetime(2026, 11, 22, 8, 0, 0, tzinfo=UTC)
    assert retry_after({"retry-after": "2.5"}, now) == 2.5
    assert retry_after({"retry-after": "Sun, 22 Nov 2026 08:00:30 GMT"}, now) == 30
    assert retry_after({"retry-after": "Sun, 22 Nov 2026 07:00:00 GMT"}, now) == 0
    assert retry_after({"retry-after": "9", "retry-after-ms": "1500"}, now) == 1.5
    for nothing in (
        {},
        {"retry-after": "soon"},
        {"retry-after": "nan"},
        {"retry-after": ""},
        {"retry-after": "Sun, 22 Nov 2026 08:00:30 +99999999999999999999"},
        {"retry-after": "Sun, 22 Nov 99999 08:00:30 GMT"},
    ):
        assert retry_after(nothing, now) is None


def test_a_status_says_what_failed() -> None:
    assert {error_kind(status) for status in (408, 502, 503, 529, 523)} == {ErrorKind.OVERLOADED}
    assert {error_kind(status) for status in (504, 524)} == {ErrorKind.TIMEOUT}
    assert {error_kind(status) for status in (301, 307, 401, 402, 403, 407)} == {ErrorKind.AUTH}
    assert (error_kind(500), error_kind(501)) == (ErrorKind.SERVER, ErrorKind.SERVER)
    assert (error_kind(400), error_kind(422)) == (ErrorKind.BAD_REQUEST,) * 2


def test_only_a_leading_think_block_is_thinking() -> None:
    stop, length = FinishReason.STOP, FinishReason.LENGTH
    assert split_thinking("<think>\nhm\n</think>\n\nSELECT 1", stop) == ("hm", "SELECT 1")
    assert split_thinking("\n<think></think> x", stop) == ("", " x")
    assert split_thinking("say <think>no</think>", stop) == (None, "say <think>no</think>")
    assert split_thinking("hm,\nso it is 1\n</think>\n\nSELECT 1", stop) == ("hm,\nso it is 1", "SELECT 1")
    assert split_thinking("it ends with `</think>`, always", stop) == (None, "it ends with `</think>`, always")
    assert split_thinking("<think>cut", length) == ("cut", "")
    assert split_thinking("<think>never closed", stop) == (None, "<think>never closed")
