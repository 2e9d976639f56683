"""The embedded teacher as a process: requests on stdin, results on stdout, as `wire` says.

    python -m fastdistill.model.embedded.worker [FOLDER]

When stdin closes, the worker finishes what it has and exits; when stdout closes, it exits at once.
"""

import os

# Two BLAS threads are slower than one at this size; numpy reads these when it is first imported.
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import queue
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from fastdistill.model.embedded.inference import ContextLengthError, Engine
from fastdistill.model.embedded.network import load_weights
from fastdistill.model.embedded.wire import Asked, Cancelled, Ready, Result

HERE = Path(__file__).parent


def main() -> None:
    """Serve until stdin closes."""
    # Ctrl-C reaches the whole process group; when to stop is for the one at the other end of the pipe to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    weights = load_weights(Path(sys.argv[1]) if sys.argv[1:] else HERE)
    try:
        _write(sys.stdout.buffer, Ready(f"embedded-{weights.sha256[:12]}", weights.architecture.context))
        serve(Engine(weights), sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        # Nobody reads any more. The reading thread may hold stdin, and an ordinary exit would abort over that.
        os._exit(0)


def serve(engine: Engine, source: BinaryIO, sink: BinaryIO) -> None:
    """Answer the requests from `source` on `sink` until `source` ends and all are answered.

    Raises BrokenPipeError if the other side of `sink` is gone.
    """
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    # A daemon, because a read from stdin can't be interrupted when stdout is closed first.
    threading.Thread(target=_read, args=(source, lines), daemon=True).start()
    is_open = True
    while is_open or engine.busy:
        for line in _arrived(lines, wait=is_open and not engine.busy):
            if line is None:
                is_open = False
            elif (refusal := _accept(engine, line)) is not None:
                _write(sink, refusal)
        for result in engine.step():
            _write(sink, result)


def _read(source: BinaryIO, lines: queue.SimpleQueue[bytes | None]) -> None:
    for line in source:
        lines.put(line)
    lines.put(None)


def _arrived(lines: queue.SimpleQueue[bytes | None], *, wait: bool) -> Iterator[bytes | None]:
    """The lines that have come in; at least one if told to wait."""
    if wait:
        yield lines.get()
    while not lines.empty():
        yield lines.get()


def _accept(engine: Engine, line: bytes) -> Result | None:
    """Hand a line to the engine; the error to answer with if that fails."""
    fields: dict[str, Any] = {}
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
        if "cancel" in fields:
            engine.cancel(msgspec.convert(fields, Cancelled).cancel)
        else:
            request = msgspec.convert(fields, Asked)
            engine.submit(request.id, request)
    except ContextLengthError as error:
        return Result(request.id, error=str(error), code="context_length_exceeded")
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return Result(fields.get("id"), error=str(error), code="invalid_request")
    return None


def _write(sink: BinaryIO, message: msgspec.Struct) -> None:
    sink.write(msgspec.json.encode(message) + b"\n")
    sink.flush()


if __name__ == "__main__":
    main()
