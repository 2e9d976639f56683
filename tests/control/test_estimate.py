"""Estimates: their intervals cover the truth as often as they say, and what was probed is not paid for again."""

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastdistill.control.config import parse_pipeline
from fastdistill.control.estimate import estimate
from fastdistill.core.errors import InputError
from fastdistill.core.stats import project_mean, project_needed, project_share, student95
from tests.servers import Batch, choose, openai_server, status
from tests.world import ANSWERS, RECORDS, config, make_database, write_records


@pytest.mark.parametrize(
    ("freedom", "t"), [(3, 3.182), (5, 2.571), (10, 2.228), (29, 2.045), (100, 1.984), (10_000, 1.960)]
)
def test_students_t_is_as_in_the_tables(freedom: int, t: float) -> None:
    assert student95(freedom) == pytest.approx(t, rel=0.01)


@pytest.mark.parametrize("drawn", [30, 100])
def test_the_interval_of_a_total_covers_the_truth_as_often_as_it_says(drawn: int) -> None:
    dice = random.Random(1)
    tokens = [dice.lognormvariate(4, 0.6) for _ in range(1000)]
    truth = sum(tokens)
    covered = 0
    for _ in range(2000):
        found = project_mean(dice.sample(tokens, drawn), len(tokens))
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 2000 <= 0.98


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_the_interval_of_accepted_samples_covers_the_truth_as_often_as_it_says(rate: float) -> None:
    dice = random.Random(2)
    accepted = [number < rate * 400 for number in range(400)]
    covered = 0
    for _ in range(2000):
        found = project_share(sum(dice.sample(accepted, 30)), 30, 400)
        covered += found.low <= sum(accepted) <= found.high
    assert covered / 2000 >= 0.92


@pytest.mark.parametrize("target", [7, 50, 200])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_interval_of_what_a_target_needs_covers_the_truth_as_often_as_it_says(rate: float, target: int) -> None:
    dice = random.Random(3)
    covered = 0
    for _ in range(400):
        accepted = [dice.random() < rate for _ in range(1000)]
        found = project_needed(target, sum(dice.sample(accepted, 30)), 30, 1000)
        counts = itertools.accumulate(accepted)
        truth = next((at for at, count in enumerate(counts, 1) if count == target), 1000)
        covered += found.low <= truth <= found.high
    assert covered / 400 >= 0.92


def test_what_was_seen_bounds_what_is_projected() -> None:
    assert project_share(30, 30, 30).low == project_share(30, 30, 30).high == 30
    assert project_share(0, 30, 400).low == 0
    assert project_share(29, 30, 400).high <= 399


def plan(folder: Path, url: str, **model: Any) -> dict[str, Any]:
    made = config(url, write_records(folder), make_database(folder))
    made["models"]["teacher"] |= model
    return made


def test_an_estimate_probes_through_the_gates_and_the_run_does_not_pay_again(tmp_path: Path) -> None:
    with openai_server(choose(ANSWERS), latency=0.01) as server:
        pipeline = parse_pipeline(plan(tmp_path, server.url, price={"prompt": 1.0, "completion": 2.0}))
        found = estimate(pipeline, tmp_path / "artifacts", 20)
        assert (found.samples, found.drawn) == (len(RECORDS), 20)
        probed = sum(count for prompt, count in server.counters.prompts.items() if "Question:" in prompt)
        assert probed == 20
        assert not (tmp_path / "artifacts" / "runs").exists()

        result = pipeline.run(output_dir=tmp_path / "artifacts")
        asked = sum(count for prompt, count in server.counters.prompts.items() if "Question:" in prompt)
        assert asked == len(RECORDS)
    tokens = result.quality["tokens"]
    # The interval is wide, and the world is scripted: it holds the truth here, or one of the two is broken.
    assert found.prompt_tokens and found.completion_tokens
    assert found.prompt_tokens.low <= tokens["prompt"] <= found.prompt_tokens.high
    assert found.completion_tokens.low <= tokens["completion"] <= found.completion_tokens.high
    assert found.accepted.low <= result.quality["samples"]["accepted"] <= found.accepted.high
    assert found.cost_usd is not None
    assert found.cost_usd.estimate == pytest.approx(
        (found.prompt_tokens.estimate + 2 * found.completion_tokens.estimate) / 1e6
    )


def test_an_estimate_costs_no_more_than_the_run_may(tmp_path: Path) -> None:
    with openai_server(choose(ANSWERS)) as server:
        made = plan(tmp_path, server.url) | {"budget": {"max_tokens": 1}}
        with pytest.raises(InputError, match=r"budget\.max_tokens"):
            estimate(parse_pipeline(made), tmp_path / "artifacts", 20)
        assert not any("Question:" in prompt for prompt in server.counters.prompts)


def test_the_same_samples_are_drawn_again(tmp_path: Path) -> None:
    with openai_server(choose(ANSWERS)) as server:
        pipeline = parse_pipeline(plan(tmp_path, server.url))
        first = estimate(pipeline, tmp_path / "artifacts", 10)
        again = estimate(pipeline, tmp_path / "artifacts", 10)
    assert again.seconds is None, "every answer was stored"
    assert (first.prompt_tokens, first.accepted) == (again.prompt_tokens, again.accepted)
    assert first.cost_usd is None, "no price is known"


def test_nothing_to_draw_from_is_told(tmp_path: Path) -> None:
    records = write_records(tmp_path, RECORDS[:1])
    with openai_server(choose(ANSWERS)) as server:
        pipeline = parse_pipeline(config(server.url, records, make_database(tmp_path)))
        with pytest.raises(InputError, match="two samples"):
            estimate(pipeline, tmp_path / "artifacts", 10)


def test_why_no_teacher_answered_is_told(tmp_path: Path) -> None:
    faults = {"Question": status(400, "no such grammar", times=None)}
    with openai_server(choose(ANSWERS), faults=faults) as server, pytest.raises(InputError, match="no such grammar"):
        estimate(parse_pipeline(plan(tmp_path, server.url)), tmp_path / "artifacts", 10)


def test_what_a_server_does_not_tell_is_not_projected_as_nothing(tmp_path: Path) -> None:
    with openai_server(choose(ANSWERS), usage_of="none") as server:
        pipeline = parse_pipeline(plan(tmp_path, server.url, price={"prompt": 1.0, "completion": 2.0}))
        found = estimate(pipeline, tmp_path / "artifacts", 10)
    assert found.prompt_tokens is found.completion_tokens is found.cost_usd is None
    assert found.accepted.estimate > 0


@pytest.mark.parametrize(
    ("limit", "seconds"), [({"requests_per_minute": 600}, 6), ({"tokens_per_minute": 18_000}, 28 * 60 / 300)]
)
def test_limits_a_minute_are_part_of_the_time(tmp_path: Path, limit: dict[str, int], seconds: float) -> None:
    with openai_server(choose(ANSWERS)) as server:
        found = estimate(parse_pipeline(plan(tmp_path, server.url, **limit)), tmp_path / "artifacts", 10)
    assert found.seconds is not None and found.seconds.estimate >= seconds


def test_a_batch_takes_its_time_however_few_are_in_it(tmp_path: Path) -> None:
    batch = {"poll_s": 0.05, "quiet_s": 0.2}
    with openai_server(choose(ANSWERS), batches={1: Batch(seconds=1)}) as server:
        made = plan(tmp_path, server.url, provider="openai", batch=batch, max_concurrency=None)
        found = estimate(parse_pipeline(made | {"target": {"accepted": 2}}), tmp_path / "artifacts", 10)
    assert found.seconds is not None and found.seconds.low >= 1


def judged(folder: Path, url: str, judge_url: str, **judge: Any) -> dict[str, Any]:
    made = plan(folder, url, price={"prompt": 1.0, "completion": 1.0})
    made["models"]["judge"] = {"provider": "vllm", "model": "judge", "base_url": judge_url, "hedge": False}
    made["models"]["judge"]["price"] = {"prompt": 50.0, "completion": 50.0}
    at = next(at for at, step in enumerate(made["steps"]) if "SQLiteExecEval" in step) + 1
    made["steps"].insert(at, {"LLMJudge": {"task": "{{ instruction }}", "criteria": {"ok": "?"}, "structured": False}})
    return made


@pytest.mark.parametrize("between", [[], [{"Deduplicate": {}}]], ids=["fused", "in two groups"])
def test_what_judges_are_asked_is_part_of_an_estimate_whether_stored_or_not(
    tmp_path: Path, between: list[dict[str, Any]]
) -> None:
    def verdict(call: Any, index: int) -> str:
        return '{"criteria": {"ok": true}, "score": 5}'

    with openai_server(choose(ANSWERS)) as server, openai_server(verdict, models=["judge"]) as other:
        made = judged(tmp_path, server.url, other.url)
        at = next(at for at, step in enumerate(made["steps"]) if "LLMJudge" in step)
        made["steps"][at:at] = between
        pipeline = parse_pipeline(made)
        first = estimate(pipeline, tmp_path / "artifacts", 40)
        again = estimate(pipeline, tmp_path / "artifacts", 40)
        models = pipeline.run(output_dir=tmp_path / "other").timing["models"]
    assert (again.prompt_tokens, again.completion_tokens, again.cost_usd) == (
        first.prompt_tokens,
        first.completion_tokens,
        first.cost_usd,
    )
    assert models["judge"]["cost_usd"] > 10 * models["teacher"]["cost_usd"]
    assert first.cost_usd is not None
    assert first.cost_usd.low <= sum(model["cost_usd"] for model in models.values()) <= first.cost_usd.high
    for kind, found in (("prompt_tokens", first.prompt_tokens), ("completion_tokens", first.completion_tokens)):
        assert found and found.low <= sum(model[kind] for model in models.values()) <= found.high


def test_records_that_fail_are_not_projected_as_if_they_were_answered(tmp_path: Path) -> None:
    records = [
        {key: value for key, value in record.items() if at % 2 or key != "hint"}
        for at, record in enumerate({**record, "hint": "h"} for record in RECORDS)
    ]
    with openai_server(choose(ANSWERS)) as server:
        made = plan(tmp_path, server.url)
        write_records(tmp_path, records)
        made["steps"][3]["TextGeneration"]["template"] = "{{ hint }} Question: {{ instruction }}"
        pipeline = parse_pipeline(made | {"max_error_rate": 1})
        found = estimate(pipeline, tmp_path / "artifacts", 30)
        result = pipeline.run(output_dir=tmp_path / "artifacts")
    assert result.quality["samples"]["failed"] == len(RECORDS) // 2
    assert found.drawn == 30 and found.accepted.high < len(RECORDS)
    assert found.accepted.low <= result.quality["samples"]["accepted"] <= found.accepted.high
    assert found.prompt_tokens
    assert found.prompt_tokens.low <= result.quality["tokens"]["prompt"] <= found.prompt_tokens.high


def test_what_is_open_when_a_target_is_met_is_part_of_an_estimate(tmp_path: Path) -> None:
    records = [RECORDS[0] | {"task_id": f"t{at}", "instruction": f"Question {at}?"} for at in range(300)]
    database = make_database(tmp_path)
    with openai_server(lambda call, index: RECORDS[0]["gold_sql"], latency=0.02) as server:
        made = config(server.url, write_records(tmp_path, records), database, num_generations=1)
        made["models"]["teacher"]["max_concurrency"] = 48
        pipeline = parse_pipeline(made | {"target": {"accepted": 30}})
        found = estimate(pipeline, tmp_path / "probed", 30)
        timing = pipeline.run(output_dir=tmp_path / "artifacts").timing["models"]["teacher"]
    assert found.prompt_tokens and found.completion_tokens
    assert timing["answers_paid"] > 40, "or nothing was open when the target was met"
    assert found.prompt_tokens.low <= timing["prompt_tokens"] <= found.prompt_tokens.high
    assert found.completion_tokens.low <= timing["completion_tokens"] <= found.completion_tokens.high


def test_with_a_target_only_what_it_needs_is_projected(tmp_path: Path) -> None:
    with openai_server(choose(ANSWERS)) as server:
        made = plan(tmp_path, server.url, price={"prompt": 1.0, "completion": 1.0})
        whole = estimate(parse_pipeline(made), tmp_path / "artifacts", 30)
        pipeline = parse_pipeline(made | {"target": {"accepted": 7}})
        found = estimate(pipeline, tmp_path / "artifacts", 30)
        beyond = estimate(parse_pipeline(made | {"target": {"accepted": 10_000}}), tmp_path / "artifacts", 30)
        result = pipeline.run(output_dir=tmp_path / "artifacts")
    assert replace(beyond, seconds=whole.seconds) == whole
    assert (found.accepted.low, found.accepted.estimate, found.accepted.high) == (7, 7, 7)
    tokens = result.quality["tokens"]
    assert found.prompt_tokens and found.completion_tokens and whole.prompt_tokens
    assert found.prompt_tokens.low <= tokens["prompt"] <= found.prompt_tokens.high <= whole.prompt_tokens.high
    assert found.completion_tokens.low <= tokens["completion"] <= found.completion_tokens.high
    assert found.prompt_tokens.estimate < whole.prompt_tokens.low
    assert found.cost_usd is not None and whole.cost_usd is not None and found.cost_usd.estimate < whole.cost_usd.low
