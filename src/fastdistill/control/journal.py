"""What was put into a SQLite file and is not committed yet, in a file of its own: written at once, so that it survives
the process being killed at any moment. Whoever opens the SQLite file next finds it there.
"""

import fcntl
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from struct import Struct
from typing import BinaryIO

_HEAD = Struct("<II")  # bytes of an entry, and their CRC-32


class Journal:
    """Entries, one after the other, in a new file beside `path`. It is this process's for as long as it lives."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}-{token_hex(4)}{_SUFFIX}")
        draft = self._path.with_suffix(".tmp")  # until it is held, others would take it for one that was left behind
        self._file = draft.open("xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        draft.rename(self._path)
        self.size = 0  # bytes

    def append(self, entry: bytes) -> None:
        """Returns once the system has it.

        Raises:
            OSError: the disk is full; nothing of the entry is there.
        """
        whole = _HEAD.pack(len(entry), zlib.crc32(entry)) + entry
        try:
            written = self._file.write(whole)
            while written < len(whole):
                written += self._file.write(whole[written:])
        except OSError:
            self._cut(self.size)
            raise
        self.size += len(whole)

    def clear(self) -> None:
        if self.size:
            self._cut(0)

    def close(self, *, keep: bool) -> None:
        if not keep:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _cut(self, size: int) -> None:
        self._file.truncate(size)
        self._file.seek(size)
        self.size = size


def left_behind(path: Path) -> Iterator[Iterator[bytes]]:
    """The entries of each journal beside `path` whose process is gone. When the next is asked for, it is removed."""
    for journal in sorted(path.parent.glob(f"{path.name}-*{_SUFFIX}")):
        with suppress(FileNotFoundError), journal.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield _entries(file)
            journal.unlink(missing_ok=True)


_SUFFIX = ".journal"


def _entries(file: BinaryIO) -> Iterator[bytes]:
    """What is whole: the last entry may be cut off where the process was killed, or the power failed."""
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        size, check = _HEAD.unpack(head)
        entry = file.read(size)
        if len(entry) < size or zlib.crc32(entry) != check:
            return
        yield entry
