"""Continued pretraining: the optimisation is right, and the same however it is split, interrupted or ordered."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.common.errors import InputError
from tasks.common.files import read_json, sha256_file, write_json
from tasks.pretraining.config import PretrainingConfig
from tasks.pretraining.train import train
from tests.tiny import POSITIONS, tiny_gpt_neox, tiny_llama

TEXTS = {
    f"d{number:02d}": f"{'ab' * (3 + 5 * number % 17)} document {number} says {'xyz ' * (number % 4)}"
    for number in range(13)
}
REPOSITORY = Path(__file__).resolve().parents[2]


def write_documents(path: Path, texts: dict[str, str]) -> Path:
    pq.write_table(pa.table({"doc_id": list(texts), "text": list(texts.values())}), path)
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """13 documents of 6 to 80 tokens: four batches of four, the last with one document."""
    return write_documents(tmp_path / "documents.parquet", TEXTS)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "llama")


def recipe(model: Path, **values: Any) -> PretrainingConfig:
    defaults: dict[str, Any] = {
        "model": str(model), "precision": "float32", "learning_rate": 3e-3, "batch_size": 4, "epochs": 3,
        "max_length": 64,
    }
    return PretrainingConfig(**{**defaults, **values})


def history(out: Path) -> dict[str, list[Any]]:
    return dict(pq.read_table(out / "history.parquet").to_pydict())


def weights(out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(out / "model" / "model.safetensors"))


def digests(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): sha256_file(path)
        for path in sorted(out.rglob("*")) if path.is_file() and path.name != "timings.json"
    }


class Interrupted(Exception):
    pass


def interrupt_after(share: float) -> Callable[[float], None]:
    def report(done: float) -> None:
        if done >= share:
            raise Interrupted

    return report


def test_it_learns_and_says_how(llama: Path, documents: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told: list[float] = []
    assert train(recipe(llama, epochs=10), documents, tmp_path / "out", report=told.append) == 40
    rows = history(tmp_path / "out")
    assert list(rows) == ["step", "epoch", "tokens", "loss", "lr"]
    assert rows["step"] == list(range(1, 41))
    assert rows["epoch"] == pytest.approx([step / 4 for step in range(1, 41)])
    assert rows["loss"][0] == pytest.approx(math.log(258), abs=0.2)  # an untrained model knows nothing
    assert sum(rows["loss"][-4:]) / 4 < 0.7 * rows["loss"][0]
    # Every epoch sees every target once, in another order.
    targets = sum(min(len(text.encode()), 64) - 1 for text in TEXTS.values())
    epochs = [rows["tokens"][start : start + 4] for start in range(0, 40, 4)]
    assert {sum(epoch) for epoch in epochs} == {targets}
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert told[0] == 0
    assert told[-1] == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["history.parquet", "model", "timings.json"]
    timings = read_json(tmp_path / "out" / "timings.json")
    assert timings["steps"] == 40
    assert timings["tokens"] == 10 * targets
    assert timings["tokens_per_second"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype="auto")
    assert str(model.dtype) == "torch.float32"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model")("ab").input_ids == [66, 67]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt_neox])
def test_the_optimisation_is_that_of_a_plain_loop(
    build: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    """Against a loop of the plainest kind: one document at a time, masked, transformers' own loss, unfused AdamW."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    from tasks.pretraining.data import batch

    path = build(tmp_path / "model")
    config = recipe(path, warmup_steps=3, gradient_clip=2.5)
    train(config, documents, tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, foreach=False)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 3, 12)
    texts = [TEXTS[doc_id] for doc_id in sorted(TEXTS)]
    losses, rates, norms = [], [], []
    for step in range(12):
        encoded = [
            tokenizer(texts[place], truncation=True, max_length=64, return_tensors="pt")
            for place in batch(13, 4, config.seed, step)
        ]
        targets = sum(one["input_ids"].shape[1] - 1 for one in encoded)
        loss = sum(
            model(**one, labels=one["input_ids"]).loss * (one["input_ids"].shape[1] - 1) / targets for one in encoded
        )
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 2.5)))
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    rows = history(tmp_path / "out")
    assert min(norms) < 2.5 < max(norms)  # some gradients are cut, some are not
    assert rows["loss"] == pytest.approx(losses, abs=2e-5)
    assert rows["lr"] == pytest.approx(rates, abs=1e-12)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=0, atol=1e-4)


def test_the_learning_rate_is_half_a_cosine(llama: Path, documents: Path, tmp_path: Path) -> None:
    train(recipe(llama, max_steps=10, warmup_steps=2), documents, tmp_path / "out")
    rates = history(tmp_path / "out")["lr"]
    rise = [0.0, 0.5]
    fall = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([3e-3 * factor for factor in rise + fall], abs=1e-12)


def test_two_runs_are_the_same_bytes(tmp_path: Path, documents: Path) -> None:
    """Even with dropout, and with the documents in another order in the file."""
    model = tiny_gpt_neox(tmp_path / "model", hidden_dropout=0.2)
    shuffled = write_documents(tmp_path / "shuffled.parquet", dict(reversed(TEXTS.items())))
    train(recipe(model), documents, tmp_path / "one")
    train(recipe(model), shuffled, tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert {"history.parquet", "model/model.safetensors", "model/config.json"} <= set(digests(tmp_path / "one"))
    train(recipe(model, seed=43), documents, tmp_path / "three")
    assert history(tmp_path / "three")["tokens"] != history(tmp_path / "one")["tokens"]


@pytest.mark.parametrize(("every", "share", "kept"), [(5, 0.6, 5), (2, 0.85, 10), (100, 0.5, 0)])
def test_a_resumed_run_is_the_uninterrupted_one(
    every: int, share: float, kept: int, documents: Path, tmp_path: Path
) -> None:
    """Interrupted in step 8 or 11 of 12, with and without a checkpoint, with dropout."""
    model = tiny_gpt_neox(tmp_path / "model", hidden_dropout=0.2)
    config = recipe(model, checkpoint_every=every)
    train(config, documents, tmp_path / "whole")
    out = tmp_path / "resumed"
    with pytest.raises(Interrupted):
        train(config, documents, out, report=interrupt_after(share))
    assert not (out / "model").exists()
    assert (out / "checkpoint").exists() == (kept > 0)
    told: list[float] = []
    assert train(config, documents, out, report=told.append) == 12
    assert told[0] == pytest.approx(kept / 12)
    assert read_json(out / "timings.json")["steps"] == 12 - kept
    assert digests(out) == digests(tmp_path / "whole")
    assert not (out / "checkpoint").exists()


def wait_until(happens: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def start(config: PretrainingConfig, documents: Path, out: Path) -> subprocess.Popen[bytes]:
    """Train in a process group of its own, to be killed."""
    spec = out.with_suffix(".json")
    write_json(spec, config.plain())
    program = (
        "import json, sys; from pathlib import Path;"
        "from tasks.pretraining.config import PretrainingConfig; from tasks.pretraining.train import train;"
        "train(PretrainingConfig(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(spec), str(documents), str(out)],
        cwd=REPOSITORY, stderr=subprocess.DEVNULL, start_new_session=True,
    )


def test_a_killed_run_goes_on(llama: Path, documents: Path, tmp_path: Path) -> None:
    config = recipe(llama, epochs=25, checkpoint_every=3)
    train(config, documents, tmp_path / "whole")
    out = tmp_path / "killed"
    state = out / "checkpoint" / "state.safetensors"
    process = start(config, documents, out)
    try:
        wait_until(state.exists, 60)
        first = state.stat().st_ino
        wait_until(lambda: state.stat().st_ino != first, 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "history.parquet").exists()
    (out / "checkpoint" / ".state.safetensors.1.part").write_bytes(b"half a checkpoint")
    told: list[float] = []
    train(config, documents, out, report=told.append)
    assert told[0] > 0
    assert digests(out) == digests(tmp_path / "whole")


def test_a_finished_run_is_not_made_again(llama: Path, documents: Path, tmp_path: Path) -> None:
    config = recipe(llama)
    train(config, documents, tmp_path / "out")
    before = (tmp_path / "out" / "model" / "model.safetensors").stat()
    # A run killed between its last file and the removal of its checkpoint.
    (tmp_path / "out" / "checkpoint").mkdir()
    assert train(config, documents, tmp_path / "out") == 12
    assert (tmp_path / "out" / "model" / "model.safetensors").stat() == before
    assert not (tmp_path / "out" / "checkpoint").exists()
    with pytest.raises(InputError, match="of another configuration"):
        train(recipe(llama, seed=1), documents, tmp_path / "out")


def test_the_checkpoint_of_another_run_is_refused(llama: Path, documents: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(recipe(llama, checkpoint_every=2), documents, tmp_path / "out", report=interrupt_after(0.5))
    other = write_documents(tmp_path / "other.parquet", {**TEXTS, "d00": "another text"})
    for every, selected in ((3, documents), (2, other)):
        with pytest.raises(InputError, match=r"state\.safetensors: the checkpoint is of another"):
            train(recipe(llama, checkpoint_every=every), selected, tmp_path / "out")
    (tmp_path / "out" / "checkpoint" / "state.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="cannot be read"):
        train(recipe(llama, checkpoint_every=2), documents, tmp_path / "out")


def test_a_full_disk_is_told_and_loses_nothing(llama: Path, documents: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for it."""
    config = recipe(llama, checkpoint_every=2)
    with pytest.raises(Interrupted):
        train(config, documents, tmp_path / "out", report=interrupt_after(0.5))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(InputError, match=r"state\.safetensors: cannot be written"):
            train(config, documents, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told: list[float] = []
    assert train(config, documents, tmp_path / "out", report=told.append) == 12
    assert told[0] > 0


@pytest.mark.parametrize("changes", [{"gradient_accumulation": 2}, {"gradient_accumulation": 3},
                                     {"gradient_checkpointing": True}])  # fmt: skip
def test_the_split_of_a_batch_changes_nothing(
    changes: dict[str, Any], llama: Path, documents: Path, tmp_path: Path
) -> None:
    import torch

    train(recipe(llama), documents, tmp_path / "whole")
    train(recipe(llama, **changes), documents, tmp_path / "split")
    whole, split = history(tmp_path / "whole"), history(tmp_path / "split")
    assert split["tokens"] == whole["tokens"]
    assert split["loss"] == pytest.approx(whole["loss"], abs=2e-5)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "split")[name], tensor, rtol=0, atol=1e-4)


def test_two_processes_are_one(llama: Path, documents: Path, tmp_path: Path) -> None:
    """Also when they are killed on the way: the workers end with the process that started them, and it goes on.

    There are 13 documents in batches of four, so that in the last batch of an epoch one process has none.
    """
    import torch

    shared: dict[str, Any] = {"epochs": 40, "learning_rate": 2e-4}
    train(recipe(llama, **shared), documents, tmp_path / "one")
    config = recipe(llama, **shared, processes=2, gradient_accumulation=2, checkpoint_every=2)
    out = tmp_path / "two"
    process = start(config, documents, out)
    try:
        wait_until((out / "checkpoint" / "state.safetensors").exists, 90)
    finally:
        process.send_signal(signal.SIGKILL)  # this process alone, not its workers
        process.wait()
    wait_until(lambda: not group_exists(process.pid), 30)
    assert not (out / "history.parquet").exists()

    told: list[float] = []
    assert train(config, documents, out, report=told.append) == 160
    assert 0 < told[0] < told[-1] == 1
    assert history(out)["loss"] == pytest.approx(history(tmp_path / "one")["loss"], abs=1e-5)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(out)[name], tensor, rtol=0, atol=1e-4)
    assert sorted(path.name for path in out.iterdir()) == ["history.parquet", "model", "timings.json"]


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_error_of_a_worker_is_told(llama: Path, documents: Path, tmp_path: Path) -> None:
    from tasks.pretraining.launch import launch

    with pytest.raises(RuntimeError, match="failed at step 1 of 12: the loss is nan"):
        launch(recipe(poisoned(llama)), documents, tmp_path / "out")


def poisoned(model: Path) -> Path:
    """The model with a weight that is not a number."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def test_a_loss_that_is_not_finite_names_its_step(llama: Path, documents: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed at step 1 of 12: the loss is nan"):
        train(recipe(poisoned(llama)), documents, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_bfloat16_is_autocast_over_float32_weights(llama: Path, documents: Path, tmp_path: Path) -> None:
    import torch

    train(recipe(llama, max_steps=4), documents, tmp_path / "float32")
    train(recipe(llama, max_steps=4, precision="bfloat16"), documents, tmp_path / "bfloat16")
    exact, rounded = history(tmp_path / "float32")["loss"], history(tmp_path / "bfloat16")["loss"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.02)
    assert {tensor.dtype for tensor in weights(tmp_path / "bfloat16").values()} == {torch.float32}


def test_documents_without_a_target_are_left_out_and_counted(llama: Path, documents: Path, tmp_path: Path) -> None:
    train(recipe(llama, max_steps=2), documents, tmp_path / "without")
    more = write_documents(tmp_path / "more.parquet", {**TEXTS, "d001": "", "zz": "a"})
    train(recipe(llama, max_steps=2), more, tmp_path / "with")
    notes = pq.read_schema(tmp_path / "with" / "history.parquet").metadata
    assert (notes[b"documents"], notes[b"left_out"]) == (b"13", b"2")
    assert history(tmp_path / "with") == history(tmp_path / "without")


@pytest.mark.parametrize("texts", [{}, {"a": "", "b": "x"}])
def test_an_empty_selection_is_an_error(texts: dict[str, str], llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"doc_id": pa.array(list(texts), pa.string()),
                             "text": pa.array(list(texts.values()), pa.string())}), path)  # fmt: skip
    with pytest.raises(InputError, match=r"empty\.parquet: nothing to train on"):
        train(recipe(llama), path, tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"doc_id": ["a", "b"]}, "field text: no such column"),
        ({"doc_id": ["a", "b"], "text": ["ab", None]}, "row 2, field text: must be a string, is NoneType"),
        ({"doc_id": [1, 2], "text": ["ab", "cd"]}, "row 1, field doc_id: must be a string, is int"),
        ({"doc_id": ["a", "a"], "text": ["ab", "cd"]}, "row 2, field doc_id: 'a' is there twice"),
    ],
)
def test_malformed_documents_are_named(table: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table(table), tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=message) as caught:
        train(recipe(llama), tmp_path / "bad.parquet", tmp_path / "out")
    assert "bad.parquet" in str(caught.value)


def test_documents_that_are_no_parquet_are_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        train(recipe(llama), tmp_path / "missing.parquet", tmp_path / "out")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="not a Parquet file"):
        train(recipe(llama), tmp_path / "text.parquet", tmp_path / "out")


def test_a_length_beyond_the_context_is_an_error(llama: Path, documents: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"max_length {POSITIONS + 1} is more than the model's {POSITIONS} positions"):
        train(recipe(llama, max_length=POSITIONS + 1), documents, tmp_path / "out")


def test_more_pieces_than_documents_are_an_error(llama: Path) -> None:
    with pytest.raises(ValueError, match="more than the batch_size"):
        recipe(llama, processes=2, gradient_accumulation=3)


def test_pieces_share_a_batch_out() -> None:
    from tasks.pretraining.data import pieces

    lengths = [5, 90, 7, 80, 6]
    assert pieces(lengths, 2, 1, 0) == [[1, 3, 2], [4, 0]]
    shared = [piece for rank in range(2) for piece in pieces(lengths, 2, 2, rank)]
    assert sorted(place for piece in shared for place in piece) == [0, 1, 2, 3, 4]
    assert pieces([3], 2, 2, 1) == [[], []]
