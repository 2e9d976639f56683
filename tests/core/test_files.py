import errno
import hashlib
from pathlib import Path

import pytest

from fastdistill.core.errors import EnvironmentFault
from fastdistill.core.files import atomic, sha256_file


def test_a_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "t.txt"
    with atomic(path) as file:
        file.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == "é\n".encode()
    assert [each.name for each in path.parent.iterdir()] == ["t.txt"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), GeneratorExit()])
def test_a_block_that_breaks_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(b"before")
    with pytest.raises(type(error)), atomic(path, "wb") as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["t.bin"]


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".t.bin.tmp").write_bytes(b"left by another, and longer")
    with atomic(tmp_path / "t.bin", "wb") as file:
        file.write(b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("t.bin", b"new")]


def test_a_full_disk_is_the_machines_fault_and_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=f"{tmp_path}/t.bin: No space left"), atomic(tmp_path / "t.bin", "wb"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_the_system_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), atomic(tmp_path / "t.bin", "wb"):
        raise ConnectionError(errno.ECONNRESET, "reset")


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    content = b"x" * 3_000_000
    (tmp_path / "t.bin").write_bytes(content)
    assert sha256_file(tmp_path / "t.bin") == hashlib.sha256(content).hexdigest()
