"""HTTP/1.1 (RFC 9112) over kept connections, with TLS or without, at a fraction of what aiohttp costs.

It has no proxies, no HEAD and no redirects, and calls garbled what it does not know.
"""

import asyncio
import math
import re
import ssl
import zlib
from collections.abc import Generator, Mapping, Sequence
from functools import lru_cache, partial
from typing import TypeVar, cast
from urllib.parse import quote, urlsplit

from fastdistill.core.turns import LARGE
from fastdistill.model.provider import ErrorKind, ProviderError
from fastdistill.model.transport import CONNECTS, RESENDS, Response, StaleConnection, refused

MAX_HEAD = 2**16  # bytes of a status line with its headers, and of a line between two chunks

T = TypeVar("T")
_Address = tuple[str, int, bool]  # host, port, whether over TLS


class Http1Transport:
    """Implements `Transport`. Belongs to one event loop."""

    def __init__(self, *, max_body: int, keep: float) -> None:
        self._max_body = max_body
        self._keep = keep
        self._idle: dict[_Address, list[_Connection]] = {}  # the latest last
        self._open: set[_Connection] = set()

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None, timeout: float
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + timeout
        address, head = _head(method, url, tuple(headers.items()))
        if body is None:
            sent: tuple[bytes, ...] = (head + b"\r\n",)
        elif len(body) < LARGE:
            sent = (head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body),)
        else:  # a copy would take long
            sent = (head + b"Content-Length: %d\r\n\r\n" % len(body), body)
        try:
            if idle := self._idle.get(address):
                try:
                    return await idle.pop().exchange(sent, deadline)
                except StaleConnection as stale:  # as all the idle ones may be: a connection is opened for this
                    if not RESENDS.get()():
                        raise ConnectionResetError("closed by the server") from stale
            connection = await self._connect(url, address, deadline)
            return await connection.exchange(sent, deadline)
        except TimeoutError as error:
            raise ProviderError(ErrorKind.TIMEOUT, f"{url}: no answer within {timeout:g} s") from error
        except _Garbled as error:
            raise ProviderError(ErrorKind.GARBLED, f"{url}: {error}") from error
        except ConnectionError as error:
            raise ProviderError(ErrorKind.RESET, f"{url}: the connection broke ({error})") from error

    async def aclose(self) -> None:
        for connection in list(self._open):
            connection.end(ConnectionAbortedError("closed by this side"))
        await asyncio.sleep(0)  # for the sockets to be closed

    async def _connect(self, url: str, address: _Address, deadline: float) -> "_Connection":
        loop = asyncio.get_running_loop()
        host, port, tls = address
        idle = self._idle.setdefault(address, [])
        make = partial(_Connection, self._open, idle, self._max_body, keep=self._keep, plain=not tls)
        patience = loop.time() + CONNECTS
        try:
            async with asyncio.timeout_at(min(deadline, patience)):
                return (await loop.create_connection(make, host, port, ssl=_trust() if tls else None))[1]
        except (OSError, ValueError) as error:  # ValueError: no name that could be looked up
            if isinstance(error, TimeoutError) and deadline <= patience:  # the clock may be a little behind its timer
                raise
            raise refused(url, error if str(error) else OSError(f"no connection within {CONNECTS:g} s")) from error


class _Garbled(Exception):
    pass


class _Connection(asyncio.Protocol):
    """In an exchange, `_answer` is what waits for it, and `_reader` is there from the first byte on."""

    def __init__(
        self, open_: "set[_Connection]", idle: "list[_Connection]", max_body: int, *, keep: float, plain: bool
    ) -> None:
        self._open, self._idle, self._max_body, self._keep, self._plain = open_, idle, max_body, keep, plain
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[Response] | None = None
        self._reader: _Reading[tuple[Response, bool]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # when it ends, of itself
        self._rings = math.inf  # when the timer looks whether it is due
        self._used = False

    async def exchange(self, sent: Sequence[bytes], deadline: float) -> Response:
        """The answer to one request. Raises what `end` was told, or StaleConnection."""
        if self._transport.is_closing():
            raise ConnectionResetError("closed at once by the server")
        self._end_at(deadline)
        answer: asyncio.Future[Response] = self._loop.create_future()
        self._answer = answer
        for part in sent:
            self._transport.write(part)
        try:
            return await answer
        finally:
            if self._answer is answer:  # cancelled: what still comes must not be taken for another's
                self.end()

    def end(self, error: Exception | None = None) -> None:
        """Closes the connection; the error is for what waits for an answer."""
        if self._timer is not None:
            self._timer.cancel()
        self._open.discard(self)
        if self in self._idle:
            self._idle.remove(self)
        answer, self._answer = self._answer, None
        if error is not None and answer is not None and not answer.done():
            stale = self._used and self._reader is None and isinstance(error, ConnectionError)
            answer.set_exception(StaleConnection() if stale else error)
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(ConnectionResetError(str(exc or "closed by the server")))

    def eof_received(self) -> None:
        if self._reader is not None:
            self.data_received(b"")
        self.connection_lost(None)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.end()  # nobody asked
            return
        if self._reader is None:
            self._reader = _read(self._max_body)
            next(self._reader)
        try:
            self._reader.send(data)
        except (_Garbled, ConnectionError) as error:
            self.end(error)
        except StopIteration as whole:
            response, keep = whole.value
            answer, self._answer, self._reader = self._answer, None, None
            if not answer.done():  # else it was cancelled just now
                answer.set_result(response)
            # Such a server has a thread for each connection: one that is idle holds up what waits in another. With TLS
            # it is a proxy that says so, and a handshake for each request would cost more.
            threads = self._plain and "max=" in response.headers.get("keep-alive", "")
            if threads or not keep or not self._keep or self._transport.get_write_buffer_size():
                self.end()
            else:
                self._used = True
                self._idle.append(self)
                self._end_at(self._loop.time() + self._keep)

    def _end_at(self, moment: float) -> None:
        """Instead of an earlier such order. A timer is set only where the last one comes too late, so hardly ever."""
        self._due = moment
        if moment < self._rings:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._rings = self._loop.call_at(moment, self._look), moment

    def _look(self) -> None:
        self._timer, self._rings = None, math.inf
        if self._loop.time() < self._due:
            self._end_at(self._due)
        else:
            self.end(TimeoutError())


@lru_cache
def _trust() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@lru_cache(maxsize=256)
def _head(method: str, url: str, headers: tuple[tuple[str, str], ...]) -> tuple[_Address, bytes]:
    """Where a request goes, and how it begins, but for its length."""
    parts = urlsplit(url)
    try:
        tls, host = parts.scheme == "https", parts.netloc.encode("idna").decode()
        address = (parts.hostname or "", parts.port or (443 if tls else 80), tls)
    except ValueError as error:
        raise ProviderError(ErrorKind.REFUSED, f"{url}: nobody answers ({error})") from error
    target = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    fields = {"Host": host, "User-Agent": "fastdistill", "Accept": "*/*", "Accept-Encoding": "identity"}
    fields |= {name.title(): value for name, value in headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    if len(lines.splitlines()) != len(fields):
        raise ProviderError(ErrorKind.BAD_REQUEST, f"{url}: a header that was to be sent has a line end in it")
    return address, f"{method} {target} HTTP/1.1\r\n{lines}".encode()


_SAFE = "/?%:@!$&'()*+,;=~"

# --- an answer, read as it comes ---

_Reading = Generator[None, bytes, T]
"""To be begun, then sent what comes, piece by piece, and b"" at the end of the stream."""


def _read(max_body: int) -> _Reading[tuple[Response, bool]]:
    """One answer, and whether the connection may be used again."""
    come = yield
    status = 100
    while status < 200:  # 100 Continue, 103 Early Hints
        while (end := come.find(b"\r\n\r\n", 0, MAX_HEAD)) < 0:
            if come[:7] != b"HTTP/1."[: len(come)] or b"\n\n" in come:
                raise _not_http(repr(come[:100]))
            _within(MAX_HEAD, len(come), "the answer's head")
            come += yield from _more()
        status, headers, keep = _parse(come[:end])
        come = come[end + 4 :]
        if status == 101:
            raise _not_http("it changes to a protocol that was not asked for")
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if status in (204, 304):
        body = b""
    elif coding is not None:
        if coding.lower() != "chunked":
            raise _not_http(f"Transfer-Encoding: {coding}")
        body, come = yield from _chunks(bytearray(come), max_body)
    elif length is not None:
        size = _within(max_body, _length(length))
        body, come = (come, b"") if len(come) == size else (yield from _exactly(size, bytearray(come)))
    else:
        keep, buffer = False, bytearray(come)
        while True:
            _within(max_body, len(buffer))
            if not (come := (yield)):
                break
            buffer += come
        body = bytes(buffer)
    if body and (packing := headers.get("content-encoding", "identity")) != "identity":
        body = _unpacked(packing, body, max_body)
    return Response(status, headers, body), keep and not come


def _unpacked(packing: str, body: bytes, max_body: int) -> bytes:
    """It was not asked for: some gateways compress all the same."""
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, whichever it is
    try:
        whole = unpacker.decompress(body, max_body)
    except zlib.error as error:
        raise _not_http(f"Content-Encoding: {packing}: {error}") from error
    _within(max_body, len(whole) + len(unpacker.unconsumed_tail))
    if not unpacker.eof:
        raise _not_http(f"Content-Encoding: {packing}: it ends early")
    return whole


@lru_cache(maxsize=1024)
def _length(text: str) -> int:
    """What a Content-Length says."""
    if (found := _LENGTH.fullmatch(text)) is None:
        raise _not_http(f"Content-Length: {text}")
    return int(found[1])


_LENGTH = re.compile(r"([0-9]{1,18})(?:[ \t]*,[ \t]*\1)*")  # a proxy may say the same twice


def _parse(head: bytes) -> tuple[int, dict[str, str], bool]:
    """Status, headers, and whether the connection may be used again."""
    first, *lines = head.decode("latin-1").replace("\r\n ", " ").replace("\r\n\t", " ").split("\r\n")
    status, keep = _status(first)
    fields = [*map(_field, lines)]
    headers = dict(fields)
    if len(headers) < len(fields):
        headers = {name: ", ".join([value for other, value in fields if other == name]) for name in headers}
    return status, headers, keep and "close" not in headers.get("connection", "").lower()


@lru_cache(maxsize=64)
def _status(line: str) -> tuple[int, bool]:
    """Status, and whether connections of this version are kept."""
    version, status = line[:9], line[9:12]
    if version not in ("HTTP/1.1 ", "HTTP/1.0 ") or not status.isdecimal() or status < "100" or line[12:13].strip():
        raise _not_http(line)
    return int(status), version == "HTTP/1.1 "


@lru_cache(maxsize=256)  # most lines come with every answer
def _field(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or name.split() != [name]:
        raise _not_http(f"a header is {line!r}")
    return name.lower(), value.strip(" \t")


def _exactly(size: int, buffer: bytearray) -> _Reading[tuple[bytes, bytes]]:
    """So many bytes, and what came beyond them."""
    while len(buffer) < size:
        buffer += yield from _more()
    return _take(buffer, size), bytes(buffer)


def _chunks(buffer: bytearray, max_body: int) -> _Reading[tuple[bytes, bytes]]:
    """A body in chunks, and what came beyond it."""
    body = bytearray()
    while True:
        line = yield from _line(buffer)
        digits = line.partition(b";")[0].strip(b" \t")  # what follows are extensions
        if not 0 < len(digits) < 16 or digits.strip(b"0123456789abcdefABCDEF"):
            raise _not_http(f"the size of a chunk is {line!r}")
        if not (size := int(digits, 16)):
            break
        _within(max_body, len(body) + size)
        while len(buffer) < size + 2:
            buffer += yield from _more()
        body += _take(buffer, size)
        if _take(buffer, 2) != b"\r\n":
            raise _not_http("a chunk is longer than its size")
    while (yield from _line(buffer)):
        pass  # trailers
    return bytes(body), bytes(buffer)


def _line(buffer: bytearray) -> _Reading[bytes]:
    while (end := buffer.find(b"\r\n", 0, MAX_HEAD)) < 0:
        _within(MAX_HEAD, len(buffer), "the answer's head")
        buffer += yield from _more()
    return _take(buffer, end + 2)[:-2]


def _take(buffer: bytearray, size: int) -> bytes:
    taken = bytes(memoryview(buffer)[:size])
    del buffer[:size]
    return taken


def _more() -> _Reading[bytes]:
    if not (come := (yield)):
        raise ConnectionResetError("closed by the server within its answer")
    return come


def _within(most: int, size: int, what: str = "the answer") -> int:
    if size > most:
        raise _Garbled(f"{what} is larger than {most} bytes")
    return size


def _not_http(what: str) -> _Garbled:
    return _Garbled(f"the answer is not HTTP ({what[:100]})")
