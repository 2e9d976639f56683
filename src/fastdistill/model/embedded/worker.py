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
from pathlib import Path

import msgspec

from fastdistill.model.embedded.inference import Engine
from fastdistill.model.embedded.network import load_weights
from fastdistill.model.embedded.wire import Ready, Request

HERE = Path(__file__).parent


def main() -> None:
    # Ctrl-C reaches the whole process group; when to stop is for the one at the other end of the pipe to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = Engine(load_weights(Path(sys.argv[1]) if sys.argv[1:] else HERE))
    try:
        _write(Ready(engine.name, engine.context))
        _serve(engine)
    except BrokenPipeError:
        # Nobody reads any more. The reading thread may hold stdin, and an ordinary exit would abort over that.
        os._exit(0)


def _serve(engine: Engine) -> None:
    """Answers what comes in, until no more does and all is answered."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # A daemon, because a read from stdin can't be interrupted when stdout is closed first.
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    is_open = True
    while is_open or engine.busy:
        while is_open and not (engine.busy and lines.empty()):
            if line := lines.get():
                _accept(engine, line)
            else:
                is_open = False
        for result in engine.step():
            _write(result)


def _read(lines: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    lines.put(b"")


def _accept(engine: Engine, line: bytes) -> None:
    asked = msgspec.json.decode(line, type=Request | int)
    if isinstance(asked, int):
        engine.cancel(asked)
    elif refusal := engine.submit(asked):
        _write(refusal)


def _write(message: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
