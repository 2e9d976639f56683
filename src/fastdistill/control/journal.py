"""What was put into a SQLite file and is not committed yet, in files of its own: there at once, so that it survives the
process being killed at any moment. Whoever opens the SQLite file next finds it.
"""

import fcntl
import zlib
from collections.abc import Iterator
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from secrets import token_hex
from struct import Struct
from typing import BinaryIO

SIZE = 2**18  # bytes of a journal, for all but larger entries

_HEAD = Struct("<II")  # bytes of an entry, and their CRC-32
_END = bytes(_HEAD.size)
_SUFFIX = ".journal"


class Journal:
    """A file beside `path` for entries, one after the other. It is this process's for as long as it lives.

    It has its size from the beginning, so that an entry is no more than a copy into memory which is the system's: that
    takes a tenth of a call of `write`, which would also let other threads go first.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, path: Path, size: int = SIZE) -> None:
        self._path = path.with_name(f"{path.name}-{token_hex(4)}{_SUFFIX}")
        draft = self._path.with_suffix(".tmp")  # until it is held, others would take it for one that was left behind
        self._file = draft.open("x+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            left = size
            while left:
                left -= self._file.write(bytes(left))
            self._memory = mmap(self._file.fileno(), size)
            draft.rename(self._path)
        except BaseException:
            self._file.close()
            draft.unlink(missing_ok=True)
            raise
        self._at = 0

    def append(self, entry: bytes) -> bool:
        """Whether there was room for it."""
        end = self._at + _HEAD.size + len(entry)
        if end + len(_END) > len(self._memory):
            return False
        self._memory[self._at : end + len(_END)] = _HEAD.pack(len(entry), zlib.crc32(entry)) + entry + _END
        self._at = end
        return True

    def clear(self) -> None:
        """What is in it is committed."""
        self._memory[: len(_END)] = _END
        self._at = 0

    def close(self, *, keep: bool) -> None:
        if not keep:
            self._path.unlink(missing_ok=True)
        self._memory.close()
        self._file.close()


def room_for(entry: bytes) -> int:
    """Bytes of a journal that an entry fits into."""
    return max(SIZE, _HEAD.size + len(entry) + len(_END))


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


def _entries(file: BinaryIO) -> Iterator[bytes]:
    """What is whole: the last entry may be cut off where the process was killed, or the power failed."""
    while len(head := file.read(_HEAD.size)) == _HEAD.size and head != _END:
        size, check = _HEAD.unpack(head)
        entry = file.read(size)
        if len(entry) < size or zlib.crc32(entry) != check:
            return
        yield entry
