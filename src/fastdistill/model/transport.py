"""HTTP to a model endpoint, and what every provider reads alike: error bodies, status codes, Retry-After, thinking.

It does not retry, but for a connection that had died in the pool.
"""

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Generic, Protocol, Self, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import msgspec
from pydantic import SecretStr

from fastdistill.core.types import FinishReason, TokenLogprob
from fastdistill.model.provider import ErrorKind, ProviderError, ServedConfig


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer. `headers` are looked up without regard to case; `body` is decompressed."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport(Protocol):
    """Sends one request and brings the whole answer, whatever its status."""

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None, timeout: float
    ) -> Response:
        """The answer to one request. Redirects are not followed.

        Args:
            timeout: seconds from the call to the last byte.

        Raises:
            ProviderError: REFUSED, RESET or TIMEOUT; GARBLED if it is not HTTP, or larger than the transport takes.
        """
        ...

    async def aclose(self) -> None: ...


class AiohttpTransport:
    """Keep-alive connections without a limit of their own: the client above says how many requests are in flight.

    Proxies come from the environment (`HTTPS_PROXY`, `NO_PROXY` ...). Belongs to one event loop.
    """

    max_body = 64 * 2**20
    """Bytes of an answer, decompressed, beyond which it is not read on."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._proxy = lru_cache(_proxy)

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None, timeout: float
    ) -> Response:
        if self._session is None:
            self._session = _session(force_close=False)
        try:
            async with asyncio.timeout(timeout):
                try:
                    return await self._send(self._session, method, url, headers, body)
                except _StaleConnection:
                    # The pool may hold more of the same, so this goes over a connection opened for it.
                    async with _session(force_close=True) as fresh:
                        return await self._send(fresh, method, url, headers, body)
        # A connection that does not come about in time is nobody listening, though aiohttp has it as a timeout too.
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise ProviderError(ErrorKind.REFUSED, f"{url}: nobody answers ({error})") from error
        except TimeoutError as error:
            raise ProviderError(ErrorKind.TIMEOUT, f"{url}: no answer within {timeout:g} s") from error
        except aiohttp.ClientHttpProxyError as error:
            raise ProviderError(ErrorKind.REFUSED, f"{url}: the proxy refuses ({error})") from error
        except aiohttp.ClientResponseError as error:
            raise ProviderError(ErrorKind.GARBLED, f"{url}: the answer is not HTTP ({error.message})") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ProviderError(ErrorKind.RESET, f"{url}: the connection broke ({error})") from error

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _send(
        self, session: aiohttp.ClientSession, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> Response:
        connection = SimpleNamespace(reused=False)
        chunks: list[bytes] = []
        size = 0
        try:
            sent: Any = {"data": body, "headers": headers, "proxy": self._proxy(url), "trace_request_ctx": connection}
            opened = await session.request(method, url, allow_redirects=False, **sent)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            begun = isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.args[0], str)
            if connection.reused and not begun:
                raise _StaleConnection from error
            raise
        async with opened as response:
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > self.max_body:
                    raise ProviderError(ErrorKind.GARBLED, f"{url}: the answer is larger than {self.max_body} bytes")
                chunks.append(chunk)
            return Response(response.status, response.headers, b"".join(chunks))


C = TypeVar("C", bound=ServedConfig)
S = TypeVar("S", bound=msgspec.Struct)


class HttpProvider(Generic[C]):
    """What the providers over HTTP share: sending a request, and errors that say where and what to do."""

    _remedy: str  # what to do when nobody answers
    _crowded = ""  # why else a request may have run out of time
    _expected: str  # what an answer should be
    _doubt = ""  # said of every answer that is something else

    def __init__(
        self, config: C, transport: Transport | None, key: SecretStr | None, headers: Mapping[str, SecretStr]
    ) -> None:
        self._config = config
        self._transport = transport or AiohttpTransport()
        self._headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._headers |= {name: value.get_secret_value() for name, value in headers.items()}
        self._where = f"{config.provider}: {config.url}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        content_type: str = "application/json",
        timeout: float | None = None,
    ) -> Response:
        """The answer, whatever its status, without the secrets that were sent."""
        headers = {**self._headers, "Content-Type": content_type}
        timeout = timeout or self._config.timeout
        try:
            response = await self._transport.request(method, url, headers=headers, body=body, timeout=timeout)
        except ProviderError as error:
            remedies = {
                ErrorKind.REFUSED: f"; {self._remedy}",
                ErrorKind.TIMEOUT: f"; raise `timeout`, or lower `max_concurrency`{self._crowded}",
            }
            message = f"{self._config.provider}: {error}{remedies.get(error.kind, '')}"
            raise ProviderError(error.kind, message) from error
        return without_secrets(response, self._headers)

    def _decode(self, response: Response, type_: type[S]) -> S:
        try:
            return msgspec.json.decode(response.body, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._garbled(str(error), response) from error

    def _garbled(self, why: str, response: Response) -> ProviderError:
        text = response.body[:200].decode(errors="replace").strip()
        hint = self._doubt or ("; correct `base_url`" if text.startswith("<") else "")
        message = f"{self._where}: not {self._expected} ({why}): {text!r}{hint}"
        return ProviderError(ErrorKind.GARBLED, message, status=response.status)

    def _failed(
        self, kind: ErrorKind, status: int, message: str, response: Response, parameter: str | None = None
    ) -> ProviderError:
        wait, message = retry_after(response.headers, datetime.now(UTC)), f"{self._where}: {status}: {message}"
        return ProviderError(kind, message, status=status, retry_after=wait, parameter=parameter)


class Version(msgspec.Struct):
    version: str


class Token(msgspec.Struct):
    """A token and its log-probability: OpenAI's form, which is Ollama's too."""

    token: str
    logprob: float
    top_logprobs: "list[Token] | None" = None

    def scored(self) -> TokenLogprob:
        tops = tuple((top.token, top.logprob) for top in self.top_logprobs or ())
        return TokenLogprob(self.token, self.logprob, tops)


def without_secrets(response: Response, headers: Mapping[str, str]) -> Response:
    """The answer without what the request's headers hold: some servers repeat the key they refuse."""
    secrets = [value.removeprefix("Bearer ").encode() for name, value in headers.items() if name != "Content-Type"]
    body = response.body
    for secret in secrets:
        if len(secret) >= 6 and secret in body:
            body = body.replace(secret, b"(secret)")
    return response if body is response.body else replace(response, body=body)


@dataclass(frozen=True, slots=True)
class Fault:
    """What an error body says, whichever of the shapes in use it has."""

    message: str
    code: str = ""  # `code` and `type` as the server has them, joined by a space
    parameter: str | None = None
    status: int | None = None  # a numeric `code`, for errors that come under 200
    fields: Mapping[str, Any] = field(default_factory=dict)


def read_fault(body: bytes) -> Fault:
    """Reads the five shapes: `{"error": {…}}`, `{"error": str}`, `{"detail": str}`, `{"detail": [{loc, msg}]}`, text.

    Also a bare `{"message": …}` (older vLLM and SGLang) and a list of one error (Google).
    """
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return Fault(_brief(body.decode(errors="replace")) or "(empty body)")
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, dict):
        return Fault(_brief(str(value)))
    detail = value.get("error") or value.get("detail") or value.get("message")
    if isinstance(detail, list):
        return _from_locations(detail)
    if isinstance(detail, str):
        return _from_fields({**value, "message": detail})
    return _from_fields(detail if isinstance(detail, dict) else {"message": _brief(body.decode(errors="replace"))})


def error_kind(status: int) -> ErrorKind:
    """What a status means where the body says nothing more exact."""
    return _KINDS.get(status, ErrorKind.SERVER if status >= 500 else ErrorKind.BAD_REQUEST)


def says_too_long(fault: Fault) -> bool:
    """Whether an error is about the context window, by its code or its words."""
    return _TOO_LONG.search(f"{fault.code} {fault.message}") is not None


def refused_names(fault: Fault) -> list[str]:
    """Names that an error may be about, most certain first: they are to be looked up among those that were sent."""
    named = [] if fault.parameter is None else [fault.parameter]
    return named + [match for pattern in _REFUSED_NAME for match in pattern.findall(fault.message)]


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds to wait, from `retry-after-ms` (OpenAI's) or `Retry-After` (seconds or a date, RFC 9110, 10.2.3)."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if (seconds := _number(text)) is not None:
        return seconds
    try:
        moment = parsedate_to_datetime(text or "")
    except ValueError:
        return None
    return max(0.0, ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now).total_seconds())


def split_thinking(content: str, finish: FinishReason) -> tuple[str | None, str]:
    """Takes a leading `<think>…</think>` off an answer; the rest stays as it is, character for character.

    A block that `max_tokens` cut is all thinking; one that was never closed otherwise is left in the answer.
    """
    opened = content.lstrip()
    if not opened.startswith("<think>"):
        return None, content
    thinking, closed, rest = opened.removeprefix("<think>").partition("</think>")
    if closed:
        return thinking.strip(), rest
    return (thinking.strip(), "") if finish is FinishReason.LENGTH else (None, content)


class _StaleConnection(Exception):
    """A kept connection was gone before a byte of the answer: the server had closed it between two requests."""


def _session(*, force_close: bool) -> aiohttp.ClientSession:
    # uvicorn, under vLLM and SGLang, closes an idle connection after 5 s; going first avoids the race.
    keepalive = None if force_close else 4.0
    connector = aiohttp.TCPConnector(limit=0, force_close=force_close, keepalive_timeout=keepalive)
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_mark_reused)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        trace_configs=[trace],
    )


def _proxy(url: str) -> str | None:
    """The proxy for a URL, from the environment. aiohttp's `trust_env` looks it up in a thread for every request."""
    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return None
    proxy = getproxies().get(parts.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


async def _mark_reused(session: aiohttp.ClientSession, context: SimpleNamespace, parameters: object) -> None:
    context.trace_request_ctx.reused = True


_KINDS = {
    **dict.fromkeys((401, 402, 403), ErrorKind.AUTH),  # 402: the account is empty; it ends every request too
    404: ErrorKind.NO_MODEL,
    413: ErrorKind.TOO_LONG,
    429: ErrorKind.RATE_LIMITED,
    # Cloudflare says 52x where others say 502 to 504, and 529 is Anthropic's "overloaded".
    **dict.fromkeys((408, 502, 503, 504, *range(520, 525), 529), ErrorKind.OVERLOADED),
}

_TOO_LONG = re.compile(
    r"context.?(length|size|window|limit)|too long|too many (input )?tokens|maximum (prompt|input|model) length"
    r"|longer than the model|exceeds? the limit of|input length should be|request entity too large",
    re.IGNORECASE,
)

_REFUSED_NAME = (
    # "Unrecognized request argument supplied: top_k", "(parameter=max_tokens, value=5000)", "unknown field: x"
    re.compile(
        r"(?:supplied|parameters?|arguments?(?! supplied)|fields?|options?|keys?)"
        r"(?:\s*[:=]\s*|\s+)[{\[('\"`]*([a-z]\w*)",
        re.I,
    ),
    re.compile(r"['\"`]([a-z]\w*)['\"`]"),
    re.compile(r"^\W*([a-z]\w*) (?:must|should|cannot|can't|is not|is only|does not)\b"),
)


def _from_fields(fields: Mapping[str, Any]) -> Fault:
    code, kind, parameter = fields.get("code"), fields.get("type"), fields.get("param")
    metadata = fields.get("metadata")
    message = str(fields.get("message") or fields.get("detail") or "(no message)")
    if isinstance(metadata, dict) and isinstance(raw := metadata.get("raw"), str) and raw not in message:
        message = f"{message}: {raw}"  # OpenRouter: the words of the provider behind it
    return Fault(
        message=_brief(message),
        code=" ".join(str(part) for part in (code, kind) if part is not None),
        parameter=parameter if isinstance(parameter, str) and parameter else None,
        status=code if isinstance(code, int) and 400 <= code <= 599 else None,
        fields=fields,
    )


def _from_locations(problems: Sequence[Any]) -> Fault:
    """FastAPI's validation errors: `[{"loc": ["body", "top_k"], "msg": …}]`."""
    lines, parameter = [], None
    for problem in problems:
        if not isinstance(problem, dict):
            lines.append(str(problem))
            continue
        place = [str(part) for part in problem.get("loc", ()) if part != "body"]
        parameter = parameter or (place[0] if place else None)
        lines.append(f"{'.'.join(place)}: {problem.get('msg')}")
    return Fault(_brief("; ".join(lines)), parameter=parameter)


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 600 else f"{text[:600]} …"


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return max(0.0, number) if math.isfinite(number) else None
