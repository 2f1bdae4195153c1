"""Processes that run a library, and what is said where the library is not there; none of it needs the extra."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tasks.common import models
from tasks.common.errors import InputError
from tasks.common.files import write_text
from tasks.common.usage import measured
from tasks.scoring.batching import Tokenized
from tasks.scoring.config import EkfacConfig, MethodConfig, TrackStarConfig
from tasks.scoring.methods import Request, score_pool
from tasks.scoring.rivals import ekfac, trackstar
from tasks.scoring.rivals.child import read_tokens, run_child, write_tokens


def echo(folder: Path, then: str, *, mib: int = 0, **options: object) -> None:
    run_child("tests.rivals.echo", {"then": then, "pid": str(folder / "pid"), "mib": mib}, folder / "echo.log",
              label="echo", documents=8, **options)  # type: ignore[arg-type]  # fmt: skip


def test_progress_is_told_and_the_log_goes_when_all_went_well(tmp_path: Path) -> None:
    shares: list[float] = []
    echo(tmp_path, "end", report=shares.append)
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert not list(tmp_path.iterdir())


def test_what_it_used_counts(tmp_path: Path) -> None:
    with measured() as alone:
        pass
    with measured() as usage:
        echo(tmp_path, "grow", mib=int(alone.peak_mib or 0) + 200)
    assert alone.peak_mib is not None
    assert usage.peak_mib is not None
    assert usage.peak_mib > alone.peak_mib + 200
    assert 0.3 <= (usage.search_seconds or 0) < 5


def test_what_the_user_gave_wrong_arrives_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^pool.parquet, row 3, field text: is not right$"):
        echo(tmp_path, "refuse")


def test_a_librarys_failure_is_one_line_and_the_log_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        echo(tmp_path, "fail")
    assert str(caught.value) == (f"echo failed: ZeroDivisionError: the library's own fault "
                                 f"(its log: {tmp_path / 'echo.log'})")  # fmt: skip
    log = (tmp_path / "echo.log").read_text()
    assert "a library's own words" in log
    assert "Traceback" in log


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from tests.rivals.test_child import echo; echo(Path({str(tmp_path)!r}), 'wait')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    os.kill(child, 0)  # it is there
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_tokens_come_back_as_they_were(tmp_path: Path) -> None:
    documents = Tokenized.of(["a", "b", "c"], [[5, 6, 7], [1], [2, 3]])
    write_tokens(documents, [2, 1], tmp_path / "tokens.npz")
    assert [ids.tolist() for ids in read_tokens(tmp_path / "tokens.npz")] == [[5, 6, 7], [2, 3]]
    assert read_tokens(tmp_path / "tokens.npz")[0].dtype == np.int32


@pytest.mark.parametrize(("config", "library"), [(TrackStarConfig(), "bergson"), (EkfacConfig(), "kronfluence")])
def test_without_the_library_one_line_says_what_to_install(
    config: MethodConfig, library: str, asked: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    for loads in ("locate", "load_tokenizer", "load_causal_lm"):
        monkeypatch.setattr(models, loads, None)
    with pytest.raises(InputError, match=rf"{config.method} needs {library}.*pip install .*rivals.* --no-deps bergson"):
        score_pool(config, asked)


@pytest.mark.parametrize("given", [{"unit_normalize": False, "calibration": "center"}, {"projection_dim": 0}])
def test_what_does_not_go_together_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"goes with unit_normalize|needs a projection"):
        TrackStarConfig(**given)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_before_anything_starts(
    asked: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (ekfac, trackstar):
        monkeypatch.setattr(module, "require", lambda library, method: None)
        monkeypatch.setattr(module, "run_child", None)
    # Layers with so many outputs that their factors alone take more than any machine of today has.
    config = asked.scorer.model_copy(update={"model": str(_wide(Path(asked.scorer.model), tmp_path / "wide"))})
    wide = Request(asked.pool, asked.queries, config, tmp_path / "work")
    for method in (EkfacConfig(), TrackStarConfig(projection_dim=0, hessian=False, token_batch_size=256)):
        with pytest.raises(InputError, match=r"needs about [\d.]+ GiB"):
            score_pool(method, wide)
    assert not list((tmp_path / "work").rglob("*.*"))


def _wide(model: Path, folder: Path) -> Path:
    """The same model with feed-forward layers of ten billion units in its configuration, and no weights."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text())
    write_text(folder / "config.json", json.dumps({**config, "intermediate_size": 10_000_000_000}))
    return folder
