"""A real llama.cpp server on the embedded teacher's weights, in a process of its own.

`python -m tests.llamacpp MODEL.gguf PORT SLOTS` serves until its standard input closes.
"""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.servers import free_port


@contextmanager
def llamacpp_server(model: Path, *, slots: int = 4) -> Iterator[str]:
    """The server's base URL, once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "tests.llamacpp", str(model), str(port), str(slots)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                    if answer.status == 200:
                        break
                time.sleep(0.05)
            else:
                raise TimeoutError("llama.cpp did not come up in 30 s")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def main() -> None:
    import xllamacpp

    model, port, slots = sys.argv[1:]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_parallel = int(slots)
    parameters.n_ctx = 512 * int(slots)
    parameters.cpuparams.n_threads = 1
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = int(port)
    parameters.endpoint_metrics = True
    server = xllamacpp.Server(parameters)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main()
