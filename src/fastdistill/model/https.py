"""HTTP through aiohttp: for proxies."""

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

import aiohttp

from fastdistill.model.provider import ErrorKind, ProviderError
from fastdistill.model.transport import CONNECTS, Response, proxy, refused


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
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0, force_close=not self._keep, keepalive_timeout=self._keep or None
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECTS),
            )
        through = self._proxy(url)
        if through is not None and not through.startswith("http"):
            raise _refused(url, through, ValueError(f"a {urlsplit(through).scheme} proxy can't be used"))
        asked = self._session.request(method, url, data=body, headers=headers, proxy=through, allow_redirects=False)
        chunks = bytearray()
        try:
            async with asyncio.timeout(timeout), asked as response:
                async for chunk in response.content.iter_any():
                    chunks += chunk
                    if len(chunks) > self._max_body:
                        words = f"{url}: the answer is larger than {self._max_body} bytes"
                        raise ProviderError(ErrorKind.GARBLED, words)
        except _REFUSED as error:
            raise _refused(url, through, error) from error
        except TimeoutError as error:
            raise ProviderError(ErrorKind.TIMEOUT, f"{url}: no answer within {timeout:g} s") from error
        except aiohttp.ClientResponseError as error:
            raise ProviderError(ErrorKind.GARBLED, f"{url}: the answer is not HTTP ({error.message})") from error
        except ValueError as error:  # a header that was to be sent has a line end in it
            raise ProviderError(ErrorKind.BAD_REQUEST, f"{url}: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ProviderError(ErrorKind.RESET, f"{url}: the connection broke ({error})") from error
        lines = {name.lower(): value for name, value in response.headers.items()}
        return Response(response.status, lines, bytes(chunks))

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


# A connection that does not come about in time is nobody listening, though aiohttp has it as a timeout too.
_REFUSED = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.InvalidURL,
    aiohttp.ClientHttpProxyError,
)


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
