"""The embedded teacher as a process: requests on stdin, results on stdout, one JSON object a line.

    python -m fastdistill.model.embedded.worker [--model FOLDER] [--slots 32]

The first line it writes says that it is ready, and what it serves:

    {"ready": true, "model": "embedded-<first 12 digits of the weights' sha256>", "context": 512, "slots": 32}

A request, of which `id` and `messages` are required and the rest default to the values shown:

    {"id": any JSON string or number, "messages": [{"role": "user", "content": "..."}], "n": 1, "temperature": 1.0,
     "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": null, "max_tokens": 128, "stop": [], "logprobs": false,
     "top_logprobs": 0}

Its result, in the order of completion:

    {"id": ..., "choices": [{"text": "...", "finish_reason": "stop" | "length", "tokens": 17,
      "logprobs": [{"token": "...", "logprob": -0.1, "top": [["...", -0.1], ...]}, ...] | null}, ...],
     "prompt_tokens": 103}

`tokens` counts every token computed, the end token and what a stop text cut off among them; `logprobs` has an entry for
each of these. Log-probabilities are the model's own, before temperature. Choice i under seed s equals choice 0 under
seed s + i, whatever else is running. A request that can't be served is answered with

    {"id": ... | null, "error": "...", "code": "context_length_exceeded" | "invalid_request"}

`{"cancel": id}` forgets a request, which then gets no result if it had none yet. When stdin closes, the worker
finishes what it has and exits; when stdout closes, it exits at once.
"""

from __future__ import annotations

import os

# Two BLAS threads are slower than one at this size; numpy reads these when it is first imported.
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import json
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from fastdistill.model.embedded.inference import Completion, ContextLengthError, Engine, Request, Sampling
from fastdistill.model.embedded.network import load_weights

HERE = Path(__file__).parent

_TYPES: dict[str, tuple[type, ...]] = {
    "messages": (list,), "n": (int,), "temperature": (int, float), "top_p": (int, float), "top_k": (int,),
    "min_p": (int, float), "seed": (int, type(None)), "max_tokens": (int,), "stop": (list,), "logprobs": (bool,),
    "top_logprobs": (int,),
}  # fmt: skip
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")


def main() -> None:
    """Serve until stdin closes."""
    parser = argparse.ArgumentParser(description="Serve the embedded teacher over stdin and stdout.")
    parser.add_argument("--model", type=Path, default=HERE, help="folder with weights.npz and model.json")
    parser.add_argument("--slots", type=int, default=32, help="choices that run at a time")
    arguments = parser.parse_args()
    # Ctrl-C reaches the whole process group; when to stop is for the one at the other end of the pipe to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    weights = load_weights(arguments.model)
    ready = {"ready": True, "model": f"embedded-{weights.sha256[:12]}", "context": weights.architecture.context,
             "slots": arguments.slots}  # fmt: skip
    try:
        _write(sys.stdout.buffer, ready)
        serve(Engine(weights, arguments.slots), sys.stdin.buffer, sys.stdout.buffer)
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
        for key, completion in engine.step():
            _write(sink, _result(key, completion))


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


def _accept(engine: Engine, line: bytes) -> dict[str, Any] | None:
    """Hand a line to the engine; the error to answer with if that fails."""
    key = None
    try:
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("a request is a JSON object")
        if "cancel" in message:
            engine.cancel(_key(message["cancel"]))
            return None
        key = _key(message.pop("id", None))
        engine.submit(key, _request(message))
    except ContextLengthError as error:
        return {"id": key, "error": str(error), "code": "context_length_exceeded"}
    except ValueError as error:
        return {"id": key, "error": str(error), "code": "invalid_request"}
    return None


def _key(value: object) -> str | int | float:
    if not isinstance(value, str | int | float):
        raise ValueError("id must be a string or a number")
    return value


def _request(fields: dict[str, Any]) -> Request:
    """Read a request. Raises ValueError, naming the field, if one is unknown or of the wrong type."""
    if "messages" not in fields:
        raise ValueError("messages is missing")
    for name, value in fields.items():
        if name not in _TYPES:
            raise ValueError(f"{name} is not a field of a request")
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and bool not in _TYPES[name]):
            raise ValueError(f"{name} has the wrong type: {value!r}")
    for message in fields["messages"]:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"a message has a role and a content, both text: {message!r}")
    stop = fields.pop("stop", [])
    if not all(isinstance(text, str) for text in stop):
        raise ValueError(f"stop is a list of texts: {stop!r}")
    sampling = Sampling(**{name: fields.pop(name) for name in _SAMPLING if name in fields})
    return Request(**fields, sampling=sampling, stop=tuple(stop))


def _result(key: object, completion: Completion) -> dict[str, Any]:
    return {"id": key, **asdict(completion)}


def _write(sink: BinaryIO, message: dict[str, Any]) -> None:
    sink.write(json.dumps(message).encode() + b"\n")
    sink.flush()


if __name__ == "__main__":
    main()
