"""Layers, overrides, variables and secrets of a config, and what gives a run its id."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import fastdistill
from fastdistill.control.config import load_pipeline, merge, parse_pipeline, read_yaml
from fastdistill.control.registry import STEPS
from fastdistill.control.session import Pipeline
from fastdistill.core.errors import ConfigError, FatalError, TeacherError
from tests.servers import openai_server, status
from tests.world import RECORDS, write_records

BASE: dict[str, Any] = {
    "name": "base",
    "models": {"teacher": {"provider": "vllm", "model": "m", "base_url": "http://localhost:1/v1"}},
    "steps": [
        {"LoadJsonl": {"path": "train.jsonl"}},
        {"CanonicalizeFields": {"fields": ["instruction"]}},
        "Deduplicate",
        {"TextGeneration": {"template": "{{ instruction }}", "num_generations": 2}},
        {"RuleFilter": {"max_chars": 100}},
    ],
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "VLLM_API_KEY", "VLLM_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def layer(folder: Path, name: str, content: object) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def changed(**changes: Any) -> Pipeline:
    """The base with some dotted paths set (`__` for a dot)."""
    config = copy.deepcopy(BASE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = config
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[last] = value
    return parse_pipeline(config, {})


def problems(config: object, environment: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_pipeline(config, environment or {})
    return caught.value.problems


# --- layers ---


def test_later_layers_win_and_the_command_line_wins_over_all(tmp_path: Path) -> None:
    layers = [
        layer(tmp_path, "base", BASE),
        layer(tmp_path, "env", {"models": {"teacher": {"model": "of-env", "max_concurrency": 5}}}),
        layer(tmp_path, "run", {"models": {"teacher": {"model": "of-run"}}, "name": "run"}),
    ]
    pipeline = load_pipeline(layers, ["models.teacher.max_concurrency=7"])
    assert (pipeline.name, pipeline.models["teacher"].model) == ("run", "of-run")
    assert pipeline.models["teacher"].max_concurrency == 7
    assert len(pipeline.steps) == 5


def test_a_layer_changes_steps_by_name_and_by_number(tmp_path: Path) -> None:
    over = {
        "steps": {
            "TextGeneration": {"num_generations": 9},
            "Deduplicate": {"fields": ["instruction"]},
            4: {"RuleFilter": {"min_chars": 3}},
        }
    }
    pipeline = load_pipeline([layer(tmp_path, "base", BASE), layer(tmp_path, "over", over)])
    resolved = [next(iter(step.values())) for step in pipeline.resolved()["steps"]]
    assert resolved[3]["num_generations"] == 9 and resolved[3]["template"] == "{{ instruction }}"
    assert resolved[2]["fields"] == ["instruction"]
    assert (resolved[4]["min_chars"], resolved[4]["max_chars"]) == (3, 100)


def test_what_a_layer_resets_is_as_if_it_had_never_been_given(tmp_path: Path) -> None:
    given = copy.deepcopy(BASE) | {"budget": {"max_tokens": 9, "max_cost_usd": 1}, "max_error_rate": 0.5}
    given["models"] |= {"judge": {"provider": "embedded"}}
    given["models"]["teacher"] |= {"max_retries": 3, "price": {"prompt": 1.0, "completion": 2.0}}
    over = """
        models: {judge: !reset , teacher: {max_retries: !reset , nobody_gave_this: !reset null}}
        budget: {max_cost_usd: !reset {whatever: 1}}
        max_error_rate: !reset
        steps: {Deduplicate: !reset , TextGeneration: {num_generations: !reset }, 4: !reset }
    """
    layers = [layer(tmp_path, "base", given), layer(tmp_path, "over", over)]
    pipeline = load_pipeline(layers, ["models.teacher.price=!reset", "steps.LoadJsonl.limit=!reset"])
    meant = copy.deepcopy(BASE) | {"budget": {"max_tokens": 9}}
    meant["steps"] = [*BASE["steps"][:2], {"TextGeneration": {"template": "{{ instruction }}"}}]
    assert pipeline == parse_pipeline(meant)
    # A later layer begins anew.
    again = load_pipeline([*layers, layer(tmp_path, "last", {"models": {"judge": {"provider": "embedded"}}})])
    assert list(again.models) == ["teacher", "judge"]
    with pytest.raises(ConfigError, match="name: required, but not given"):
        load_pipeline(layers, ["name=!reset"])


def test_null_is_a_value_and_resets_nothing(tmp_path: Path) -> None:
    base = layer(tmp_path, "base", BASE)
    (step,) = load_pipeline([base], ["steps.TextGeneration.seed=null"]).resolved()["steps"][3].values()
    assert step["seed"] is None
    (step,) = load_pipeline([base], ["steps.TextGeneration.seed=!reset"]).resolved()["steps"][3].values()
    assert step["seed"] == 0


def test_a_list_replaces_the_steps_whole() -> None:
    assert merge(BASE, {"steps": ["Deduplicate"]})["steps"] == ["Deduplicate"]


def test_merging_leaves_its_layers_as_they_were() -> None:
    before = copy.deepcopy(BASE)
    merged = merge(BASE, {"steps": {"TextGeneration": {"num_generations": 9}}})
    merged["models"]["teacher"]["model"] = "other"
    assert before == BASE


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.TextGenerations.seed=1", "steps.TextGenerations: is not there; did you mean TextGeneration?"),
        ("steps.99.seed=1", "steps.99: is not there"),
        ("models.teacher.model", "write it as path=value"),
        ("=1", "write it as path=value"),
        ("name=[a", "the value is not YAML"),
    ],
)
def test_an_override_that_fits_nowhere_is_told(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + message.replace("?", r"\?")):
        load_pipeline([layer(tmp_path, "base", BASE)], [override])


def test_a_step_that_is_there_twice_is_changed_by_its_number_only(tmp_path: Path) -> None:
    twice = {**BASE, "steps": [*BASE["steps"], {"RuleFilter": {"max_chars": 50}}]}
    base = layer(tmp_path, "base", twice)
    with pytest.raises(ConfigError, match="is there several times: use its number"):
        load_pipeline([base], ["steps.RuleFilter.max_chars=1"])
    assert load_pipeline([base], ["steps.5.RuleFilter.max_chars=1"]).steps[5].model_dump()["max_chars"] == 1


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("steps.TextGeneration.num_generations=4", (3, "num_generations"), 4),
        ("steps[3].TextGeneration.seed=null", (3, "seed"), None),
        ("steps.3.TextGeneration.decode_profile.temperature=0.5", (3, "decode_profile"), 0.5),
        ("steps.TextGeneration.decode_profile={temperature: 0.5}", (3, "decode_profile"), 0.5),
        ("steps.TextGeneration.template=a = {{ instruction }}", (3, "template"), "a = {{ instruction }}"),
        ("steps.Deduplicate.fields=[a, b]", (2, "fields"), ["a", "b"]),
    ],
)
def test_set_takes_dots_and_brackets_and_yaml(
    tmp_path: Path, override: str, path: tuple[int, str], value: object
) -> None:
    (step,) = load_pipeline([layer(tmp_path, "base", BASE)], [override]).resolved()["steps"][path[0]].values()
    found = step[path[1]]
    assert (found["temperature"] if path[1] == "decode_profile" else found) == value


def test_an_override_under_a_step_that_does_not_exist_names_the_model_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'juge' is not under models: \\(teacher\\)"):
        load_pipeline([layer(tmp_path, "base", BASE)], ["steps.TextGeneration.model=juge"])


# --- YAML ---


def test_a_key_given_twice_is_refused_with_its_place(tmp_path: Path) -> None:
    path = layer(tmp_path, "twice", "name: x\nmodels:\n  teacher: {model: a}\n  teacher: {model: b}\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml:4:3: the key 'teacher' is given twice"):
        read_yaml(path)


def test_a_template_without_quotes_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bare\.yaml:2:12: a template, .* needs quotes"):
        read_yaml(layer(tmp_path, "bare", "a: 1\ntemplate: {{ q }}\n"))


def test_one_file_is_named_by_itself_and_as_a_text_too(tmp_path: Path) -> None:
    path = layer(tmp_path, "base", BASE)
    assert load_pipeline(str(path)) == load_pipeline(path) == load_pipeline([str(path)])


def test_what_looks_like_a_date_is_text(tmp_path: Path) -> None:
    base = layer(tmp_path, "base", BASE)
    for day in ("2026-01-05", "2026-02-30"):
        assert load_pipeline([base], [f"models.teacher.revision={day}"]).models["teacher"].revision == day


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = "a: &a {model: m, timeout: 5}\nb:\n  <<: *a\n  timeout: 9\n"
    assert read_yaml(layer(tmp_path, "anchors", text))["b"] == {"model": "m", "timeout": 9}


def test_a_file_that_is_missing_or_not_utf8_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 at byte 9"):
        read_yaml(path)


# --- variables ---


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("${MODEL}", "llama"),
        ("a-${MODEL}-${MODEL}", "a-llama-llama"),
        ("${MODEL:-other}", "llama"),
        ("${NONE:-other}", "other"),
        ("${EMPTY:-other}", "other"),
        ("${NONE:-http://h:1/v1}", "http://h:1/v1"),
        ("$${MODEL}", "${MODEL}"),
        ("$MODEL", "$MODEL"),
        ("$$5", "$$5"),
    ],
)
def test_variables(text: str, meant: str) -> None:
    config = {**BASE, "models": {"teacher": {**BASE["models"]["teacher"], "model": text}}}
    assert parse_pipeline(config, {"MODEL": "llama", "EMPTY": ""}).models["teacher"].model == meant


def test_a_variable_may_stand_for_a_number() -> None:
    config = {**BASE, "models": {"teacher": {**BASE["models"]["teacher"], "timeout": "${SECONDS:-90}"}}}
    assert parse_pipeline(config, {}).models["teacher"].timeout == 90


def test_every_missing_variable_is_told_with_its_path() -> None:
    config = {**BASE, "name": "${A_NAME}", "steps": [{"LoadJsonl": {"path": "${A_PATH}"}}]}
    told = "\n".join(problems(config))
    assert "name: the environment variable A_NAME is not set: set it, or use ${A_NAME:-default}" in told
    assert "steps[0].LoadJsonl.path: the environment variable A_PATH is not set" in told


def test_templates_are_left_alone() -> None:
    template = "{{ instruction }} costs $5 {% if a %}b{% endif %}"
    step = changed(steps__3__TextGeneration__template=template).resolved()["steps"][3]
    assert step["TextGeneration"]["template"] == template


# --- problems ---


def test_an_unknown_key_deep_in_a_step_is_told_with_the_names_that_are_there() -> None:
    config = copy.deepcopy(BASE)
    config["steps"][3]["TextGeneration"]["decode_profile"] = {"temprature": 0.5}
    config["require"] = {"exec_pas_rate": 0.5}
    told = "\n".join(problems(config))
    assert "decode_profile.temprature: unknown key; did you mean temperature?" in told
    assert "require.exec_pas_rate: unknown key; did you mean exec_pass_rate?" in told


def test_what_is_wrong_is_told_in_words_of_yaml() -> None:
    config = copy.deepcopy(BASE)
    config["steps"][1] = {"CanonicalizeFields": {"fields": "question"}}
    config["steps"][3]["TextGeneration"]["decode_profile"] = {"temperature": "hot"}
    path = "steps[3].TextGeneration.decode_profile.temperature"
    assert problems(config) == [
        "steps[1].CanonicalizeFields.fields: must be a list, like [a, b] (given: 'question')",
        f"{path}: Input should be a valid number, unable to parse string as a number (given: 'hot')",
        f"{path}: must be a list, like [a, b] (given: 'hot')",
    ]


def test_a_part_that_can_not_be_read_neither_hides_nor_moves_the_problems_of_others() -> None:
    config = copy.deepcopy(BASE)
    config["models"]["judge"] = {"provider": "olama", "model": "m"}
    config["steps"][2] = {"Deduplicate": {"feilds": []}}
    config["steps"][3]["TextGeneration"]["model"] = "teecher"
    config["steps"] += [{"LLMJudge": {"task": "x"}}, {"ScoreFromExecEval": {"gate": "SQLiteExecEvil"}}]
    config["steps"] += [{"SQLiteExecEval": {"dbpath": "a.db"}}, "ScoreFromExecEval"]
    assert problems(config) == [
        "models.judge.provider: olama is not known; did you mean ollama?",
        "steps[2].Deduplicate.feilds: unknown key; did you mean fields?",
        "steps[7].SQLiteExecEval.db_path: required, but not given",
        "steps[7].SQLiteExecEval.dbpath: unknown key; did you mean db_path?",
        "steps[3].TextGeneration: 'teecher' is not under models: (teacher, judge)",
        "steps[6].ScoreFromExecEval: there is no gate 'SQLiteExecEvil'; there are: RuleFilter, LLMJudge",
    ]


def test_a_problem_is_told_once_at_its_place() -> None:
    assert problems({**BASE, "steps": None}) == ["steps: required; a list like `- LoadJsonl: {path: train.jsonl}`"]
    told = problems({**BASE, "steps": [{"LoadJsonl": {"path": ["a.jsonl", 5]}}, *BASE["steps"][1:]]})
    assert {problem.partition(": ")[0] for problem in told} == {"steps[0].LoadJsonl.path", "steps[0].LoadJsonl.path[1]"}
    broken = [*BASE["steps"][:4], {"RuleFilter": {"min_chars": "a few"}}, *BASE["steps"][4:]]
    (problem,) = problems({**BASE, "steps": broken, "target": {"accepted": 1}})
    assert problem.startswith("steps[4].RuleFilter.min_chars")


def test_what_would_change_what_an_export_has_written_is_refused() -> None:
    sft: dict[str, Any] = {"ExportSFT": {}}
    for kind in ("RuleFilter", "Deduplicate", "CleanSqlOutput"):
        late = {kind: {"name": "late"}}
        parse_pipeline({**BASE, "steps": [*BASE["steps"][:5], late, sft]}, {})
        (problem,) = problems({**BASE, "steps": [*BASE["steps"][:5], sft, late]})
        assert problem.startswith("steps[6].late: ") and problem.endswith("put it before ExportSFT")


def test_a_step_between_that_keeps_the_gates_from_until_is_refused() -> None:
    """The first wave would be enough, whatever the gates say."""
    load, ids, _, _, gate = BASE["steps"][:5]
    generation = {"TextGeneration": {"template": "{{ instruction }}", "num_generations": 2, "until": {"accepted": 1}}}
    dedup, more = {"Deduplicate": {"name": "between"}}, {"RuleFilter": {"name": "more"}}
    for steps in ([dedup, generation, gate], [generation, gate, dedup, more], [generation, dedup]):
        parse_pipeline({**BASE, "steps": [load, ids, *steps, "ExportSFT"]}, {})
    (problem,) = problems({**BASE, "steps": [load, ids, generation, dedup, gate, "ExportSFT"]})
    assert problem.startswith("steps[2].TextGeneration.until: ")


def test_two_steps_of_one_name_are_refused() -> None:
    config = copy.deepcopy(BASE)
    config["steps"] += [{"RuleFilter": {"name": "short", "max_chars": 10}}, {"RuleFilter": {"name": "short"}}]
    assert any("short" in problem for problem in problems(config))


@pytest.mark.parametrize("own", ["model", "messages", "n", "seed", "stream"])
def test_fields_that_are_the_clients_own_are_no_generation_kwargs(own: str) -> None:
    config = copy.deepcopy(BASE)
    config["steps"][3]["TextGeneration"]["generation_kwargs"] = {own: 1}
    assert any(own in problem for problem in problems(config))


def test_a_step_that_reads_verdicts_before_they_are_given_is_refused() -> None:
    """A judge before its `truth` would have nothing to be calibrated with, and never say so."""
    judge = {"LLMJudge": {"task": "{{ instruction }}", "truth": "SQLiteExecEval", "model": "teacher"}}
    gate, score = {"SQLiteExecEval": {"db_path": "a.db"}}, "ScoreFromExecEval"
    config = copy.deepcopy(BASE)
    for order, early in (([gate, judge, score], []), ([judge, gate, score], [5]), ([judge, score, gate], [5, 6])):
        config["steps"][5:] = order
        if not early:
            parse_pipeline(config, {})
            continue
        told = [line for line in "\n".join(problems(config)).splitlines() if "must come before it" in line]
        names = {5: "LLMJudge", 6: "ScoreFromExecEval"}
        assert [problem.partition(":")[0] for problem in told] == [f"steps[{at}].{names[at]}" for at in early]
        assert "SQLiteExecEval must come before it, for it reads SQLiteExecEval's verdicts" in told[0]


def test_a_score_of_a_gate_that_is_not_there_is_refused() -> None:
    config = copy.deepcopy(BASE)
    config["steps"].append({"ScoreFromExecEval": {"gate": "SQLiteExecEvil"}})
    assert any("SQLiteExecEvil" in problem for problem in problems(config))


@pytest.mark.parametrize("text", ["${A-b}", "${ A }", "${A:-${B}}", "${A:?no}"])
def test_a_variable_that_is_misspelt_is_told(text: str) -> None:
    config = {**BASE, "models": {"teacher": {**BASE["models"]["teacher"], "model": text}}}
    assert any("models.teacher.model" in problem for problem in problems(config))


def test_a_key_that_is_a_number_is_not_repeated_in_the_message() -> None:
    config = {**BASE, "models": {"teacher": {**BASE["models"]["teacher"], "api_key": 123456789}}}
    assert "123456789" not in "\n".join(problems(config))


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    config = {**BASE, "models": {"teacher": {**BASE["models"]["teacher"], "base_url": "https://bob:hunter2@llm/v1"}}}
    said = "\n".join(problems(config))
    assert "no user, password or query here" in said
    assert "hunter2" not in said


# --- secrets ---

SECRET = "sk-0123456789-never-on-disk"


@pytest.mark.parametrize("given", ["literal", "interpolated", "environment", "header"])
def test_a_secret_reaches_the_server_and_no_file(tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = write_records(tmp_path, RECORDS[:4])
    ways: dict[str, dict[str, Any]] = {
        "literal": {"api_key": SECRET},
        "interpolated": {"api_key": "${TEACHER_KEY}"},
        "environment": {},
        "header": {"headers": {"Authorization": f"Bearer {SECRET}"}},
    }
    if given == "environment":
        monkeypatch.setenv("VLLM_API_KEY", SECRET)
    with openai_server(api_key=SECRET) as server:
        config = copy.deepcopy(BASE)
        config["models"]["teacher"] |= {"base_url": server.url, "model": "teacher", **ways[given]}
        config["steps"][0]["LoadJsonl"]["path"] = str(records)
        pipeline = parse_pipeline(config, {"TEACHER_KEY": SECRET})
        result = pipeline.run(output_dir=tmp_path / "artifacts")
    assert result.exit_code == 0 and server.counters.answered > 0
    assert SECRET not in repr(pipeline) + str(pipeline.resolved())
    assert files_with(SECRET, tmp_path / "artifacts") == []


def test_a_key_that_the_server_repeats_in_its_error_reaches_no_file(tmp_path: Path) -> None:
    records = write_records(tmp_path, RECORDS[:4])
    with openai_server(faults={"": status(401, f"Incorrect API key provided: {SECRET}.", times=None)}) as server:
        config = copy.deepcopy(BASE)
        config["models"]["teacher"] |= {"base_url": server.url, "model": "teacher", "api_key": SECRET}
        config["steps"][0]["LoadJsonl"]["path"] = str(records)
        with pytest.raises(TeacherError, match="401"):
            parse_pipeline(config).run(output_dir=tmp_path / "artifacts")
    assert files_with(SECRET, tmp_path / "artifacts") == []


def files_with(text: str, folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if text.encode() in path.read_bytes()]


# --- run ids ---


@pytest.mark.parametrize(
    "change",
    [
        {"models__teacher__base_url": "http://elsewhere:9/v1"},
        {"models__teacher__timeout": 5},
        {"models__teacher__max_concurrency": 99},
        {"models__teacher__max_retries": 1},
        {"models__teacher__api_key": "k"},
        {"models__teacher__price": {"prompt": 1.0}},
        {"max_error_rate": 0.5},
        {"require": {"min_total": 3}},
    ],
)
def test_what_changes_no_answer_and_no_row_leaves_the_run_where_it_is(change: dict[str, Any]) -> None:
    assert changed(**change).run_id == changed().run_id


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"models__teacher__model": "m2"},
        {"models__teacher__provider": "sglang"},
        {"models__teacher__revision": "2026-01"},
        {"steps__0__LoadJsonl__path": "other.jsonl"},
        {"steps__3__TextGeneration__template": "Q: {{ instruction }}"},
        {"steps__3__TextGeneration__system_prompt": "SQL only."},
        {"steps__3__TextGeneration__num_generations": 3},
        {"steps__3__TextGeneration__seed": 5},
        {"steps__3__TextGeneration__decode_profile": {"temperature": 0.5}},
        {"steps__3__TextGeneration__generation_kwargs": {"guided_regex": "a"}},
        {"steps__4__RuleFilter__max_chars": 99},
    ],
)
def test_what_changes_the_data_set_gets_a_run_of_its_own(change: dict[str, Any]) -> None:
    assert changed(**change).run_id != changed().run_id


def test_a_resolved_config_is_the_same_pipeline_again(tmp_path: Path) -> None:
    pipeline = changed()
    resolved = yaml.safe_dump(pipeline.resolved())
    assert load_pipeline([layer(tmp_path, "resolved", resolved)]).run_id == pipeline.run_id


def test_a_config_error_is_a_fatal_error() -> None:
    with pytest.raises(FatalError):
        parse_pipeline([], {})


def test_another_provider_replaces_a_model_and_the_same_one_is_merged() -> None:
    base = {"models": {"teacher": {"provider": "ollama", "model": "a", "num_ctx": 8}}}
    assert merge(base, {"models": {"teacher": {"model": "b"}}})["models"]["teacher"] == {
        "provider": "ollama",
        "model": "b",
        "num_ctx": 8,
    }
    other = {"provider": "replay", "path": "recorded.jsonl"}
    assert merge(base, {"models": {"teacher": other}})["models"]["teacher"] == other
    same = merge(base, {"models": {"teacher": {"provider": "ollama", "model": "b"}}})
    assert same["models"]["teacher"]["num_ctx"] == 8


def test_every_step_is_a_public_name_that_type_checkers_know() -> None:
    known = re.findall(r" as (\w+)$", Path(fastdistill.__file__).read_text(encoding="utf-8"), re.M)
    assert sorted(known) == sorted(fastdistill.__all__)
    assert set(STEPS) <= {*known}
    assert all(getattr(fastdistill, name).__name__ == name for name in known)
