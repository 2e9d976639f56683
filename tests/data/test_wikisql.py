import io
import json
import sqlite3
import tarfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastdistill.core.errors import InputError
from fastdistill.data.wikisql import Prepared, prepare_wikisql, readable_columns

HEADER = ["Player", "No.", "School/Club Team", "% won", "player", "Order", "#", "1992-93"]
TYPES = ["text", "real", "text", "real", "text", "real", "text", "real"]
ROWS = [
    ("amir johnson", 9.0, "westchester high school", 0.5, "é", 1.0, "x", 1.0),
    ("trey o'brien", 4911.0, "fresno state", 1.5, "b", 2.0, "y", None),
    ("trey o'brien", 5.0, "fresno state", None, "c", 3.0, "5", None),
]


def ask(question: str, select: int, conditions: Sequence[tuple[int, int, Any]] = (), aggregate: int = 0) -> Any:
    sql = {"sel": select, "conds": conditions, "agg": aggregate}
    return {"phase": 1, "table_id": "1-100-1", "question": question, "sql": sql}


GOOD = {
    "SELECT player FROM table_1_100_1 WHERE school_club_team = 'westchester high school'": ask(
        " Who? ", 0, [(2, 0, "Westchester High School")]
    ),
    'SELECT player FROM table_1_100_1 WHERE "no" = 4911': ask("Who is 4,911?", 0, [(1, 0, "4,911")]),
    'SELECT player FROM table_1_100_1 WHERE "no" > 4.5': ask("Above?", 0, [(1, 1, "about 4.5 or so")]),
    "SELECT COUNT(player) FROM table_1_100_1 WHERE player = 'trey o''brien' AND \"order\" < 9": ask(
        "How many?", 0, [(0, 0, "Trey O'Brien"), (5, 2, 9)], 3
    ),
    "SELECT \"no\" FROM table_1_100_1 WHERE number = '5'": ask("Five?", 1, [(6, 0, 5)]),
    "SELECT AVG(percent_won) FROM table_1_100_1": ask("Mean?", 3, (), 5),
    'SELECT player_2 FROM table_1_100_1 WHERE "no" > 5 AND "no" < 10.5': ask("Twice?", 4, [(1, 1, 5), (1, 2, 10.5)]),
    "SELECT \"1992_93\" FROM table_1_100_1 WHERE player_2 = 'é'": ask("Season?", 7, [(4, 0, "É")]),
}
BAD = {
    "empty": [
        ask("Nobody?", 0, [(0, 0, "nobody")]),
        ask("None?", 0, [(0, 0, "nobody")], 3),
        ask("Null?", 7, [(1, 0, 5)]),
        ask("Largest of none?", 1, [(0, 0, "nobody")], 1),
    ],
    "bad_query": [
        ask("No number?", 0, [(1, 0, "many")]),
        ask("Column?", 8),
        ask("Operator?", 0, [(1, 3, 1)]),
        ask("Aggregate?", 0, (), 6),
    ],
    "no_table": [{**ask("Table?", 0), "table_id": "1-999-1"}],
}
OTHER_TABLE = {**ask("The other?", 0), "table_id": "2-7-1"}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder in the layout of the official release, its data folder packed beside it."""
    folder = tmp_path / "release" / "data"
    folder.mkdir(parents=True)
    questions = [*GOOD.values()] + [bad for group in BAD.values() for bad in group] + [OTHER_TABLE]
    tables = [
        {"id": "1-100-1", "header": HEADER, "types": TYPES, "rows": ROWS, "name": "table_1_100_1"},
        {"id": "2-7-1", "header": ["Year"], "types": ["real"], "rows": [[1999.0]]},
    ]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
        (folder / f"{split}.tables.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tables))
        with closing(sqlite3.connect(folder / f"{split}.db")) as database, database:
            columns = ", ".join(f"col{index} {kind}" for index, kind in enumerate(TYPES))
            database.execute(f"CREATE TABLE table_1_100_1 ({columns})")
            database.executemany(f"INSERT INTO table_1_100_1 VALUES ({', '.join('?' * len(TYPES))})", ROWS)
            database.execute("CREATE TABLE table_2_7_1 (col0 real)")
            database.execute("INSERT INTO table_2_7_1 VALUES (1999)")
    with tarfile.open(tmp_path / "data.tar.bz2", "w:bz2") as tar:
        tar.add(folder, "data")
    return tmp_path / "release"


def records(prepared: Prepared, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared.folder / f"{split}.jsonl").read_bytes().splitlines()]


def test_gold_queries_read_well_and_mean_what_the_official_evaluator_makes_of_them(
    release: Path, tmp_path: Path
) -> None:
    prepared = prepare_wikisql(release, samples=100, output=tmp_path / "out")
    gold = {record["instruction"]: record["gold_sql"] for record in records(prepared)}
    assert gold == {question["question"].strip(): sql for sql, question in GOOD.items()} | {
        "The other?": "SELECT year FROM table_2_7_1"
    }
    assert prepared.train.left_out == {reason: len(questions) for reason, questions in BAD.items()}
    assert (prepared.train.records, prepared.train.tables) == (len(gold), 2)


def test_every_gold_query_runs_on_the_database_beside_it(release: Path, tmp_path: Path) -> None:
    prepared = prepare_wikisql(release, samples=100, output=tmp_path / "out")
    for split in ("train", "eval"):
        with closing(sqlite3.connect(prepared.folder / f"{split}.db")) as database:
            for record in records(prepared, split):
                assert database.execute(record["gold_sql"]).fetchall()


def test_a_record_has_what_a_pipeline_reads(release: Path, tmp_path: Path) -> None:
    prepared = prepare_wikisql(release, samples=100, output=tmp_path / "out")
    record = next(record for record in records(prepared) if record["instruction"] == "How many?")
    assert list(record) == ["task_id", "schema", "instruction", "gold_sql", "db_id", "agg", "conditions"]
    assert (record["task_id"], record["db_id"]) == ("wikisql-train-00003", "1-100-1")
    assert (record["agg"], record["conditions"]) == ("COUNT", 2)
    assert record["schema"] == (
        'CREATE TABLE table_1_100_1 (player TEXT, "no" REAL, school_club_team TEXT, percent_won REAL, player_2 TEXT, '
        '"order" REAL, number TEXT, "1992_93" REAL);'
    )


def test_a_value_may_be_written_as_the_question_does(release: Path, tmp_path: Path) -> None:
    prepared = prepare_wikisql(release, samples=100, output=tmp_path / "out")
    with closing(sqlite3.connect(prepared.folder / "train.db")) as database:
        found = database.execute("SELECT \"no\" FROM table_1_100_1 WHERE player = 'Amir Johnson'").fetchall()
    assert found == [(9.0,)]


def test_folder_data_folder_and_archive_give_the_same_bytes(release: Path, tmp_path: Path) -> None:
    written = []
    for number, source in enumerate([release, release / "data", tmp_path / "data.tar.bz2"]):
        folder = prepare_wikisql(source, samples=5, output=tmp_path / f"out{number}").folder
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert sorted(written[0]) == ["eval.db", "eval.jsonl", "train.db", "train.jsonl"]
    assert written[0] == written[1] == written[2]


def test_a_draw_is_the_seeds_and_a_smaller_one_begins_a_larger(release: Path, tmp_path: Path) -> None:
    def tasks(samples: int, seed: int = 13) -> list[str]:
        prepared = prepare_wikisql(release, samples, seed, tmp_path / "out")
        assert prepared.eval.records == 1
        return [record["task_id"] for record in records(prepared)]

    assert len(tasks(6)) == 6
    assert tasks(6) == tasks(9)[:6]
    assert tasks(9) != tasks(9, seed=14)


def test_the_default_place_is_the_cache(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDISTILL_CACHE_DIR", str(tmp_path / "cache"))
    for samples, name in ((1000, "wikisql_1k"), (200, "wikisql_200")):
        assert prepare_wikisql(release, samples).folder == tmp_path / "cache" / "datasets" / "wikisql" / name


def test_an_archive_in_the_cache_is_not_fetched_again(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDISTILL_CACHE_DIR", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "datasets" / "wikisql" / "data.tar.bz2"
    cached.parent.mkdir(parents=True)
    (tmp_path / "data.tar.bz2").rename(cached)
    assert prepare_wikisql(samples=5).train.records == 5


def test_no_network_is_an_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDISTILL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match=r"can't be downloaded .* --source"):
        prepare_wikisql()
    assert not list((tmp_path / "cache").rglob("*.bz2*"))


def test_nothing_but_the_expected_plain_files_leaves_an_archive(release: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(hostile, "w") as tar:
        tar.add(release / "data", "data")
        for name in ("../../escaped", "/tmp/escaped", "data/extra"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    prepare_wikisql(hostile, samples=5, output=tmp_path / "out")
    assert not list(tmp_path.rglob("escaped"))

    with tarfile.open(hostile, "w") as tar:
        for path in (release / "data").iterdir():
            if path.name != "train.db":
                tar.add(path, f"data/{path.name}")
        link = tarfile.TarInfo("data/train.db")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match=r"lacks train\.db"):
        prepare_wikisql(hostile, output=tmp_path / "out2")


def test_a_source_that_is_no_release_says_so(release: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        prepare_wikisql(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"lacks train\.jsonl"):
        prepare_wikisql(tmp_path / "release" / "..")
    (tmp_path / "data.tar.bz2").write_bytes(b"not an archive")
    with pytest.raises(InputError, match="can't be unpacked"):
        prepare_wikisql(tmp_path / "data.tar.bz2")
    (release / "data" / "train.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(InputError, match=r"train\.jsonl:1: not a line of the release"):
        prepare_wikisql(release, output=tmp_path / "out")
    (release / "data" / "train.jsonl").write_text("")
    with pytest.raises(InputError, match="no usable question"):
        prepare_wikisql(release, output=tmp_path / "out")
    (release / "data" / "train.jsonl").write_text(json.dumps(OTHER_TABLE))
    (release / "data" / "train.db").write_bytes(b"not a database" * 100)
    with pytest.raises(InputError, match="database"):
        prepare_wikisql(release, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        (["Country ( exonym )", "Pick #", "% (2000–2008)"], ["country_exonym", "pick_number", "percent_2000_2008"]),
        (["Name", "NAME", "name_2", "name"], ["name", "name_2", "name_2_2", "name_3"]),
        (["", "?!", "Group", "2005", "Año"], ["column_0", "column_1", '"group"', '"2005"', '"año"']),
        (['a "quoted" header', "x" * 100], ["a_quoted_header", "x" * 60]),
    ],
)
def test_columns_are_readable_and_unique(header: list[str], columns: list[str]) -> None:
    assert readable_columns(header) == columns
