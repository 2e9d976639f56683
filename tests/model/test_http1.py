"""The own HTTP/1.1 client against a server that listens and answers exactly the bytes it is told, however odd."""

import asyncio
import gzip
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.model.http1 import MAX_HEAD, Http1Transport
from fastdistill.model.provider import ErrorKind, ProviderError
from fastdistill.model.transport import Response

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]
MAX_BODY = 2**16


class Does(Enum):
    CLOSE = "close"
    RESET = "reset"
    FOREVER = "send x until the client goes away"


Answer = Sequence[bytes | Does]
"""What follows one request. Each piece is a packet of its own."""

HANGS: Answer = []
TWO = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
OK: Answer = [TWO]


@dataclass
class Seen:
    url: str = ""
    requests: list[list[bytes]] = field(default_factory=list)  # of each connection
    hangs: asyncio.Event = field(default_factory=asyncio.Event)  # a request came that gets no answer
    closed: asyncio.Event = field(default_factory=asyncio.Event)  # by the client


@asynccontextmanager
async def serving(*connections: Sequence[Answer], host: str = "127.0.0.1", greets: bytes = b"") -> AsyncIterator[Seen]:
    """Each connection answers so many requests, and then waits for the client to close it."""
    seen = Seen()
    left = iter(connections)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests: list[bytes] = []
        seen.requests.append(requests)
        writer.write(greets)
        try:
            for answer in next(left):
                if not (head := await reader.readuntil(b"\r\n\r\n")):
                    return
                _, _, length = head.lower().partition(b"content-length:")
                requests.append(head + await reader.readexactly(int(length.split()[0]) if length else 0))
                for piece in answer:
                    await play(writer, piece)
                if not answer:
                    seen.hangs.set()
            if not await reader.read():
                seen.closed.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            seen.closed.set()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0)
    port = server.sockets[0].getsockname()[1]
    seen.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    async with server:
        yield seen


async def play(writer: asyncio.StreamWriter, piece: bytes | Does) -> None:
    if piece is Does.RESET:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    if piece in (Does.RESET, Does.CLOSE):
        writer.close()
    while piece is Does.FOREVER:
        await play(writer, b"x" * 1000)
    if isinstance(piece, bytes):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)  # lets the client read it by itself


def bytewise(whole: bytes) -> Answer:
    return [whole[at : at + 1] for at in range(len(whole))]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run[Any]:
    found: Run[Any] = request.param
    return found


def client(*, keep: float = 4.0) -> "aclosing[Http1Transport]":
    return aclosing(Http1Transport(max_body=MAX_BODY, keep=keep))


async def ask(transport: Http1Transport, url: str, body: bytes | None = b"{}", timeout: float = 5.0) -> Response:
    method = "GET" if body is None else "POST"
    return await transport.request(method, url, headers={"X-Title": "t"}, body=body, timeout=timeout)


async def asked(*connections: Sequence[Answer], times: int = 1, timeout: float = 5.0) -> tuple[list[Response], Seen]:
    async with serving(*connections) as seen, client() as transport:
        return [await ask(transport, seen.url, timeout=timeout) for _ in range(times)], seen


async def failure(asking: Awaitable[object]) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await asking
    return caught.value


HEAD = b"HTTP/1.1 200 OK\r\n"
PACKED = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
GZIP = gzip.compress(b"ok")
BOMB = gzip.compress(bytes(2**22))
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

KEPT: dict[str, tuple[Answer, bytes]] = {
    "a length": (OK, b"ok"),
    "byte by byte": (bytewise(TWO), b"ok"),
    "no reason phrase": ([b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok"], b"ok"),
    "names in any case": ([HEAD + b"cONTENT-lENGTH:2\r\n\r\nok"], b"ok"),
    "the same length twice": ([HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok"], b"ok"),
    "nothing": ([HEAD + b"Content-Length: 0\r\n\r\n"], b""),
    "chunks": ([CHUNKED + b"2\r\nok\r\nA\r\n0123456789\r\n0\r\n\r\n"], b"ok0123456789"),
    "chunks byte by byte": (bytewise(CHUNKED + b"2\r\nok\r\na\r\n0123456789\r\n0\r\n\r\n"), b"ok0123456789"),
    "a chunk with an extension": ([CHUNKED + b'2;name="v"\r\nok\r\n0;last\r\n\r\n'], b"ok"),
    "a chunk's size with zeros and spaces": ([CHUNKED + b"0002 \r\nok\r\n0\r\n\r\n"], b"ok"),
    "trailers": ([CHUNKED + b"2\r\nok\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n"], b"ok"),
    "chunks that win over a length": ([CHUNKED[:-2] + b"Content-Length: 9\r\n\r\n2\r\nok\r\n0\r\n\r\n"], b"ok"),
    "100 first": ([b"HTTP/1.1 100 Continue\r\n\r\n", *OK], b"ok"),
    "100 and 103 in one packet": ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + HEAD
                                   + b"Content-Length: 2\r\n\r\nok"], b"ok"),
    "204 with a length": ([b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n"], b""),
    "304": ([b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"], b""),
    "a folded header": ([HEAD + b"X-Long: a\r\n b\r\n\tc\r\nContent-Length: 2\r\n\r\nok"], b"ok"),
    "a body of the very cap": ([HEAD + b"Content-Length: %d\r\n\r\n" % MAX_BODY, b"x" * MAX_BODY], b"x" * MAX_BODY),
    "compressed unasked": ([PACKED % len(GZIP) + GZIP], b"ok"),
    "identity": ([HEAD + b"Content-Encoding: identity\r\nContent-Length: 2\r\n\r\nok"], b"ok"),
}  # fmt: skip

ENDS: dict[str, tuple[Answer, bytes]] = {
    "no length": ([HEAD + b"\r\n", b"o", b"k", Does.CLOSE], b"ok"),
    "no length and nothing": ([HEAD + b"\r\n", Does.CLOSE], b""),
    "close": ([HEAD + b"Connection: Close\r\nContent-Length: 2\r\n\r\nok"], b"ok"),
    "close among others": ([HEAD + b"Connection: x, close\r\nContent-Length: 2\r\n\r\nok"], b"ok"),
    "HTTP/1.0": ([b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"], b"ok"),
    "a second answer in the packet": ([TWO + TWO], b"ok"),
    "more than its length": ([HEAD + b"Content-Length: 2\r\n\r\nok..."], b"ok"),
    "more after its chunks": ([CHUNKED + b"2\r\nok\r\n0\r\n\r\n\r\n"], b"ok"),
}

BAD: dict[str, tuple[Answer, ErrorKind]] = {
    "closes at once": ([Does.CLOSE], ErrorKind.RESET),
    "resets at once": ([Does.RESET], ErrorKind.RESET),
    "closes within the status line": ([b"HTTP/1.1 2", Does.CLOSE], ErrorKind.RESET),
    "closes within the head": ([HEAD + b"Content-", Does.CLOSE], ErrorKind.RESET),
    "closes after the head": ([HEAD + b"Content-Length: 2\r\n\r\n", Does.CLOSE], ErrorKind.RESET),
    "closes within the body": ([HEAD + b"Content-Length: 3\r\n\r\nok", Does.CLOSE], ErrorKind.RESET),
    "resets within the body": ([HEAD + b"Content-Length: 3\r\n\r\nok", Does.RESET], ErrorKind.RESET),
    "resets a body without a length": ([HEAD + b"\r\nok", Does.RESET], ErrorKind.RESET),
    "closes before a chunk": ([CHUNKED, Does.CLOSE], ErrorKind.RESET),
    "closes within a chunk's size": ([CHUNKED + b"2", Does.CLOSE], ErrorKind.RESET),
    "closes within a chunk": ([CHUNKED + b"3\r\nok", Does.CLOSE], ErrorKind.RESET),
    "closes before the last chunk": ([CHUNKED + b"2\r\nok\r\n", Does.CLOSE], ErrorKind.RESET),
    "closes within the trailers": ([CHUNKED + b"2\r\nok\r\n0\r\n", Does.CLOSE], ErrorKind.RESET),
    "closes after 100": ([b"HTTP/1.1 100 Continue\r\n\r\n", Does.CLOSE], ErrorKind.RESET),
    "stops within the body": ([HEAD + b"Content-Length: 3\r\n\r\nok"], ErrorKind.TIMEOUT),
    "stops after 100": ([b"HTTP/1.1 100 Continue\r\n\r\n"], ErrorKind.TIMEOUT),
    "never answers": ([], ErrorKind.TIMEOUT),
    "garbage without an end": ([b"\x15\x03\x01\x00\x02\x02\x16"], ErrorKind.GARBLED),
    "garbage byte by byte": (bytewise(b"SSH-2.0-x"), ErrorKind.GARBLED),
    "an empty line first": ([b"\r\n", *OK], ErrorKind.GARBLED),
    "HTTP/2": ([b"HTTP/2 200\r\n\r\n"], ErrorKind.GARBLED),
    "HTTP/1.10": ([b"HTTP/1.10 200 OK\r\n\r\n"], ErrorKind.GARBLED),
    "a status of two digits": ([b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n"], ErrorKind.GARBLED),
    "a status of four digits": ([b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n"], ErrorKind.GARBLED),
    "a status below 100": ([b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n"], ErrorKind.GARBLED),
    "a status of other digits": ([b"HTTP/1.1 2\xb2\xb2 OK\r\n\r\n"], ErrorKind.GARBLED),
    "bare line ends": ([b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"], ErrorKind.GARBLED),
    "a header without a colon": ([HEAD + b"nonsense\r\n\r\n"], ErrorKind.GARBLED),
    "a header without a name": ([HEAD + b": x\r\n\r\n"], ErrorKind.GARBLED),
    "a space before the colon": ([HEAD + b"Content-Length : 2\r\n\r\nok"], ErrorKind.GARBLED),
    "two lengths": ([HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok"], ErrorKind.GARBLED),
    "a length that is none": ([HEAD + b"Content-Length: two\r\n\r\nok"], ErrorKind.GARBLED),
    "a negative length": ([HEAD + b"Content-Length: -2\r\n\r\nok"], ErrorKind.GARBLED),
    "an empty length": ([HEAD + b"Content-Length:\r\n\r\nok"], ErrorKind.GARBLED),
    "a length with an underscore": ([HEAD + b"Content-Length: 1_0\r\n\r\n0123456789"], ErrorKind.GARBLED),
    "a length of 5000 digits": ([HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nok"], ErrorKind.GARBLED),
    "a length beyond the cap": ([HEAD + b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1)], ErrorKind.GARBLED),
    "an unknown coding": ([HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n"], ErrorKind.GARBLED),
    "compressed, or so it says": ([PACKED % 2 + b"ok"], ErrorKind.GARBLED),
    "compressed and cut": ([PACKED % 20 + GZIP[:20]], ErrorKind.GARBLED),
    "compressed and too large": ([PACKED % len(BOMB) + BOMB], ErrorKind.GARBLED),
    "another protocol": ([b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\n\r\n"], ErrorKind.GARBLED),
    "a chunk's size that is none": ([CHUNKED + b"two\r\nok\r\n0\r\n\r\n"], ErrorKind.GARBLED),
    "a chunk's size with a sign": ([CHUNKED + b"+2\r\nok\r\n0\r\n\r\n"], ErrorKind.GARBLED),
    "a chunk's size with 0x": ([CHUNKED + b"0x2\r\nok\r\n0\r\n\r\n"], ErrorKind.GARBLED),
    "no chunk's size": ([CHUNKED + b"\r\nok\r\n0\r\n\r\n"], ErrorKind.GARBLED),
    "a huge chunk's size": ([CHUNKED + b"F" * 20 + b"\r\n"], ErrorKind.GARBLED),
    "a chunk that is too long": ([CHUNKED + b"2\r\nokay\r\n0\r\n\r\n"], ErrorKind.GARBLED),
    "a chunk beyond the cap": ([CHUNKED + b"1\r\nx\r\n%x\r\n" % MAX_BODY], ErrorKind.GARBLED),
    "an endless body": ([HEAD + b"\r\n", Does.FOREVER], ErrorKind.GARBLED),
    "an endless head": ([HEAD + b"X-Long: ", Does.FOREVER], ErrorKind.GARBLED),
    "an endless status line": ([b"HTTP/1.1 200 ", Does.FOREVER], ErrorKind.GARBLED),
    "an endless chunk size": ([CHUNKED, Does.FOREVER], ErrorKind.GARBLED),
    "a huge head in one packet": ([HEAD + b"X: " + b"x" * MAX_HEAD + b"\r\n\r\n"], ErrorKind.GARBLED),
}


@pytest.mark.parametrize(("answer", "body"), KEPT.values(), ids=KEPT)
def test_after_a_whole_answer_the_connection_is_used_again(run: Run[Any], answer: Answer, body: bytes) -> None:
    responses, seen = run(asked([answer, OK], times=2))
    assert [response.body for response in responses] == [body, b"ok"]
    assert [len(requests) for requests in seen.requests] == [2]


@pytest.mark.parametrize(("answer", "body"), ENDS.values(), ids=ENDS)
def test_a_connection_whose_answer_is_its_last_is_not(run: Run[Any], answer: Answer, body: bytes) -> None:
    responses, seen = run(asked([answer], [OK], times=2))
    assert [response.body for response in responses] == [body, b"ok"]
    assert [len(requests) for requests in seen.requests] == [1, 1]


@pytest.mark.parametrize(("answer", "kind"), BAD.values(), ids=BAD)
def test_what_is_no_whole_answer_is_an_error_and_is_asked_once(run: Run[Any], answer: Answer, kind: ErrorKind) -> None:
    async def go() -> tuple[ProviderError, Seen]:
        timeout = 0.1 if kind is ErrorKind.TIMEOUT else 5.0
        async with serving([answer], [OK]) as seen, client() as transport:
            error = await failure(ask(transport, seen.url, timeout=timeout))
            await asyncio.wait_for(seen.closed.wait(), 5) if Does.RESET not in answer else None
            assert (await ask(transport, seen.url)).body == b"ok"
            return error, seen

    error, seen = run(go())
    assert error.kind is kind
    assert str(error).startswith(f"{seen.url}: ")
    assert [len(requests) for requests in seen.requests] == [1, 1]


def test_several_headers_of_a_name_are_joined_and_names_are_in_lower_case(run: Run[Any]) -> None:
    head = b"HTTP/1.1 418 I'm a teapot\r\nX-A: 1\r\nRetry-After:  2 \r\nx-a: caf\xe9\r\nContent-Length: 0\r\n\r\n"
    (response,), _ = run(asked([[head]]))
    assert (response.status, response.body) == (418, b"")
    assert response.headers == {"x-a": "1, caf\xe9", "retry-after": "2", "content-length": "0"}


def test_what_is_sent(run: Run[Any]) -> None:
    async def go() -> tuple[str, list[bytes]]:
        async with serving([OK, OK], host="::1") as seen, client() as transport:
            await ask(transport, f"{seen.url}/a%20b/ü x?q=1&r=%2F", body=b'{"a": 1}')
            await ask(transport, f"{seen.url.removesuffix('/v1')}", body=None)
            return seen.url, seen.requests[0]

    url, (posted, got) = run(go())
    host = url.removeprefix("http://").removesuffix("/v1").encode()
    assert posted == (
        b"POST /v1/a%20b/%C3%BC%20x?q=1&r=%2F HTTP/1.1\r\nHost: " + host + b"\r\nUser-Agent: fastdistill\r\n"
        b'Accept: */*\r\nAccept-Encoding: identity\r\nX-Title: t\r\nContent-Length: 8\r\n\r\n{"a": 1}'
    )
    assert got.startswith(b"GET / HTTP/1.1\r\n") and b"Content-Length" not in got


def test_a_line_end_in_a_header_or_a_port_that_is_none_is_not_sent(run: Run[Any]) -> None:
    async def go() -> tuple[ErrorKind, ErrorKind]:
        async with serving() as seen, client() as transport:
            headers = {"Authorization": "Bearer key\r\nX-Other: 1"}
            sent = transport.request("GET", seen.url, headers=headers, body=None, timeout=5)
            far = ask(transport, "http://127.0.0.1:99999/")
            kinds = (await failure(sent)).kind, (await failure(far)).kind
            assert seen.requests == []
            return kinds

    assert run(go()) == (ErrorKind.BAD_REQUEST, ErrorKind.REFUSED)


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=50).map(lambda chunk: chunk * 20), max_size=5), st.sets(st.integers(0, 5000)))
def test_an_answer_reads_the_same_however_it_is_split(chunks: list[bytes], cuts: set[int]) -> None:
    body = b"".join(chunks)
    sized = b"HTTP/1.1 100 Continue\r\n\r\n%bX-A: 1\r\nContent-Length: %d\r\n\r\n%b" % (HEAD, len(body), body)
    parts = b"".join(b"%x;x=1\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks if chunk)
    for whole in (sized, CHUNKED + parts + b"0\r\nX-Sum: 1\r\n\r\n"):
        ends = sorted(cut for cut in cuts if cut < len(whole))
        pieces = [whole[begin:end] for begin, end in zip([0, *ends], [*ends, len(whole)], strict=True)]
        (response,), _ = uvloop.run(asked([pieces]))
        assert response.body == body


def test_connections_are_as_many_as_requests_at_a_time(run: Run[Any]) -> None:
    async def go() -> Seen:
        async with serving(*[[OK] * 3] * 20) as seen, client() as transport:
            for _ in range(2):
                await asyncio.gather(*(ask(transport, seen.url) for _ in range(10)))
            return seen

    assert [len(requests) for requests in run(go()).requests] == [2] * 10


def test_an_idle_connection_is_closed(run: Run[Any]) -> None:
    async def go() -> Seen:
        async with serving([OK, OK], [OK]) as seen, client(keep=0.2) as transport:
            await ask(transport, seen.url)
            await asyncio.wait_for(seen.closed.wait(), 5)
            await ask(transport, seen.url)
            return seen

    assert [len(requests) for requests in run(go()).requests] == [1, 1]


def test_a_connection_that_holds_a_thread_of_the_server_is_not_kept(run: Run[Any]) -> None:
    counted = TWO.replace(b"\r\n\r\n", b"\r\nKeep-Alive: timeout=5, max=100\r\n\r\n")  # as llama.cpp has it

    async def go() -> Seen:
        async with serving([[counted], OK], [OK]) as seen, client() as transport:
            await ask(transport, seen.url)
            await ask(transport, seen.url)
            return seen

    assert [len(requests) for requests in run(go()).requests] == [1, 1]


def test_without_keep_each_request_has_a_connection_and_none_is_sent_twice(run: Run[Any]) -> None:
    async def go() -> Seen:
        async with serving([OK], [[Does.CLOSE]], [OK]) as seen, client(keep=0) as transport:
            await ask(transport, seen.url)
            assert (await failure(ask(transport, seen.url))).kind is ErrorKind.RESET
            return seen

    assert [len(requests) for requests in run(go()).requests] == [1, 1]


@pytest.mark.parametrize("breaks", [Does.CLOSE, Does.RESET])
def test_a_kept_connection_that_dies_without_a_byte_is_replaced_once(run: Run[Any], breaks: Does) -> None:
    async def go() -> Seen:
        async with serving([OK, [breaks]], [OK, [breaks]], [[breaks]]) as seen, client() as transport:
            await ask(transport, seen.url)
            await ask(transport, seen.url)  # over the second
            assert (await failure(ask(transport, seen.url))).kind is ErrorKind.RESET
            return seen

    assert [len(requests) for requests in run(go()).requests] == [2, 2, 1]


def test_a_kept_connection_that_dies_after_a_byte_is_not(run: Run[Any]) -> None:
    async def go() -> Seen:
        async with serving([OK, [b"H", Does.CLOSE]], [OK]) as seen, client() as transport:
            await ask(transport, seen.url)
            assert (await failure(ask(transport, seen.url))).kind is ErrorKind.RESET
            return seen

    assert [len(requests) for requests in run(go()).requests] == [2]


def test_a_time_limit_on_a_kept_connection_is_not_retried(run: Run[Any]) -> None:
    async def go() -> Seen:
        async with serving([OK, []], [OK]) as seen, client() as transport:
            await ask(transport, seen.url)
            assert (await failure(ask(transport, seen.url, timeout=0.1))).kind is ErrorKind.TIMEOUT
            return seen

    assert [len(requests) for requests in run(go()).requests] == [2]


def test_what_comes_unasked_on_a_kept_connection_answers_nobody(run: Run[Any]) -> None:
    async def go() -> list[bytes]:
        late: Answer = [*OK, b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 4\r\n\r\nlate"]
        async with serving([late], [OK]) as seen, client() as transport:
            first = await ask(transport, seen.url)
            await asyncio.wait_for(seen.closed.wait(), 5)
            return [first.body, (await ask(transport, seen.url)).body]

    assert run(go()) == [b"ok", b"ok"]


def test_a_server_that_speaks_first_is_no_http_server(run: Run[Any]) -> None:
    async def go() -> ProviderError:
        async with serving([[]], greets=b"220 mail.example ESMTP\r\n") as seen, client() as transport:
            return await failure(ask(transport, seen.url))

    assert run(go()).kind is ErrorKind.GARBLED


def test_a_cancelled_request_closes_its_connection(run: Run[Any]) -> None:
    async def go() -> Seen:
        async with serving([OK, HANGS], [OK]) as seen, client() as transport:
            await ask(transport, seen.url)
            task = asyncio.create_task(ask(transport, seen.url))
            await seen.hangs.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(seen.closed.wait(), 5)
            await ask(transport, seen.url)
            return seen

    assert [len(requests) for requests in run(go()).requests] == [2, 1]


def test_closing_ends_what_is_under_way_and_the_transport_can_be_used_again(run: Run[Any]) -> None:
    async def go() -> ProviderError:
        async with serving([HANGS], [OK]) as seen:
            transport = Http1Transport(max_body=MAX_BODY, keep=4)
            task = asyncio.create_task(failure(ask(transport, seen.url)))
            await seen.hangs.wait()
            await transport.aclose()
            await asyncio.wait_for(seen.closed.wait(), 5)
            await ask(transport, seen.url)
            await transport.aclose()
            return await task

    assert run(go()).kind is ErrorKind.RESET


def test_the_time_limit_holds_while_connecting(run: Run[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first, socket.socket() as second:
        for waiting in (first, second):  # Linux drops what comes when the queue is full
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())

        url = f"http://127.0.0.1:{full.getsockname()[1]}/"

        async def go() -> list[ProviderError]:
            async with client() as transport:  # uvloop counts in whole milliseconds, and may ring up to one early
                limits = [0.2 + tenth / 1e4 for tenth in range(20)]
                return await asyncio.gather(*(failure(ask(transport, url, timeout=limit)) for limit in limits))

        assert {error.kind for error in run(go())} == {ErrorKind.TIMEOUT}
