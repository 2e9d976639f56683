"""Where runs live: the artifacts root with the shared response store, and one folder for each run."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdistill.control.ledger import read_samples
from fastdistill.core.errors import EnvironmentFault, InputError
from fastdistill.core.files import atomic
from fastdistill.core.types import Sample

ENDED = "sample_id != '' AND status IN ('open', 'failed')"  # samples that a run brought to an end


def artifacts_root(output_dir: Path | None = None) -> Path:
    """`--output-dir`, else FASTDISTILL_ARTIFACTS_DIR, else `./artifacts`."""
    return (output_dir or Path(os.environ.get("FASTDISTILL_ARTIFACTS_DIR") or "artifacts")).expanduser()


class RunFolder:
    """`<root>/runs/<run_id>/`; the names in it are part of the product's contract."""

    def __init__(self, root: Path, run_id: str, path: Path | None = None) -> None:
        self.root = root
        self.run_id = run_id
        self.path = path or root / "runs" / run_id
        self.responses = root / "responses.sqlite"
        self.config = self.path / "config.yaml"
        self.ledger = self.path / "ledger.sqlite"
        self.manifest = self.path / "manifest.json"
        self.quality_report = self.path / "quality_report.json"
        self.timing_report = self.path / "timing_report.json"
        self.report_html = self.path / "report.html"
        self.dist = self.path / "dist"
        self.dist_in_work = self.path / "dist.partial"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder and holds it against a second run.

        Raises:
            EnvironmentFault: another process runs in it, or it can't be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise EnvironmentFault(f"{error.filename}: {error.strerror}; choose another --output-dir") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                raise EnvironmentFault(
                    f"{self.path}: another run is at work here (process {lock.read().strip() or 'unknown'});"
                    " wait for it, stop it, or give this run its own --run-id"
                ) from error
            lock.truncate(0)
            with suppress(OSError):  # the disk is full: what comes next says so, and names its file
                os.write(lock.fileno(), f"{os.getpid()}\n".encode())
            yield

    def begin_dist(self) -> None:
        shutil.rmtree(self.dist_in_work, ignore_errors=True)
        self.dist_in_work.mkdir()

    def finish_dist(self) -> None:
        """Puts the new data set in the place of an earlier one."""
        shutil.rmtree(self.dist, ignore_errors=True)
        self.dist_in_work.rename(self.dist)

    def samples(self, where: str = "1", **parameters: str | int) -> Iterator[Sample]:
        """The samples of the ledger in input order, lazily; `where` is an SQL condition of ours on its `entries`.

        Raises InputError if there is no ledger.
        """
        if not self.ledger.exists():
            raise InputError(f"{self.ledger}: this run has no ledger yet")
        return read_samples(self.ledger, where, **parameters)

    @classmethod
    def all(cls, root: Path | None) -> list["RunFolder"]:
        """Every run under the root (None: the default one), the latest first."""
        root = artifacts_root(root)
        manifests = root.glob("runs/*/manifest.json")
        latest_first = sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True)
        return [cls(root, path.parent.name) for path in latest_first]

    @classmethod
    def find(cls, root: Path | None, run: str) -> "RunFolder":
        """The run under the root (None: the default one) whose id is `run`, or begins with it.

        Raises InputError if there is none, or more than one.
        """
        known = {folder.run_id: folder for folder in cls.all(root)}
        begun = [run_id for run_id in known if run_id.startswith(run)]
        if run in known or len(begun) == 1:
            return known[run if run in known else begun[0]]
        what = f"several runs begin with {run!r}" if begun else f"no run {run!r}"
        names = begun or [*known]
        there = ", ".join(names[:9] + ["…"] * (len(names) > 9)) or "none"
        raise InputError(f"{artifacts_root(root)}: {what}; there are: {there} (is --output-dir right?)")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False, default=asdict) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A report of ours. Raises InputError if it is not there or not JSON."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content
