"""HTTP through aiohttp: for proxies."""

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from fastdistill.model.provider import ErrorKind, ProviderError
from fastdistill.model.transport import CONNECTS, RESENDS, Response, StaleConnection, proxy, refused


class AiohttpTransport:
    """Implements `Transport`. Belongs to one event loop."""

    def __init__(self, *, max_body: int, keep: float) -> None:
        self._max_body = max_body
        self._keep = keep
        self._session: aiohttp.ClientSession | None = None
        self._proxy = lru_cache(proxy)  # aiohttp's `trust_env` looks it up in a thread for every request

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None, timeout: float
    ) -> Response:
        if self._session is None:
            self._session = _session(keep=self._keep)
        through = self._proxy(url)
        if through is not None and not through.startswith("http"):
            raise _refused(url, through, ValueError(f"a {urlsplit(through).scheme} proxy can't be used"))
        try:
            async with asyncio.timeout(timeout):
                try:
                    return await self._send(self._session, method, url, headers, body)
                except StaleConnection as stale:
                    if not RESENDS.get()():
                        raise ConnectionResetError("closed by the server") from stale
                    # The pool may hold more of the same, so this goes over a connection opened for it.
                    async with _session(keep=0) as fresh:
                        return await self._send(fresh, method, url, headers, body)
        # A connection that does not come about in time is nobody listening, though aiohttp has it as a timeout too.
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise _refused(url, through, error) from error
        except aiohttp.ClientHttpProxyError as error:
            raise _refused(url, through, error) from error
        except TimeoutError as error:
            raise ProviderError(ErrorKind.TIMEOUT, f"{url}: no answer within {timeout:g} s") from error
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
        sent: Any = {"data": body, "headers": headers, "proxy": self._proxy(url), "trace_request_ctx": connection}
        try:
            opened = await session.request(method, url, allow_redirects=False, **sent)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            begun = isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.args[0], str)
            if connection.reused and not begun:
                raise StaleConnection from error
            raise
        chunks = bytearray()
        async with opened as response:
            async for chunk in response.content.iter_any():
                chunks += chunk
                if len(chunks) > self._max_body:
                    words = f"{url}: the answer is larger than {self._max_body} bytes"
                    raise ProviderError(ErrorKind.GARBLED, words)
        lines = {name.lower(): value for name, value in response.headers.items()}
        return Response(response.status, lines, bytes(chunks))


def _refused(url: str, through: str | None, error: Exception) -> ProviderError:
    """No connection came about, by `through` if that is a proxy."""
    variable = f"{urlsplit(url).scheme.upper()}_PROXY"
    remedy = None if through is None else f"correct {variable}, or name the host in NO_PROXY"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        if error.status == 407:
            remedy = f"give its user and password in {variable}, as http://user:password@host:port"
        why = f"the proxy refuses ({error.status} {error.message})"  # in aiohttp's own words is its password
        return ProviderError(ErrorKind.REFUSED, f"{url}: {why}", remedy=remedy)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        error = error.certificate_error
    return refused(url, error, remedy)


def _session(*, keep: float) -> aiohttp.ClientSession:
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_mark_reused)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=not keep, keepalive_timeout=keep or None),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECTS),
        trace_configs=[trace],
    )


async def _mark_reused(session: aiohttp.ClientSession, context: SimpleNamespace, parameters: object) -> None:
    context.trace_request_ctx.reused = True
