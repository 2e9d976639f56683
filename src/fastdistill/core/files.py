"""Files that are whole or absent. Knows no format: what is written, and when, is the caller's."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, overload

from fastdistill.core.errors import EnvironmentFault

_MACHINE_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EFBIG,
}  # fmt: skip


@overload
def atomic(path: Path, mode: Literal["wb"]) -> AbstractContextManager[BinaryIO]: ...
@overload
def atomic(path: Path, mode: Literal["w"] = "w") -> AbstractContextManager[TextIO]: ...
@contextmanager
def atomic(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[Any]:
    """A file to write that appears under `path` when the block ends well, and not at all otherwise.

    It is written next to `path` under a hidden name, synced to the disk and renamed; folders are made as needed.
    Text is UTF-8 with `\\n` at line ends. A file that was there before stays until it is replaced.

    Raises:
        EnvironmentFault: the disk is full, read-only or broken, or permission is missing.
    """
    # One fixed name, so that what a killed run leaves behind is overwritten by the next one.
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") if mode == "wb" else draft.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # synced too, so that the rename itself survives a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _MACHINE_FAULTS:
            raise EnvironmentFault(
                f"writing {path.absolute()}: {error.strerror}; free space or choose a folder that can be written"
            ) from error
        raise


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
