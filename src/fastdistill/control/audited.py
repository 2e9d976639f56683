"""What runs know of the audits of their gates: one file each under the artifacts root, named by the fingerprint."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from fastdistill.control.folder import RunFolder, read_json
from fastdistill.core.files import sha256_file
from fastdistill.core.step import Gate, Step


def audit_file(root: Path, gate: Gate) -> Path:
    return root / "audits" / f"{gate.fingerprint}.json"


def is_audited(step: Step) -> TypeGuard[Gate]:
    """Whether an audit measures it: a gate that only judges an answer, by itself, without a model or another gate."""
    return isinstance(step, Gate) and not (step.rewrites or step.models() or step.gates())


def audit_command(folder: RunFolder) -> str:
    """What to type to have a run's gates audited."""
    words = ["fastdistill", "audit", "--config", str(folder.config), "--output-dir", str(folder.root)]
    return shlex.join(words)


def audits_of(root: Path, steps: Sequence[Step]) -> dict[str, dict[str, Any] | None]:
    """The audited rates of each gate by its name; None where it was not audited as it is now, by the same files."""
    found: dict[str, dict[str, Any] | None] = {}
    for gate in steps:
        if is_audited(gate):
            found[gate.name] = None
            if (path := audit_file(root, gate)).exists():
                report = read_json(path)
                known = {entry["path"]: entry["sha256"] for entry in report["inputs"]}
                measured = report["rates"]["false_reject_rate"]["total"] > 0
                same = files_of(gate).items() <= known.items()
                found[gate.name] = report["rates"] if measured and same else None
    return found


def files_of(gate: Gate) -> dict[str, str]:
    """The sha256 of each file that a gate has read, by its absolute path."""
    read = {path: sha256_file(path) for path in gate.inputs() if path.is_file()} | dict(gate.used())
    return {path.absolute().as_posix(): content for path, content in read.items()}
