"""What stands between a client and a model: TLS with a company's own CA, forward proxies, gateways with HTML pages."""

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastdistill.model.provider import ProviderError
from fastdistill.model.providers.openai import OpenAIConfig, OpenAIProvider
from fastdistill.model.transport import proxy
from tests.model.test_openai_provider import error
from tests.model.test_transport import raw_server
from tests.servers import OpenAIServer, garbled, openai_server


@contextmanager
def https_server(folder: Path, *, names: str = "IP:127.0.0.1", days: int = 2) -> Iterator[OpenAIServer]:
    """A teacher over HTTPS, whose certificate is its own CA and lies at `folder/ca.pem`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = folder / "key.pem", folder / "ca.pem"
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days {days} -subj /CN=teacher"
    files = ["-keyout", str(key), "-out", str(certificate), "-addext", f"subjectAltName={names}"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with openai_server(tls=context) as server:
        yield server


def doctor(folder: Path, url: str, trusted: Path) -> str:
    """What `fastdistill doctor` says of a teacher there, in a process that trusts what is in a file."""
    config = folder / "pipeline.json"
    teacher = {"provider": "openai", "model": "teacher", "base_url": url}
    steps: list[object] = [{"LoadJsonl": {"rows": [{"q": "hi"}]}}, {"CanonicalizeFields": {"fields": ["q"]}}]
    steps += [{"TextGeneration": {"template": "{{ q }}"}}, "ExportSFT"]
    config.write_text(json.dumps({"name": "tls", "models": {"teacher": teacher}, "steps": steps}))
    command = [sys.executable, "-m", "fastdistill.control.cli", "doctor", "--config", str(config)]
    environment = {**os.environ, "SSL_CERT_FILE": str(trusted)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    return " ".join((done.stdout + done.stderr).split())


def probe(url: str) -> ProviderError:
    async def go() -> None:
        async with OpenAIProvider(OpenAIConfig(model="teacher", base_url=url)) as provider:
            await provider.probe()

    with pytest.raises(ProviderError) as caught:
        asyncio.run(go())
    return caught.value


def test_a_certificate_of_ones_own_ca_is_trusted_where_the_environment_names_it(tmp_path: Path) -> None:
    with https_server(tmp_path) as server:
        assert "teacher: ready" in doctor(tmp_path, server.url, tmp_path / "ca.pem")
        said = doctor(tmp_path, server.url, tmp_path / "nothing.pem")
    assert "its certificate is not trusted (self-signed certificate); set SSL_CERT_FILE to a PEM file" in said
    assert "nothing.pem)" in said
    assert "Traceback" not in said


def test_a_certificate_for_another_name_is_said_to_be_one(tmp_path: Path) -> None:
    with https_server(tmp_path, names="DNS:llm.example.com") as server:
        said = doctor(tmp_path, server.url, tmp_path / "ca.pem")
    assert "certificate is not valid for '127.0.0.1'); have it renewed, or correct `base_url`" in said


def test_a_proxy_that_wants_a_password_is_given_one_that_no_message_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    with raw_server(*[[asks]] * 6) as (url, _):
        monkeypatch.setenv("https_proxy", url.replace("//", "//alice:secret@"))
        monkeypatch.setenv("no_proxy", "")
        said = str(probe("https://teacher.invalid"))
    assert "the proxy refuses (407 Proxy Authentication Required); give its user and password in HTTPS_PROXY" in said
    assert "secret" not in said


def test_a_proxy_that_can_not_be_used_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    for url in ("socks5://127.0.0.1:9", "http://127.0.0.1:9"):
        monkeypatch.setenv("https_proxy", url)
        assert str(probe("https://teacher.invalid")).endswith("; correct HTTPS_PROXY, or name the host in NO_PROXY")


def test_no_proxy_may_name_blocks_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8, ::1,.example.com")
    assert [proxy(f"http://{host}/v1") for host in ("10.1.2.3:8000", "[::1]:8000", "llm.example.com")] == [None] * 3
    assert proxy("http://11.1.2.3:8000/v1") == proxy("http://llm.example.org/v1") == "http://proxy:3128"


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (407, "407: Sorry; give the proxy's user and password in HTTP_PROXY"),
        (413, "413: Sorry; shorten the prompt, or raise the gateway's limit (nginx: `client_max_body_size`)"),
        (504, "504: Sorry; a gateway waited no longer: raise its limit (nginx: `proxy_read_timeout`)"),
    ],
)
def test_a_gateways_page_is_told_by_its_words_and_its_remedy(status: int, says: str) -> None:
    page = garbled(b"<html><head><title>x</title></head><body>Sorry</body></html>", code=status)
    with openai_server(faults={1: page}) as server:
        assert says in str(error(server))
