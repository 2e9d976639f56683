import pytest

from fastdistill.control.cli import main
from tests.command import Command, Ended


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        out, err = capfd.readouterr()
        assert "Traceback" not in err + caplog.text
        return Ended(int(ended.value.code or 0), out, err)

    return run
