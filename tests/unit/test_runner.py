"""Shards shared among workers of other machines, without Ray itself; and data that lies elsewhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from flows.cli import main
from tasks.common.elsewhere import at_hand
from tasks.common.errors import InputError
from tasks.scoring import share
from tasks.scoring.build import build_index
from tasks.scoring.config import FitConfig, RayConfig, ScorerConfig, SketchConfig
from tests.tiny import tiny_llama
from tests.unit.test_scoring import digest_directory, write_documents

SKETCH = SketchConfig(kr=16, kh=6, kg=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that has prefect-ray: whether it is there is all that is asked here."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json" if name == "prefect_ray" else name))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("stored", ["bit", "fp16"])
def test_shares_made_one_by_one_have_the_bytes_of_one_process(
    tmp_path: Path, model: Path, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray's workers are told is done here, one after the other; a share that is begun again keeps its shards."""
    documents = write_documents(tmp_path / "documents.parquet", 30, 0)
    fit = FitConfig(documents=12) if stored == "bit" else None
    one = ScorerConfig(model=str(model), shard_tokens=300, precision="float32", threads=1)
    build_index(documents, tmp_path / "one", one, SKETCH, stored=stored, fit=fit)
    told: list[str] = []

    def mapped(work: Any, _: Any) -> None:
        text = share._WORK.dump_json(work).decode()
        told.append(text)
        whole = share.left(text)
        assert whole == len(work.missing.sample) + len(work.missing.shards) > 4
        for part in share.parts(text):
            for rank in (1, 0):
                share.make_share(text, part, rank, 2)
            written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("two/**/*.npy")}
            share.make_share(text, part, 0, 2)
            assert written == {file: file.stat().st_mtime_ns for file in tmp_path.glob("two/**/*.npy")}
            if part == "sample":
                assert share.left(text) == len(work.missing.shards)
                share.fit_sample(text)
        assert share.left(text) == 0

    monkeypatch.setattr(share, "_map", mapped)
    two = one.model_copy(update={"processes": 2, "ray": RayConfig()})
    build_index(documents, tmp_path / "two", two, SKETCH, stored=stored, fit=fit)
    assert len(told) == 1
    assert json.loads(told[0])["job"]["documents"] == str(documents)
    assert digest_directory(tmp_path / "one") == digest_directory(tmp_path / "two")


@pytest.mark.usefixtures("installed")
def test_a_worker_with_another_model_refuses(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = write_documents(tmp_path / "documents.parquet", 8, 0)
    scorer = ScorerConfig(model=str(model), shard_tokens=300, precision="float32", threads=1, ray=RayConfig())
    told: list[str] = []
    monkeypatch.setattr(share, "_map", lambda work, _: told.append(share._WORK.dump_json(work).decode()))
    with pytest.raises(FileNotFoundError):  # nothing was made
        build_index(documents, tmp_path / "out", scorer, SKETCH)
    other = tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"the model on .* not those of the machine that shares the work"):
        share.make_share(told[0].replace(str(model), str(other)), "shards", 0, 1)
    write_documents(documents, 9, 0)
    with pytest.raises(InputError, match="the tokens on"):
        share.make_share(told[0], "shards", 0, 1)


def test_ray_is_refused_at_once_where_it_cannot_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pool.jsonl").write_text('{"text": "a document"}\n')
    found = importlib.util.find_spec

    def refused(there: bool, *settings: str) -> str:
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name: (found("json") if there else None) if name == "prefect_ray" else found(name))
        given = ["rise", "index", "build", "--model", str(model), "--data", str(tmp_path / "pool.jsonl"), "--out",
                 str(tmp_path / "out"), "--runner", "ray", "--workers", "2", *settings]
        monkeypatch.setattr("sys.argv", given)
        with pytest.raises(SystemExit) as ended:
            main()
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return error

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert "pip install '.[ray]'" in refused(False)
    assert "PREFECT_API_URL" in refused(True, "--ray", "address=head:6379")
    assert "ray.temp" in refused(True, "--ray", f"temp={tmp_path / ('long' * 10)}")
    assert "field gpus" in refused(True, "--ray", "gpus=-1")
    assert "field address" in refused(True, "--ray", "address=head")
    assert "--ray needs key=value" in refused(True, "--ray", "gpus")
    assert "goes with --runner ray" in refused(True, "--ray", "gpus=1", "--runner", "local")


def test_a_pool_is_read_from_wherever_fsspec_reads(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(3)).encode()
    fsspec.filesystem("memory").pipe_file("/bucket/pool.jsonl", lines)
    (tmp_path / "pool.jsonl").write_bytes(lines)
    for url in ("memory://bucket/pool.jsonl", (tmp_path / "pool.jsonl").as_uri()):
        with at_hand(url) as file:
            assert file.suffix == ".jsonl"
            assert file.read_bytes() == lines
            copy = file
        assert not copy.exists()
    with at_hand(tmp_path / "pool.jsonl") as file:
        assert file == tmp_path / "pool.jsonl"
    for url, problem in {"memory://bucket/none.jsonl": "no such file", "nothing://bucket/pool.jsonl": "nothing",
                         tmp_path.as_uri(): "is not a file"}.items():  # fmt: skip
        with pytest.raises(InputError, match=problem) as raised, at_hand(url):
            raise AssertionError("was read")
        assert raised.value.file == url


def test_a_bad_row_elsewhere_is_named_by_its_url(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"text": "a document"}\n{"text": 3}\n')
    for command in (["index", "build", "--data", pool.as_uri()],
                    ["score", "--pool", pool.as_uri(), "--queries", pool.as_uri()]):
        monkeypatch.setattr("sys.argv", ["rise", *command, "--model", str(model), "--out",
                                         str(tmp_path / "out.parquet")])  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert f"{pool.as_uri()}, row 2, field text: must be a string" in capsys.readouterr().err
    pool.write_text('{"text": "a document"}\n{"text": "another document"}\n')
    monkeypatch.setattr("sys.argv", ["rise", "index", "build", "--data", pool.as_uri(), "--model", str(model), "--out",
                                     str(tmp_path / "index"), "--kr", "16", "--kh", "6", "--kg", "12"])
    main()
    assert capsys.readouterr().out == f"2 documents in the index {tmp_path / 'index'}\n"
