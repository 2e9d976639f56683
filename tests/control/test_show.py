"""What the commands print about runs and samples."""

from pathlib import Path

import pytest

from fastdistill import CanonicalizeFields, LoadJsonl, Pipeline
from fastdistill.control.folder import RunFolder, write_json
from fastdistill.control.show import show_run, show_runs, show_sample
from fastdistill.control.terminal import show_table


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


def test_a_sample_is_found_by_its_task_id_and_can_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ({"id": "repo#12", "q": "one\x1b]0;mine\x07\n\ttwo"}, {"id": "repo#13", "q": "x"})
    steps = (LoadJsonl(rows=rows), CanonicalizeFields(fields=("q",), task_id_field="id"))
    Pipeline(name="demo", steps=steps).run(output_dir=tmp_path, run_id="demo")
    show_sample("demo", "repo#12", tmp_path)
    out = capsys.readouterr().out
    assert "q:\n    one ]0;mine \n            two\n" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("columns", [12, 40, 80])
def test_no_figure_and_no_id_is_cut_on_a_narrow_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    row = (f"{'a' * 64}-0123abcd", "below_floor", "2026-01-01T00:00", "1,234,567", "999,999", "teacher, judge")
    show_table(("run", "status", "started", ">samples", ">accepted", "models"), [row])
    assert set(row[:-1]) <= set(capsys.readouterr().out.split())
