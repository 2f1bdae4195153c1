"""SIGKILL at a few random moments of an index that is built and added to. ``python -m tests.faults kill`` does more."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.scoring.index import Index
from tests.faults import world
from tests.faults.kill import killed
from tests.faults.world import Scenario
from tests.tiny import tiny_llama


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    """An index of bits with spreads: built one night, added to the next."""
    model, data = tiny_llama(tmp_path / "model"), tmp_path / "data"

    def night(number: int) -> Callable[[], None]:
        return lambda: world.arrive(data, number, documents=24)

    def command(out: Path) -> list[object]:
        if (out / "manifest.json").exists():
            whole = len(Index(out)) == 48 and not (out / "append.json").exists()
            return ["index", "verify", out] if whole else ["index", "append", out, "--data", data / "0001.jsonl"]
        sketch = [part for name, value in world.SIGNATURE.items() for part in (f"--{name}", value)]
        return ["index", "build", "--model", model, "--data", data / "0000.jsonl", "--out", out, "--precision",
                "float32", "--dtype", "bit", "--calibration", "median-bit+spread", "--fit-documents", 10,
                "--max-length", 96, "--shard-tokens", 600, *sketch]  # fmt: skip

    return Scenario("index", (night(0), night(1)), command, world.tree)


def test_killed_at_random_moments_it_ends_as_if_left_alone(scenario: Scenario, tmp_path: Path) -> None:
    left = world.left_alone(scenario, tmp_path / "alone")
    figures = killed(scenario, left, tmp_path / "killed", 6, random.Random(1))
    assert (figures["tried"], figures["survived"], figures["lost"], figures["recomputed"]) == (6, 6, 0, 0), figures
    assert figures["whole files looked at"] > 0


def test_an_index_of_floats_may_go_when_its_own_is_there() -> None:
    before = {"indexes/a.early/shards/0.npy": (1, 1), "indexes/b.early/shards/0.npy": (2, 1)}
    after = {"indexes/a/shards/0.npy": (3, 1)}
    assert world.again(before, after) == ["indexes/b.early/shards/0.npy"]
    assert world.again(before, {**before, "indexes/a.early/shards/0.npy": (4, 1), **after}) == [
        "indexes/a.early/shards/0.npy"]  # fmt: skip


def test_what_is_whole_and_made_again_is_counted(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("00000.json", "00000.signatures.npy", "00001.signatures.npy"):
        (tmp_path / "shards" / name).write_bytes(b"1")
    before = world.whole(tmp_path)
    assert list(before) == ["shards/00000.signatures.npy"]  # shard 1 has no entry: it is not whole
    assert world.again(before, world.whole(tmp_path)) == []
    (tmp_path / "shards" / "part").write_bytes(b"1")
    (tmp_path / "shards" / "part").replace(tmp_path / "shards" / "00000.signatures.npy")
    assert world.again(before, world.whole(tmp_path)) == ["shards/00000.signatures.npy"]
