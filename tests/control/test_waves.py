"""Waves of candidates: siblings called off cost fewer tokens, and change nothing in the data set."""

import hashlib
import random
from pathlib import Path
from typing import Any

from fastdistill.control.config import parse_pipeline
from fastdistill.control.session import RunResult
from tests.servers import Call, choose, openai_server, status
from tests.world import ANSWERS, RECORDS, config, make_database, write_records


def run(folder: Path, until: dict[str, Any], *, shuffled: int = 0, faults: Any = None) -> tuple[RunResult, int]:
    """A run over the cities with up to 8 candidates, and how many answers the teacher gave."""

    def latency(call: Call) -> float:
        return random.Random(f"{shuffled} {call.seed} {call.prompt}").uniform(0.02, 0.15)

    folder.mkdir()
    with openai_server(choose(ANSWERS), latency=latency, honours_n=False, faults=faults or {}) as server:
        made = config(server.url, write_records(folder, RECORDS[:30]), make_database(folder), num_generations=8)
        made["steps"][3]["TextGeneration"]["until"] = until
        result = parse_pipeline(made).run(output_dir=folder / "artifacts")
        answers = sum(count for prompt, count in server.counters.prompts.items() if "Question:" in prompt)
    return result, answers


def rows(result: RunResult) -> str:
    return hashlib.sha256((result.dataset / "sft" / "train.jsonl").read_bytes()).hexdigest()


def test_called_off_siblings_save_answers_and_leave_the_data_set_as_it_is(tmp_path: Path) -> None:
    one_by_one, least = run(tmp_path / "one", {"accepted": 1, "wave": 1})
    kept, most = run(tmp_path / "kept", {"accepted": 1, "wave": 4})
    called_off, some = run(tmp_path / "off", {"accepted": 1, "wave": 4, "siblings": "cancel"})
    assert least <= some < most
    assert one_by_one.quality["samples"] == called_off.quality["samples"] == kept.quality["samples"]
    assert rows(one_by_one) == rows(called_off) == rows(kept)
    # What was called off is not a candidate, even if its answer had arrived by then.
    assert called_off.quality["candidates"]["generated"] == one_by_one.quality["candidates"]["generated"]


def test_speed_decides_nothing(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "first", {"accepted": 2, "wave": 4, "siblings": "cancel"}, shuffled=1)
    second, _ = run(tmp_path / "second", {"accepted": 2, "wave": 4, "siblings": "cancel"}, shuffled=2)
    assert rows(first) == rows(second)
    assert first.manifest["content_sha256"] == second.manifest["content_sha256"]


def test_a_draw_that_fails_for_good_is_one_of_the_attempts(tmp_path: Path) -> None:
    poisoned = RECORDS[3]["instruction"]
    result, _ = run(
        tmp_path / "run", {"accepted": 1, "wave": 4, "siblings": "cancel"}, faults={poisoned: status(500, times=None)}
    )
    (failure,) = result.quality["failures"]
    assert (failure["reason"], failure["count"]) == ("server_error", 8)
    samples = result.quality["samples"]
    assert (samples["completed"], samples["failed"]) == (29, 1)
