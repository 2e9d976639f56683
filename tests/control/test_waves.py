"""Waves of candidates: siblings called off cost fewer tokens, and change nothing in the data set."""

import hashlib
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastdistill import CanonicalizeFields, LoadJsonl, Pipeline
from fastdistill.control.config import parse_pipeline
from fastdistill.control.ledger import read_samples
from fastdistill.control.session import RunResult
from fastdistill.core.errors import ConfigError
from fastdistill.core.step import Context, SampleStep
from fastdistill.core.types import Sample
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


def test_siblings_that_were_called_off_are_not_asked_for_when_the_run_is_run_again(tmp_path: Path) -> None:
    until = {"accepted": 1, "wave": 4, "siblings": "cancel"}
    with openai_server(choose(ANSWERS), latency=lambda call: (call.seed or 0) % 4 / 10) as server:
        made = config(server.url, write_records(tmp_path, RECORDS[:30]), make_database(tmp_path), num_generations=8)
        made["steps"][3]["TextGeneration"]["until"] = until
        first = parse_pipeline(made).run(output_dir=tmp_path / "artifacts")
        contacts = server.counters.paths.total()
        again = parse_pipeline(made).run(output_dir=tmp_path / "artifacts")
        assert server.counters.paths.total() == contacts
    assert again.timing["models"]["teacher"]["answers_paid"] == 0 < again.quality["samples"]["accepted"]
    assert rows(again) == rows(first)


def test_speed_decides_nothing(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "first", {"accepted": 2, "wave": 4, "siblings": "cancel"}, shuffled=1)
    second, _ = run(tmp_path / "second", {"accepted": 2, "wave": 4, "siblings": "cancel"}, shuffled=2)
    assert rows(first) == rows(second)
    assert first.manifest["content_sha256"] == second.manifest["content_sha256"]


@pytest.mark.parametrize("step", [3, 4])
def test_another_step_that_generates_is_asked_once_for_each_sample(tmp_path: Path, step: int) -> None:
    """Whether the siblings that race come before or after its own draws."""
    made = {}
    for siblings in ("keep", "cancel"):
        folder = tmp_path / siblings
        folder.mkdir()
        with openai_server(choose(ANSWERS), honours_n=False) as server:
            parts = config(server.url, write_records(folder, RECORDS[:10]), make_database(folder), num_generations=4)
            student = {"name": "student", "template": "Student. {{ instruction }}", "num_generations": 2}
            parts["steps"].insert(step, {"TextGeneration": student})
            (generation,) = (
                s["TextGeneration"] for s in parts["steps"] if s.get("TextGeneration", student) is not student
            )
            generation["until"] = {"accepted": 9, "wave": 2, "siblings": siblings}
            result = parse_pipeline(parts).run(output_dir=folder / "artifacts")
        for sample in read_samples(result.path / "ledger.sqlite"):
            drawn = Counter((candidate.step, candidate.attempt) for candidate in sample.candidates)
            assert drawn == {("TextGeneration", at): 1 for at in range(4)} | {("student", at): 1 for at in range(2)}
        made[siblings] = result.manifest["content_sha256"]
    assert made["keep"] == made["cancel"]


@pytest.mark.parametrize(("siblings", "enough_to_see"), [("keep", 2), ("cancel", 1)])
def test_no_further_wave_is_asked_for_where_gold_is_broken(tmp_path: Path, siblings: str, enough_to_see: int) -> None:
    """Whatever were answered, nobody could tell whether it is right."""
    records = [record | ({"gold_sql": "SELECT nothing"} if at < 5 else {}) for at, record in enumerate(RECORDS[:10])]
    with openai_server(lambda call, index: "SELECT name FROM city WHERE 0", honours_n=False) as server:
        made = config(server.url, write_records(tmp_path, records), make_database(tmp_path), num_generations=8)
        made["steps"][3]["TextGeneration"]["until"] = {"accepted": 1, "wave": 2, "siblings": siblings}
        result = parse_pipeline(made).run(output_dir=tmp_path / "artifacts")
    asked = [len(sample.candidates) for sample in read_samples(result.path / "ledger.sqlite")]
    assert asked == [enough_to_see] * 5 + [8] * 5


def test_a_draw_that_fails_for_good_is_one_of_the_attempts(tmp_path: Path) -> None:
    poisoned = RECORDS[3]["instruction"]
    result, _ = run(
        tmp_path / "run", {"accepted": 1, "wave": 4, "siblings": "cancel"}, faults={poisoned: status(500, times=None)}
    )
    (failure,) = result.quality["failures"]
    assert (failure["reason"], failure["count"]) == ("server_error", 8)
    samples = result.quality["samples"]
    assert (samples["completed"], samples["failed"]) == (29, 1)


class Asks(SampleStep):
    async def run(self, sample: Sample, ctx: Context) -> Sample:
        return sample

    def wants_more(self, sample: Sample) -> bool:
        return bool(sample.record["more"])


def test_a_step_that_breaks_when_asked_whether_it_wants_more_costs_its_sample(tmp_path: Path) -> None:
    rows = ({"q": "a", "more": False}, {"q": "b"}, {"q": "c", "more": False})
    steps = (LoadJsonl(rows=rows), CanonicalizeFields(fields=("q",)), Asks())
    result = Pipeline(name="asks", models={}, steps=steps, max_error_rate=1).run(output_dir=tmp_path)
    (failure,) = result.quality["failures"]
    assert (failure["step"], failure["reason"], failure["count"]) == ("Asks", "unexpected", 1)
    assert failure["examples"] == ["Asks: KeyError: 'more'"]
    assert result.quality["samples"]["completed"] == 2


HEATS = [0.4, 0.8, 1.2]


def hot(folder: Path, **generation: Any) -> tuple[RunResult, list[Sample], list[dict[str, Any]]]:
    """A run whose draws have temperatures in turn: its samples, and the bodies of what the teacher was asked."""
    folder.mkdir(exist_ok=True)
    (folder / "city.db").unlink(missing_ok=True)
    with openai_server(choose(ANSWERS)) as server:
        made = config(server.url, write_records(folder, RECORDS[:6]), make_database(folder), **generation)
        result = parse_pipeline(made).run(output_dir=folder / "artifacts")
    bodies = [body for body in server.counters.bodies if "Return SQL only." in str(body["messages"])]
    return result, list(read_samples(result.path / "ledger.sqlite")), bodies


def heats(sample: Sample) -> list[Any]:
    return [candidate.prompt.parameters["temperature"] for candidate in sample.candidates]


def test_of_several_temperatures_each_draw_takes_the_next_and_is_another_draw(tmp_path: Path) -> None:
    _, samples, bodies = hot(tmp_path, num_generations=7, decode_profile={"temperature": HEATS})
    assert all(heats(sample) == [0.4, 0.8, 1.2, 0.4, 0.8, 1.2, 0.4] for sample in samples)
    # What was asked of the server is what stands with the answer.
    asked = Counter((body["temperature"], body["seed"] + at) for body in bodies for at in range(body.get("n", 1)))
    drawn = Counter((c.prompt.parameters["temperature"], c.seed) for sample in samples for c in sample.candidates)
    assert asked == drawn
    assert Counter(heat for heat, _ in asked) == {0.4: 18, 0.8: 12, 1.2: 12}
    _, alone, _ = hot(tmp_path, num_generations=7, decode_profile={"temperature": 0.4})
    for sample, other in zip(samples, alone, strict=True):
        assert len({c.key for c in sample.candidates}) == len({c.candidate_id for c in sample.candidates}) == 7
        same = [at for at in range(7) if sample.candidates[at].key == other.candidates[at].key]
        assert same == [0, 3, 6], "a draw at this temperature is the same draw, whatever the others have"
        assert [sample.candidates[at].seed for at in same] == [other.candidates[at].seed for at in same]


def test_templates_and_temperatures_meet_in_every_pair_and_a_record_may_bring_its_own(tmp_path: Path) -> None:
    templates = ["Question: {{ instruction }}\nSQL:", "{{ schema }}\nQuestion: {{ instruction }}"]
    _, samples, _ = hot(tmp_path, num_generations=6, template=templates, decode_profile={"temperature": HEATS})
    pairs = {(c.prompt.messages[-1]["content"], c.prompt.parameters["temperature"]) for c in samples[0].candidates}
    assert len(pairs) == 6 and heats(samples[0]) == [0.4, 0.4, 0.8, 0.8, 1.2, 1.2]
    records = [RECORDS[0], {**RECORDS[1], "decode_profile": {"temperature": [0.1, 2.0]}}]
    with openai_server(choose(ANSWERS)) as server:
        path = write_records(tmp_path, records, "own.jsonl")
        made = config(server.url, path, tmp_path / "city.db", decode_profile={"temperature": HEATS})
        own = parse_pipeline(made).run(output_dir=tmp_path / "own")
    assert [heats(s) for s in read_samples(own.path / "ledger.sqlite")] == [HEATS, [0.1, 2.0, 0.1]]


def test_waves_go_on_in_the_list_of_temperatures(tmp_path: Path) -> None:
    made = []
    for number, siblings in enumerate(["keep", "cancel"]):
        until = {"accepted": 2, "wave": 2, "siblings": siblings}
        profile = {"temperature": HEATS}
        made.append(hot(tmp_path / str(number), num_generations=8, until=until, decode_profile=profile))
    for _, samples, _ in made:
        for sample in samples:
            assert heats(sample) == [HEATS[candidate.attempt % 3] for candidate in sample.candidates]
    assert max(len(heats(sample)) for sample in made[0][1]) > 3
    assert rows(made[0][0]) == rows(made[1][0])
    again, _, bodies = hot(tmp_path / "0", num_generations=8, until={"accepted": 2, "wave": 2}, decode_profile=profile)
    assert (rows(again), bodies) == (rows(made[0][0]), [])


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ({"teachers": ["teacher", "teacher"]}, "teacher is there twice"),
        ({"teachers": ["teacher", "large"], "num_generations": 4, "until": {"wave": 2}}, "large is never asked.*: 4;"),
    ],
)
def test_a_teacher_that_is_there_twice_or_never_asked_is_refused(
    tmp_path: Path, ladder: dict[str, Any], message: str
) -> None:
    made = config("http://localhost:1", tmp_path / "r.jsonl", tmp_path / "d.db", **{"until": {"accepted": 1}, **ladder})
    with pytest.raises(ConfigError, match=message):
        parse_pipeline(made)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": [0.5, 6]}, "decode_profile.temperature: must be from 0 to 5, or a list of such"),
        ({"temperature": []}, "decode_profile.temperature: must be from 0 to 5, or a list of such"),
        ({"temperature": [0, 0.7]}, "temperature 0 would bring the same answer 2 times"),
    ],
)
def test_temperatures_that_can_not_be_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    made = config("http://localhost:1", tmp_path / "r.jsonl", tmp_path / "d.db", num_generations=3)
    made["steps"][3]["TextGeneration"]["decode_profile"] = fields
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_pipeline(made)
    made["steps"][3]["TextGeneration"] |= {"num_generations": 2, "decode_profile": {"temperature": [0, 0.7]}}
    parse_pipeline(made)
    made["steps"].insert(7, {"LLMJudge": {"task": "t", "model": "teacher", "decode_profile": {"temperature": HEATS}}})
    with pytest.raises(ConfigError, match=r"LLMJudge\.decode_profile: temperature: one only"):
        parse_pipeline(made)
