"""What the commands print about runs and samples."""

from pathlib import Path

import pytest

from fastdistill.control.folder import RunFolder, write_json
from fastdistill.control.show import show_run, show_runs


def test_a_run_that_nobody_holds_any_more_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path, "demo")
    manifest = {"status": "running", "started": "2026-01-01T00:00:00+00:00", "models": {}, "message": ""}

    def told() -> str:
        show_runs(tmp_path)
        show_run("demo", tmp_path)
        return capsys.readouterr().out

    with folder.held():
        write_json(folder.manifest, manifest)
        assert "running" in told()
    assert "running" not in (words := told())
    assert words.count("killed") == 2
