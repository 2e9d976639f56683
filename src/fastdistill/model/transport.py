"""HTTP to a model endpoint, and what every provider reads alike: error bodies, status codes, Retry-After, thinking.

It does not retry, but for a connection that had died in the pool.
"""

import math
import os
import re
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address, ip_network
from typing import Any, Generic, Protocol, Self, TypeAlias, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import msgspec
from msgspec.structs import replace
from pydantic import SecretStr

from fastdistill.core.canonical import with_characters
from fastdistill.core.types import Completion, FinishReason, TokenLogprob, Usage
from fastdistill.model.provider import ErrorKind, Provider, ProviderError, ServedConfig

IDLE = 4.0
"""Seconds; uvicorn, under vLLM and SGLang, closes an idle connection after 5, and going first avoids the race."""
CONNECTS = 30.0
"""Seconds for a connection to come about."""
MOST_TOKENS = 10**8
"""Of one answer; no context is nearly as long."""


class Response(msgspec.Struct, frozen=True):
    """A whole answer. Names in `headers` are in lower case; `body` is decompressed."""

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


RESENDS: ContextVar[Callable[[], bool]] = ContextVar("resends", default=lambda: True)
"""Asked before a request goes out a second time, for whoever counts and limits what is sent."""


class StaleConnection(Exception):
    """A kept connection was gone before a byte of the answer: the server had closed it between two requests."""


def transport_for(url: str, *, max_body: int = 64 * 2**20, keep: float = IDLE) -> Transport:
    """The cheapest transport that can reach a URL. Connections have no limit: the client above limits requests.

    Args:
        max_body: bytes of an answer, decompressed, beyond which it is not read on.
        keep: seconds for which an idle connection waits to be used again; 0: none is. One that turns out to be dead
            by then has its request sent again, once; through a proxy that is a RESET.
    """
    if proxy(url) is None:
        from fastdistill.model.http1 import Http1Transport

        return Http1Transport(max_body=max_body, keep=keep)
    from fastdistill.model.https import AiohttpTransport  # which takes a quarter of a second to import

    return AiohttpTransport(max_body=max_body, keep=keep)


def refused(url: str, error: Exception, remedy: str | None = None) -> ProviderError:
    """No connection came about. `remedy` is for what starting the server would not help with."""
    why = f"nobody answers ({error})"
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"its certificate is not trusted ({error.verify_message.rstrip('.')})"
        remedy = "have it renewed, or correct `base_url`"
        if error.verify_code in _UNKNOWN_SIGNERS:
            now = os.environ.get("SSL_CERT_FILE", "not set")
            remedy = f"set SSL_CERT_FILE to a PEM file with the certificate of the CA that signed it (now {now})"
    elif isinstance(error, ssl.SSLError):
        remedy = "correct `base_url`: http:// where the server has no TLS"
    return ProviderError(ErrorKind.REFUSED, f"{url}: {why}", remedy=remedy)


_UNKNOWN_SIGNERS = range(18, 22)  # OpenSSL's codes: self-signed, or by nobody who is known here


def proxy(url: str) -> str | None:
    """The proxy for a URL, from the environment (`HTTPS_PROXY`, `NO_PROXY` ...), where blocks may be named too."""
    parts, proxies = urlsplit(url), getproxies()
    if proxy_bypass(parts.netloc) or _within(parts.hostname or "", proxies.get("no", "").split(",")):
        return None
    found = proxies.get(parts.scheme)
    return found if found is None or "://" in found else f"http://{found}"


def _within(host: str, blocks: Iterable[str]) -> bool:
    """Whether a host is an address of one of the blocks, like `10.0.0.0/8`, as curl and Go have them in `NO_PROXY`."""
    for block in blocks:
        with suppress(ValueError):
            if ip_address(host) in ip_network(block.strip(), strict=False):
                return True
    return False


C = TypeVar("C", bound=ServedConfig)
T = TypeVar("T")


class HttpProvider(Provider, Generic[C]):
    """What the providers over HTTP share: sending a request, and errors that say where and what to do."""

    _remedy: str  # what to do when nobody answers
    _crowded = ""  # why else a request may have run out of time
    _expected: str  # what an answer should be
    _doubt = ""  # said of every answer that is something else

    def __init__(self, config: C, transport: Transport | None = None, headers: Mapping[str, SecretStr] = {}) -> None:
        self._config = config
        self._transport = transport or transport_for(config.url)
        self._headers = {"Content-Type": "application/json"}
        if config.api_key is not None:
            self._headers["Authorization"] = f"Bearer {config.api_key.get_secret_value()}"
        self._headers |= {name: value.get_secret_value() for name, value in headers.items()}
        sent = [value.removeprefix("Bearer ") for name, value in self._headers.items() if name != "Content-Type"]
        self._secrets = [secret.encode() for secret in sent if len(secret) >= 6]
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
        content_type: str | None = None,
        timeout: float | None = None,
    ) -> Response:
        """The answer, whatever its status, without the secrets that were sent: some servers repeat a wrong key."""
        headers = self._headers if content_type is None else {**self._headers, "Content-Type": content_type}
        timeout = timeout or self._config.timeout
        try:
            response = await self._transport.request(method, url, headers=headers, body=body, timeout=timeout)
        except ProviderError as error:
            remedies = {
                ErrorKind.REFUSED: f"; {error.remedy or self._remedy}",
                ErrorKind.TIMEOUT: f"; raise `timeout`, or lower `max_concurrency`{self._crowded}",
            }
            message = f"{self._config.provider}: {error}{remedies.get(error.kind, '')}"
            raise ProviderError(error.kind, message) from error
        for secret in self._secrets:
            if secret in response.body:
                response = replace(response, body=response.body.replace(secret, b"(secret)"))
        return response

    def _decode(self, response: Response, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(response.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            with suppress(ValueError, RecursionError):  # msgspec's are, and Unicode's
                return decode(with_characters(response.body))
            raise self._garbled(str(error), response) from error

    def _garbled(self, why: str, response: Response) -> ProviderError:
        text = response.body[:200].decode(errors="replace").strip()
        hint = self._doubt or ("; correct `base_url`" if text.startswith("<") else "")
        message = f"{self._where}: not {self._expected} ({why}): {text!r}{hint}"
        return ProviderError(ErrorKind.GARBLED, message)

    def _failed(
        self, kind: ErrorKind, status: int, message: str, response: Response, parameter: str | None = None
    ) -> ProviderError:
        if 300 <= status < 400:
            message = f"redirected to {response.headers.get('location')}; set `base_url` to where it leads"
        wait, message = retry_after(response.headers, datetime.now(UTC)), f"{self._where}: {status}: {message}"
        message += _GATEWAYS_REMEDIES.get(status, "")
        return ProviderError(kind, message, retry_after=wait, parameter=parameter)


class Version(msgspec.Struct):
    version: str


class Token(msgspec.Struct, gc=False):
    """A token and its log-probability: OpenAI's form, which is Ollama's too."""

    token: str  # `token_id:17` where ids were asked for
    logprob: float
    top_logprobs: "list[Token] | None" = None
    bytes: msgspec.Raw = msgspec.Raw(b"null")  # a list of numbers, or null: read where it is needed
    id: int | None = None  # llama.cpp

    def scored(self) -> TokenLogprob:
        tops = sorted(self.top_logprobs or (), key=lambda top: -top.logprob)  # vLLM puts the sampled token first
        ids = [number for top in tops if (number := top.number) is not None]
        pairs = tuple([(top.text, round(top.logprob, 5)) for top in tops])
        top_ids = tuple(ids) if len(ids) == len(tops) else ()
        return TokenLogprob(self.text, round(self.logprob, 5), pairs, self.number, top_ids)

    @property
    def number(self) -> int | None:
        digits = self.token.removeprefix("token_id:")
        return self.id if digits == self.token or not digits.isdecimal() else int(digits)

    @property
    def text(self) -> str:
        if self.token.startswith("token_id:"):
            with suppress(ValueError):  # null, or what some gateway takes for bytes
                return bytes(_bytes(self.bytes)).decode(errors="replace")
        return self.token


_bytes = msgspec.json.Decoder(list[int]).decode


@dataclass(frozen=True, slots=True)
class Fault:
    """What an error body says, whichever of the shapes in use it has."""

    message: str
    code: str = ""  # `code` and `type` as the server has them, joined by a space
    parameter: str | None = None
    status: int | None = None  # a numeric `code`, for errors that come under 200

    @classmethod
    def read(cls, body: bytes) -> "Fault":
        """Reads five shapes: `{"error": {…}}`, `{"error": str}`, `{"detail": str}`, `{"detail": [{loc, msg}]}`, text.

        Also a bare `{"message": …}` (older vLLM and SGLang) and a list of one error (Google).
        """
        try:
            value = msgspec.json.decode(body)
        except (ValueError, RecursionError):  # of msgspec, and of what is not UTF-8
            text = body[:8192].decode(errors="replace")  # a gateway's pages are HTML
            return cls(_brief(_MARKUP.sub(" ", text) if text.lstrip().startswith("<") else text) or "(empty body)")
        if isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, dict):
            return cls(_brief(str(value)))
        detail = value.get("error") or value.get("detail") or value.get("message")
        if isinstance(detail, list):
            return _from_locations(detail)
        if isinstance(detail, str):
            return _from_fields({**value, "message": detail})
        return _from_fields(detail if isinstance(detail, dict) else {"message": body.decode(errors="replace")})

    @property
    def says_too_long(self) -> bool:
        """Whether it is about the context window, by its code or its words."""
        return _TOO_LONG.search(f"{self.code} {self.message}") is not None

    def refused_names(self) -> list[str]:
        """Names that it may be about, most certain first: they are to be looked up among those that were sent."""
        named = [] if self.parameter is None else [self.parameter]
        return named + [match for pattern in _REFUSED_NAME for match in pattern.findall(self.message)]


def error_kind(status: int) -> ErrorKind:
    """What a status means where the body says nothing more exact."""
    return _KINDS.get(status, ErrorKind.SERVER if status >= 500 else ErrorKind.BAD_REQUEST)


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds to wait, from `retry-after-ms` (OpenAI's) or `Retry-After` (seconds or a date, RFC 9110, 10.2.3)."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if (seconds := _number(text)) is not None:
        return seconds
    try:
        moment = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError):
        return None
    return max(0.0, ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now).total_seconds())


def completion(
    text: str, thinking: str | None, tokens: Iterable[Token] | None, *, finish: str | None, **more: Any
) -> Completion:
    """The completion of what a server said. Thinking within the text is taken out where there is none beside it."""
    reason = _FINISH.get(finish, FinishReason.OTHER)
    if thinking is None:
        thinking, text = split_thinking(text, reason)
    logprobs = None if tokens is None else tuple(map(Token.scored, tokens))
    return Completion(text=text, finish_reason=reason, thinking=thinking, logprobs=logprobs, **more)


_FINISH: Mapping[str | None, FinishReason] = {
    **{str(reason): reason for reason in FinishReason},
    "eos": FinishReason.STOP,
}


Count: TypeAlias = int | float | None
"""Tokens, as a server says: some gateways write every number as 2.0."""


def usage_of(prompt: Count, completion: Count, cached: Count = None, reasoning: Count = None) -> Usage:
    """What an answer took. Nothing where that can't be: it counts as an answer that came without usage."""
    read, written = _whole(prompt), _whole(completion)
    if read is None or written is None:
        return Usage()
    if not cached and not reasoning:
        return Usage(read, written)
    return Usage(read, written, min(_whole(cached) or 0, read), _whole(reasoning) or 0)


def _whole(count: Count) -> int | None:
    if not count:
        return 0
    return int(count) if 0 < count <= MOST_TOKENS and count % 1 == 0 else None


def split_thinking(content: str, finish: FinishReason) -> tuple[str | None, str]:
    """Takes a leading `<think>…</think>` off an answer, with the line ends behind it that chat templates put there; the
    rest stays as it is, character for character.

    A block that `max_tokens` cut is all thinking; one that was never closed otherwise is left in the answer. One that
    the chat template opens, as DeepSeek-R1's and Qwen's do, has only its end, which ends a line.
    """
    opened = content.lstrip()
    if not opened.startswith("<think>"):
        end = _THOUGHT.search(content)
        if end is None or "<think>" in content[: end.start()]:
            return None, content
        return content[: end.start()].strip(), content[end.end() :].lstrip("\r\n")
    thinking, closed, rest = opened.removeprefix("<think>").partition("</think>")
    if closed:
        return thinking.strip(), rest.lstrip("\r\n")
    return (thinking.strip(), "") if finish is FinishReason.LENGTH else (None, content)


_KINDS = {
    # What ends every request: 402 is an empty account, 407 a proxy's, 3xx another address or a log-in.
    **dict.fromkeys((*range(300, 400), 401, 402, 403, 407), ErrorKind.AUTH),
    404: ErrorKind.NO_MODEL,
    413: ErrorKind.TOO_LONG,
    429: ErrorKind.RATE_LIMITED,
    # Cloudflare says 52x where others say 502 to 504, and 529 is Anthropic's "overloaded".
    **dict.fromkeys((408, 502, 503, *range(520, 524), 529), ErrorKind.OVERLOADED),
    **dict.fromkeys((504, 524), ErrorKind.TIMEOUT),  # the model has worked on it, and may charge for it
}

_TOO_LATE = "; a gateway waited no longer: raise its limit (nginx: `proxy_read_timeout`), or lower `max_tokens`"
_GATEWAYS_REMEDIES = {
    407: "; give the proxy's user and password in HTTP_PROXY, as http://user:password@host:port",
    413: "; shorten the prompt, or raise the gateway's limit (nginx: `client_max_body_size`)",
    504: _TOO_LATE,
    524: _TOO_LATE,
}

_THOUGHT = re.compile(r"</think>(?=[ \t]*(?:\n|\Z))")

_MARKUP = re.compile(r"<(head|style|script)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.IGNORECASE | re.DOTALL)

_TOO_LONG = re.compile(
    r"context.?(length|size|window|limit)|too long|too many (input )?tokens|maximum (prompt|input|model) length"
    r"|longer than the model|exceeds? the (configured )?limit of|input length should be|request entity too large",
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
    )


def _from_locations(problems: Sequence[Any]) -> Fault:
    """FastAPI's validation errors: `[{"loc": ["body", "top_k"], "msg": …}]`."""
    lines, parameter = [], None
    for problem in problems:
        if not isinstance(problem, dict):
            lines.append(str(problem))
            continue
        parts = problem.get("loc")
        place = [str(part) for part in parts if part != "body"] if isinstance(parts, list) else []
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
