"""Continued pretraining through accelerate: one loop for a CPU, several processes under torchrun, and GPUs.

Run again in the same directory it goes on from the last checkpoint and ends with the same bytes, because the order of
the documents, the learning rate and the random numbers of a step depend on nothing but the seed and the step.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.common.errors import InputError
from tasks.common.files import sha256_json, whole_file, write_json
from tasks.common.models import Located, load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.common.progress import Progress, Report
from tasks.common.stage import digest_directory
from tasks.pretraining.checkpoint import Checkpoint, writing
from tasks.pretraining.config import PretrainingConfig
from tasks.pretraining.data import Corpus, batch, padded, pieces, read_corpus, steps_per_epoch

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel

VERSION = 1
"""Changes when the same inputs give other weights."""

MODEL = "model"
HISTORY = "history.parquet"
TIMINGS = "timings.json"
CHECKPOINT = "checkpoint"


def train(config: PretrainingConfig, documents: Path, out: Path, *, report: Report | None = None) -> int:
    """Train ``config.model`` on the documents that an arm selected (Section 3.3, Table 4).

    The loss of a step is the mean over all target tokens of its batch, however the batch is split. The weights are
    saved as they were optimised, in float32: a step of 5e-5 is lost in a bfloat16 weight, and an evaluation in
    bfloat16 then rounds once, as autocast did. torch's random state is set; two trainings must not share a process
    at the same time.

    Args:
        config: the recipe.
        documents: Parquet with ``doc_id`` and ``text``, one document a row, in any order.
        out: directory for ``model/`` (safetensors, configuration, tokenizer), ``history.parquet`` (step from 1; epoch,
            the passes done; tokens, the step's targets; loss, in nats a token before the update; lr) and
            ``timings.json``. A checkpoint that is in it is gone on from, and removed at the end.
        report: told the share done.

    Returns:
        The number of optimizer steps.

    Raises:
        InputError: the model, the documents or ``max_length`` cannot be used, or ``out`` is of another run.
        RuntimeError: a loss or a gradient is not finite; the message names the step.
    """
    run = prepare(config, documents)  # finds the user's errors, and downloads, before other processes are started
    for part in (*out.glob(".*.part"), *out.glob(f"{CHECKPOINT}/.*.part")):
        part.unlink()  # what a killed run was writing
    if not _finished(run, out):
        if config.processes == 1:
            train_here(run, out, report=report)
        else:
            from tasks.pretraining.launch import launch

            launch(config, documents, out, report=report)
    shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
    return run.steps


@dataclass(frozen=True)
class Run:
    """What a training run is made of, known before a weight is loaded."""

    config: PretrainingConfig
    located: Located
    corpus: Corpus

    @property
    def per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_per_epoch(len(self.corpus.tokens), self.config.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return min(self.per_epoch * self.config.epochs, self.config.max_steps or self.per_epoch * self.config.epochs)

    @property
    def key(self) -> str:
        """SHA-256 over all that decides the weights."""
        return sha256_json({
            "version": VERSION, "config": self.config.plain(),
            "model": self.located.digest, "documents": self.corpus.digest,
        })  # fmt: skip

    def batch(self, step: int) -> list[tuple[int, ...]]:
        """Tokens of the documents of step ``step`` (from 0)."""
        places = batch(len(self.corpus.tokens), self.config.batch_size, self.config.seed, step)
        return [self.corpus.tokens[place] for place in places]


def prepare(config: PretrainingConfig, documents: Path) -> Run:
    """Find the model, read and tokenise the documents.

    Raises:
        InputError: the model or the documents cannot be used, or ``max_length`` is longer than the model's context.
    """
    from transformers import AutoConfig

    located = locate(config.model, revision=config.revision)
    try:
        shape = AutoConfig.from_pretrained(located.path, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(f"has a config.json that transformers cannot use ({error})", file=config.model) from None
    positions = getattr(shape, "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise InputError(
            f"max_length {config.max_length} is more than the model's {positions} positions; lower it",
            file=config.model, field="max_length",
        )
    return Run(config, located, read_corpus(documents, load_tokenizer(located), config.max_length))


def train_here(run: Run, out: Path, *, report: Report | None = None) -> None:
    """Train in this process, which may be one of several under torchrun; the main process alone writes into ``out``."""
    import torch
    from accelerate import Accelerator

    config = run.config
    started = time.perf_counter()
    with _deterministic():
        accelerator = Accelerator(cpu=not torch.cuda.is_available())  # before loading: it picks this process's device
        bare = load_causal_lm(run.located, dtype=torch.float32).train()
        if config.gradient_checkpointing:
            bare.activation_checkpointing_enable({"use_reentrant": False})
        adamw = torch.optim.AdamW(
            bare.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        checkpoint = Checkpoint(out / CHECKPOINT, run.key)
        losses = checkpoint.restore(bare, adamw)
        begun = len(losses)
        learning_rate = _schedule(run, adamw)
        model, optimizer = accelerator.prepare(bare, adamw)
        bfloat16 = torch_dtype(config.precision) == torch.bfloat16
        with _bar(accelerator, run.steps, begun, report) as add:
            for step in range(begun, run.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
                losses.append(_step(run, step, accelerator, model, optimizer, bfloat16))
                done = step + 1
                if accelerator.is_main_process and done % config.checkpoint_every == 0 and done < run.steps:
                    checkpoint.save(bare, adamw, losses)
                add(1)
        if accelerator.is_main_process:
            _save_model(bare, run.located, out / MODEL)
            _write_timings(run, begun, time.perf_counter() - started, out / TIMINGS)
            _write_history(run, losses, learning_rate, out / HISTORY)  # last: it says that the run is finished
        accelerator.wait_for_everyone()
        accelerator.end_training()


def _step(
    run: Run, step: int, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
    bfloat16: bool,
) -> float:
    """One optimizer step; returns the mean loss over the target tokens of the whole batch, in nats."""
    import torch
    import torch.nn.functional as F

    config, device = run.config, accelerator.device
    documents = run.batch(step)
    targets = sum(len(tokens) - 1 for tokens in documents)
    mine = pieces(
        [len(tokens) for tokens in documents], config.gradient_accumulation, accelerator.num_processes,
        accelerator.process_index,
    )
    # Seeding by step makes dropout a function of the step, so that a resumed run needs no stored random state.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, accelerator.process_index]).generate_state(1)[0]))
    total = torch.zeros((), device=device)
    for number, piece in enumerate(mine, start=1):
        ids, labels = (torch.from_numpy(array).to(device) for array in padded([documents[place] for place in piece]))
        with accelerator.no_sync(model) if number < len(mine) else nullcontext():
            # Without a mask attention takes its fast causal path; padding on the right is never seen by a real token.
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / targets
            # The gradients of several processes are averaged, those of a batch's tokens belong summed.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
    value = float(accelerator.reduce(total, reduction="sum"))
    if not (math.isfinite(value) and math.isfinite(float(norm))):
        raise RuntimeError(
            f"training {config.model} failed at step {step + 1} of {run.steps}: the loss is {value}, the norm of the "
            f"gradient {float(norm)}; a lower learning_rate or precision float32 may help"
        )
    optimizer.step()
    optimizer.zero_grad()
    return value


def _schedule(run: Run, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """The learning rate of a step (from 0); a function of the step, so there is no scheduler to store or restore."""
    from transformers import get_cosine_schedule_with_warmup

    scheduler = get_cosine_schedule_with_warmup(optimizer, run.config.warmup_steps, run.steps)
    return lambda step: run.config.learning_rate * float(scheduler.lr_lambdas[0](step))


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's deterministic algorithms where it has them; what was set before is set again at the end."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # a debugging aid that writes every buffer once more
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


@contextmanager
def _bar(accelerator: Accelerator, steps: int, done: int, report: Report | None) -> Iterator[Callable[[int], None]]:
    """The progress bar of the main process; the others count silently."""
    if accelerator.is_main_process:
        with Progress("pretraining", steps, "steps", done=done, report=report) as progress:
            yield progress.add
    else:
        yield lambda amount: None


def _finished(run: Run, out: Path) -> bool:
    """Whether ``out`` holds the whole result of this run.

    Raises:
        InputError: it holds the result of another one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    history = out / HISTORY
    if not history.is_file():
        return False
    try:
        table = pq.read_table(history)
        digest = _digest(table, out / MODEL)
    except (pa.ArrowException, OSError, ValueError):
        return False  # damaged
    notes = table.schema.metadata or {}
    if notes.get(b"key") != run.key.encode():
        raise InputError("is of another configuration, model or selection; train into another directory", file=history)
    return notes.get(b"sha256") == digest.encode()


def _digest(history: pa.Table, model: Path) -> str:
    """SHA-256 over the rows of a history and the files of a model."""
    return sha256_json([history.to_pydict(), digest_directory(model)])


def _save_model(model: PreTrainedModel, origin: Located, place: Path) -> None:
    """Save a directory that ``from_pretrained`` loads; it stands at ``place`` when it is whole."""
    part = place.with_name(place.name + ".part")
    for leftover in (part, place):
        shutil.rmtree(leftover, ignore_errors=True)
    with writing(place):
        model.save_pretrained(part)
    load_tokenizer(origin).save_pretrained(part)  # a new one: the one that was used would keep its truncation
    os.replace(part, place)


def _write_history(run: Run, losses: Sequence[float], learning_rate: Callable[[int], float], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    steps = range(run.steps)
    columns: dict[str, Any] = {
        "step": pa.array([step + 1 for step in steps], pa.int64()),
        "epoch": pa.array([(step + 1) / run.per_epoch for step in steps], pa.float64()),
        "tokens": pa.array([_targets(run, step) for step in steps], pa.int64()),
        "loss": pa.array(losses, pa.float64()),
        "lr": pa.array([learning_rate(step) for step in steps], pa.float64()),
    }
    table = pa.table(columns)
    notes = {"key": run.key, "documents": str(len(run.corpus.tokens)), "left_out": str(run.corpus.left_out),
             "sha256": _digest(table, path.with_name(MODEL))}  # fmt: skip
    with whole_file(path) as part:
        pq.write_table(table.replace_schema_metadata(notes), part)


def _write_timings(run: Run, begun: int, seconds: float, path: Path) -> None:
    """Times of this call: a resumed run counts from its checkpoint on."""
    tokens = sum(_targets(run, step) for step in range(begun, run.steps))
    write_json(
        path,
        {"seconds": seconds, "steps": run.steps - begun, "tokens": tokens, "tokens_per_second": tokens / seconds},
    )


def _targets(run: Run, step: int) -> int:
    return sum(len(tokens) - 1 for tokens in run.batch(step))
