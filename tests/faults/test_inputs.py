"""Some of the bad inputs of every kind; ``python -m tests.faults inputs`` brings about 2,000."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import inputs
from tests.faults.inputs import CASE, HERE, KINDS, OUT, Case, Ended, World, oddities, offline_world, sweep


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with offline_world() as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line_and_changes_nothing(world: World, kind: str) -> None:
    came = sweep(world, KINDS[kind][0](), 6)
    assert came["right"] == came["tried"] == 6, came["wrong"]


def test_odd_input_is_taken_whole_or_refused(world: World) -> None:
    came = sweep(world, oddities(), 6)
    assert came["right"] == came["tried"] == 6, came["wrong"]
    assert came["succeeded"] >= 3


def test_some_inputs_that_were_once_taken_or_left_something(world: World, tmp_path: Path) -> None:
    """Mistakes that went through before there was this suite."""
    score = ("score", "--pool", f"{HERE}/pool.jsonl", "--queries", f"{HERE}/queries.jsonl", "--model", f"{HERE}/model")
    short = {"short.jsonl": b'{"text": "a"}\n{"text": "b"}\n'}
    cases = [
        Case(("attribute", "--index", f"{HERE}/index", "--text", "amber", "--calibration", "nonsense"), {},
             ("nonsense",)),
        Case((*score, "--out", OUT, "--per-query", OUT), {}, ("scores.parquet",)),
        Case((*score, "--out", f"{HERE}/pool.jsonl"), {}, ("pool.jsonl",)),
        Case((*score, "--out", OUT, "--lambda-gh", "nan"), {}, ("lambda_gh",)),
        Case((*score, "--out", OUT, "--calibration", "center", "--pool", f"{CASE}/short.jsonl"), short,
             ("two tokens",)),
        Case(("index", "build", "--model", f"{HERE}/model", "--data", f"{CASE}/short.jsonl", "--out", f"{HERE}/out/a/b",
              "--dtype", "bit"), short, ("two tokens",)),
        Case(("index", "build", "--model", f"{HERE}/model", "--data", f"{HERE}/long.jsonl", "--out", f"{HERE}/out/new"),
             {}, ("positions", "max_length")),
        Case(("run", f"{CASE}/c.yaml"), {"c.yaml": b"name: a\nseed: 1\nname: b\n"}, ("c.yaml", "row 3", "'name'")),
        Case(("run", f"{HERE}/run.yaml", "--set", "seed=yes", "--out", f"{HERE}/claimed"), {}, ("run.yaml", "seed")),
    ]  # fmt: skip
    score = ("score", "--pool", f"{CASE}/words.jsonl", "--queries", f"{HERE}/queries.jsonl", "--out", OUT)
    wordless = {"words.jsonl": b'{"text": "0 0"}\n{"text": "a the of"}'}
    cases.append(Case((*score, "--method", "bm25"), wordless, odd=True))
    for case in cases:
        ended = world.run(case)
        assert ended.wrong(case) is None, (case, ended)
    assert ended.status == 0, ended


def test_the_judge_sees_what_is_wrong() -> None:
    case = Case(("score",), names=("row 3",))
    for ended, expected in (
        (Ended(2, ["rise: a.jsonl, row 3: is bad"], []), None),
        (Ended(2, ["rise: a.jsonl, row 4: is bad"], []), "does not name ['row 3']"),
        (Ended(0, [], []), "taken"), (Ended(2, [], []), "silent"), (Ended(1, ["rise: row 3"], []), "exit 1"),
        (Ended(2, ["a warning", "rise: row 3"], []), "not one line"), (Ended(2, ["row 3"], []), "not one line"),
        (Ended(2, ["rise: row 3"], ["out/x"]), "partial"), (Ended(2, ["rise: row 3\x1b[2J"], []),
                                                            "steers the terminal"),
        (Ended(1, ["Traceback (most recent call last):"], []), "traceback"),
    ):  # fmt: skip
        assert ended.wrong(case) == expected
    odd = Case(("score",), odd=True)
    assert Ended(0, [], ["out", "out/scores.parquet"]).wrong(odd) is None
    assert Ended(0, [], ["pool.jsonl"]).wrong(odd) == "left ['pool.jsonl']"


def test_the_long_run_is_of_two_thousand() -> None:
    assert sum(count for _, count in KINDS.values()) == 2_000
    assert inputs.ODD == 200
