"""Files that are damaged, left over or held: found and named, or made again. More: ``python -m tests.faults damage``.

What a fault brought to light once stands here as a test of its own.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
import torch

from tasks.common import stage as stages
from tasks.common.errors import InputError
from tasks.common.files import intact, locked, nothing_left, read_json, whole_file, write_json
from tasks.common.progress import Progress
from tasks.common.stage import Ref, run_stage
from tasks.pool.documents import read_documents, write_documents
from tasks.pretraining.checkpoint import Checkpoint
from tasks.scoring import index as indexes
from tasks.scoring.build import append_index, build_index
from tasks.scoring.config import FitConfig, ScorerConfig, SketchConfig
from tasks.selection.database import connect, new_tables
from tests.faults import world
from tests.tiny import tiny_llama
from tests.unit.test_curation import Curate, arrive, conf, curate, models

__all__ = ["conf", "curate", "models"]  # fixtures


def flip(path: Path, place: int = -1) -> None:
    """Turn a bit of one byte, the middle one by default."""
    content = bytearray(path.read_bytes())
    content[place if place >= 0 else len(content) // 2] ^= 1
    path.write_bytes(content)


# Stages ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Callable[[], tuple[Ref, int]]:
    """Make a stage, or find it: its reference and how often it was worked on so far."""
    calls = []

    def work(out: Path) -> int:
        calls.append(out)
        (out / "rows").mkdir(exist_ok=True)
        (out / "rows" / "one.txt").write_text("one")
        return 1

    def make() -> tuple[Ref, int]:
        ref = run_stage(tmp_path / "made", stage="pool", version=1, config={}, inputs={}, work=work)
        return ref, len(calls)

    return make


@pytest.mark.parametrize("file", ["rows/one.txt", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:2]), Path.unlink])
def test_a_damaged_stage_is_made_again(
    made: Callable[[], tuple[Ref, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str,
    damage: Callable[[Path], None],
) -> None:  # fmt: skip
    first, _ = made()
    damage(tmp_path / "made" / file)
    again, calls = made()
    assert (again.digest, again.cached, calls) == (first.digest, False, 2)
    assert made()[0].cached
    if damage is not Path.unlink or file != "manifest.json":
        assert str(tmp_path / "made") in capsys.readouterr().err


def test_what_a_killed_process_was_writing_is_no_part_of_a_stage(
    made: Callable[[], tuple[Ref, int]], tmp_path: Path
) -> None:
    first, _ = made()
    unfinished = tmp_path / "made.partial"
    (tmp_path / "made").rename(unfinished)
    (unfinished / "manifest.json").unlink()
    (unfinished / "rows" / ".one.txt.4711.part").write_text("on")
    again, calls = made()
    assert (again.digest, again.cached, calls) == (first.digest, False, 2)
    assert not [*tmp_path.rglob("*.part"), *tmp_path.glob("*.partial")]


def test_a_stage_killed_before_it_got_its_name_is_not_made_again(
    made: Callable[[], tuple[Ref, int]], tmp_path: Path
) -> None:
    first, _ = made()
    (tmp_path / "made").rename(tmp_path / "made.partial")
    again, calls = made()
    assert (again.digest, again.path, calls) == (first.digest, first.path, 1)


def test_a_stage_lets_files_be_that_others_hide_in_it(made: Callable[[], tuple[Ref, int]], tmp_path: Path) -> None:
    made()
    (tmp_path / "made" / ".nfs0001").write_text("")
    assert made()[0].cached


def test_a_stage_made_before_there_were_checksums_is_found(
    made: Callable[[], tuple[Ref, int]], tmp_path: Path
) -> None:
    made()
    manifest = tmp_path / "made" / stages.MANIFEST
    write_json(manifest, read_json(manifest))
    assert made()[0].cached


# Files ----------------------------------------------------------------------------------------------------------------


def test_json_with_a_checksum_is_what_was_written_or_an_error(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    write_json(file, {"run": 1, "digest": "abc"}, checked=True)
    assert read_json(file) == {"run": 1, "digest": "abc"}
    whole = file.read_text()
    for damaged in (whole.replace("abc", "abd"), whole[:-10], whole.replace("1", "2", 1)):
        file.write_text(damaged)
        with pytest.raises(InputError, match=f"^{file}: is damaged"):
            read_json(file)


def test_a_noted_file_is_intact_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "one.bin"
    assert not intact(file)
    with pytest.raises(ZeroDivisionError), whole_file(file, noted=True) as part:
        part.write_bytes(b"one"[: 1 // 0])
    assert not list(tmp_path.iterdir())
    with whole_file(file, noted=True) as part:
        part.write_bytes(b"one")
    assert intact(file)
    subprocess.run(["sha256sum", "-c", "--quiet", "one.bin.sha256"], cwd=tmp_path, check=True)
    flip(file)
    assert not intact(file)
    flip(file)
    (tmp_path / "one.bin.sha256").write_bytes(b"")
    assert not intact(file)


def test_a_directory_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        with pytest.raises(InputError, match="another run is at work"), locked(tmp_path / "a" / "b"):
            pass
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()  # nothing was written


def refused(directory: Path, file: str) -> None:
    """Write a file and end by bad input."""
    with locked(directory), nothing_left(directory):
        (directory / file).write_text("")
        raise InputError("bad")


def test_bad_input_leaves_a_held_directory_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bad"):
        refused(tmp_path / "a", "part")
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "kept").write_text("")
    with pytest.raises(InputError, match="bad"):
        refused(tmp_path / "a", "part")
    assert (tmp_path / "a" / "kept").exists()


def test_a_damaged_database_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "book.duckdb"
    with duckdb.connect(file) as con:
        con.execute("CREATE TABLE t AS SELECT range AS x, repeat('x', 50) || range AS y FROM range(50)")
    content = bytearray(file.read_bytes())
    for place in range(3 * 4096, len(content), 5000):
        content[place] ^= 255
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{file}: is "), connect(file, read_only=True) as con:
        con.execute("SELECT sum(x), max(y) FROM t").fetchall()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_error_of_who_is_told_has_a_line_of_its_own(share: float, capsys: pytest.CaptureFixture[str]) -> None:
    def tell(told: float) -> None:
        if told >= share:
            raise ConnectionError("gone")

    def work() -> None:
        with Progress("work", 2, "steps", report=tell) as progress:
            progress.add(1)
            progress.add(1)

    with pytest.raises(ConnectionError):
        work()
    assert capsys.readouterr().err.endswith("\r")


# Unfinished work ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[Path], None]]:
    """Where an index of bits with spreads stands, whole and unfinished, and what builds it."""
    folder = tmp_path_factory.mktemp("index")
    model = tiny_llama(folder / "model")
    world.arrive(folder, 0, documents=30)
    write_documents(folder / "pool.parquet", read_documents(folder / "0000.jsonl").table)
    scorer = ScorerConfig(model=str(model), precision="float32", max_length=96, batch_tokens=300, shard_tokens=600,
                          threads=1)  # fmt: skip

    def build(out: Path) -> None:
        build_index(folder / "pool.parquet", out, scorer, SketchConfig(**world.SIGNATURE), stored="bit",
                    fit=FitConfig(name="median-bit+spread", documents=10))  # fmt: skip

    with pytest.MonkeyPatch.context() as killed:
        killed.setattr(indexes, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(folder / "unfinished")
    build(folder / "whole")
    return folder, build


@pytest.mark.parametrize("file", ["shards/00001.signatures.npy", "shards/00001.documents.parquet",
                                  "shards/00001.spread.npy", "shards/00001.json", "calibration.npy", "reference.npy",
                                  "calibration.npy.sha256"])  # fmt: skip
def test_a_damaged_file_of_an_unfinished_index_is_made_again(
    index: tuple[Path, Callable[[Path], None]], tmp_path: Path, file: str
) -> None:
    folder, build = index
    out = Path(shutil.copytree(folder / "unfinished", tmp_path / "index"))
    flip(out / file)
    build(out)
    assert world.tree(out) == world.tree(folder / "whole")


def test_a_damaged_plan_of_an_index_is_named(index: tuple[Path, Callable[[Path], None]], tmp_path: Path) -> None:
    out = Path(shutil.copytree(index[0] / "whole", tmp_path / "index"))
    plan = out / "plan.json"
    plan.write_text(plan.read_text().replace('"kr": 16', '"kr": 17'))
    world.arrive(tmp_path, 5, documents=3)
    write_documents(tmp_path / "more.parquet", read_documents(tmp_path / "0005.jsonl").table)
    scorer = ScorerConfig(model=str(index[0] / "model"), precision="float32", max_length=96)
    with pytest.raises(InputError, match=f"^{plan}: is damaged"):
        append_index(tmp_path / "more.parquet", out, scorer)


@pytest.mark.parametrize("file", ["calibration.npy", "reference.npy"])
def test_building_a_whole_index_again_does_not_take_a_damaged_calibration_over(
    index: tuple[Path, Callable[[Path], None]], tmp_path: Path, file: str
) -> None:
    folder, build = index
    out = Path(shutil.copytree(folder / "whole", tmp_path / "index"))
    flip(out / file)
    with pytest.raises(InputError, match=f"^{out / file}: is damaged"):
        build(out)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(50, 50)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 50)).sum().backward()
    optimizer.step()
    checkpoint = Checkpoint(tmp_path, "key")
    checkpoint.save(model, optimizer, [1.0])
    assert checkpoint.restore(model, optimizer) == [1.0]
    flip(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match=r"state\.safetensors: the checkpoint is damaged"):
        checkpoint.restore(model, optimizer)


# Curation -------------------------------------------------------------------------------------------------------------


def test_a_curation_puts_right_what_it_can_and_names_the_rest(conf: Path, curate: Curate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = curate(out)
    kept = "selected.parquet", "card.md", "card.json"
    selection = world.tree(out / "selections", kept)
    for file in ("selections/0001/selected.parquet", "latest", "digests.json"):
        flip(out / file)
        assert curate(out) == {**first, "what": "nothing is new"}, file
        assert world.tree(out / "selections", kept) == selection, file
        assert (out / "latest").read_text() == "selections/0001\n"
    arrive(conf)
    for file in ("runs/0001/run.json", "runs/0001/intake/documents.parquet", "runs/0001/result/selected.parquet"):
        flip(out / file)
        with pytest.raises(InputError, match="is damaged") as error:
            curate(out)
        assert str(error.value.file) in {str(out / file), str((out / file).parent)}
        flip(out / file)
    (tokens,) = out.glob("tokens/*/0001.parquet")
    flip(tokens)
    second = curate(out)
    shutil.rmtree(out)
    (conf.parent / "inbox" / "more.jsonl").rename(conf.parent / "more.jsonl")
    curate(out)
    (conf.parent / "more.jsonl").rename(conf.parent / "inbox" / "more.jsonl")
    assert curate(out)["digest"] == second["digest"]


def test_a_ledger_that_the_disk_has_no_room_for_is_not_there(tmp_path: Path) -> None:
    file, tables = tmp_path / "book.duckdb", {"t": "x BIGINT, y VARCHAR"}

    def write() -> None:
        with new_tables(file, tables) as con:
            con.execute("INSERT INTO t SELECT range, md5(range::VARCHAR) FROM range(50)")

    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, most[1]))  # the log of the changes has room, the tables do not
    try:
        with pytest.raises(InputError, match="cannot be written"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert list(tmp_path.iterdir()) == []
    write()
    with connect(file, read_only=True) as con:
        assert con.execute("SELECT count(*) FROM t").fetchall() == [(50,)]
