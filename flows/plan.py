"""``rise plan``: tokens, time, memory and disk of a run before it is begun. Counted, never measured: an estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flows.config import ClosedLoopConfig
from flows.config import load as load_closed_loop
from flows.curation_config import CurationConfig
from flows.curation_config import load as load_curation
from flows.lds_config import LdsConfig
from flows.lds_config import load as load_lds
from flows.study_config import PREDICT, RECALL, StudyConfig
from flows.study_config import load as load_study
from tasks.common.config import parse, read_yaml
from tasks.common.errors import InputError
from tasks.common.hardware import SKETCHING, Machine, Shape, here, named, shape_of
from tasks.evaluation.config import EvaluationConfig
from tasks.pool.config import PoolConfig
from tasks.pool.documents import read_documents
from tasks.pool.intake import files_of
from tasks.pretraining.config import PretrainingConfig
from tasks.scoring.config import (
    EkfacConfig,
    EmbeddingConfig,
    GShapleyConfig,
    HiddenConfig,
    IndexType,
    LmHeadConfig,
    LoGraConfig,
    MethodConfig,
    PerplexityConfig,
    RapidInConfig,
    RiseConfig,
    ScorerConfig,
    SketchConfig,
    TmcShapleyConfig,
    TrackStarConfig,
    ZoInfConfig,
)
from tasks.scoring.plan import PIECE
from tasks.scoring.store import bytes_a_document

TOKENS_A_WORD, BYTES_A_TOKEN = 1.9, 3.4
"""Of SmolLM2's tokenizer on the demo pool (30,586 tokens in 16,038 words): half of it is short messages; edited English
has fewer tokens and more bytes a token."""
STARTED = 0.6e9
"""Bytes of a process with torch and transformers loaded."""
ROWS = 4096
"""Signatures that a search decodes at once."""
TRACKSTAR = 7.4
"""CPU seconds of TrackStar's whole pipeline (bergson 2.5.1, SmolLM2-135M) over those of a forward pass."""
QUESTIONS, CHOICES, ARC_TOKENS, ANSWER = 1172, 4, 40, 120
"""ARC-Challenge: questions, choices, tokens of a question with a choice; RULER-CWE: tokens of an answer."""
NODE = 8
"""GPUs of one machine; more are several machines, each with an index of its share of the documents."""
SEARCH = 0.29 / 768e6
"""Seconds of a mean-pooled query a byte of a one-bit index, on two cores (reports/bench/search.json)."""
FURTHER = (2.40 / 0.29 - 1) / 99
"""Share of that which each further query takes, when the scores of every one are kept (ibid., 100 queries)."""


@dataclass(frozen=True)
class Row:
    """What a stage takes; bytes and seconds. What is not estimated is 0."""

    stage: str
    tokens: float = 0.0
    seconds: float = 0.0
    device: float = 0.0
    """Most memory of one device: of a GPU, or on a CPU of the process beside ``host``."""
    host: float = 0.0
    """Memory that is the machine's own whatever computes: texts, tokens, signatures, scores."""
    disk: float = 0.0
    """What is kept."""
    passing: float = 0.0
    """Disk that is needed for a while."""

    def __add__(self, other: Row) -> Row:
        return Row(self.stage, self.tokens + other.tokens, self.seconds + other.seconds,
                   max(self.device, other.device), max(self.host, other.host), self.disk + other.disk,
                   max(self.passing, other.passing))  # fmt: skip


def plan(
    *, conf: Path | None, settings: tuple[str, ...], gpus: int | None, gpu: str | None, documents: int | None,
    tokens: int | None, model: str | None, parameters: float | None, batch: int, precision: Any, dtype: Any, kr: int,
    kh: int, kg: int, km: int,
) -> str:  # fmt: skip
    """Estimate what a configuration, or the index of so many documents, takes on this machine or on named GPUs.

    Args:
        conf: a closed loop, a study or a curation.
        settings: ``a.b=value`` settings of it.
        gpus: number of GPUs; None with a ``gpu`` is one.
        gpu: kind of GPU; None is this machine.
        documents: without ``conf``: documents of an index; with a curation: of one run, in place of its folders'.
        tokens: tokens that are read of each.
        model: scorer, or a ``config.json``.
        parameters: in its place the number of parameters alone: attention and head are then left out.
        batch: documents that are given to the index at a time.
        precision: arithmetic of the scorer.
        dtype: type in which signatures are kept.
        kr: sketch width of the residual.
        kh: sketch width of the hidden state.
        kg: sketch width of the projected error.
        km: numbers kept of the mean hidden state.

    Returns:
        A table, a row a stage; what it rests on; and whether it fits.

    Raises:
        InputError: the configuration or a model's configuration cannot be used.
    """
    if gpus is not None and gpu is None:
        raise InputError("--gpus needs --gpu, which says what they are")
    machine = named(gpu, gpus or 1) if gpu else here(Path("runs"))
    if conf is not None and "intake" in read_yaml(conf):
        return _shown(*_of_curation(load_curation(conf, settings), documents, tokens, machine))
    if (conf is None) == (documents is None):
        raise InputError("give either a configuration or --documents (both only of a curation)")
    if conf is not None:
        return _shown(*_of_configuration(conf, settings, machine))
    if tokens is None or (model is None) == (parameters is None):
        raise InputError("--documents needs --tokens, and either --model or --parameters")
    if parameters is not None and not math.isfinite(parameters):
        raise InputError(f"--parameters is {parameters}, no number of parameters")
    shape = shape_of(model) if model is not None else Shape(parameters or 0.0, parameters or 0.0)
    sketch = parse(SketchConfig, {"kr": kr, "kh": kh, "kg": kg, "km": km}, "options")
    scorer = ScorerConfig(model=model or "parameters", precision=precision, max_length=max(tokens, 2),
                          processes=machine.devices, device_map="auto")  # fmt: skip
    return _shown(*_of_index(documents or 0, tokens, min(batch, documents or 0), shape, sketch, dtype, scorer, machine))


def _of_configuration(
    conf: Path, settings: tuple[str, ...], machine: Machine
) -> tuple[list[Row], Machine, tuple[str, ...]]:
    keys = read_yaml(conf)
    config: ClosedLoopConfig | StudyConfig
    training: PretrainingConfig | None
    if "arms" in keys:
        config = load_closed_loop(conf, settings)
        rows, training = closed_loop_rows(config, machine), config.pretraining
    elif "facts" in keys:
        raise InputError("is fact tracing, which is not counted beforehand: a forward pass over its largest pool is "
                         "most of it", file=conf)  # fmt: skip
    elif "methods" in keys:
        config = load_lds(conf, settings) if "subsets" in keys else load_study(conf, settings)
        rows, training = study_rows(config, machine), config.finetuning
    else:
        raise InputError("is no closed loop (it has no arms), no study (no methods) and no curation (no intake); for "
                         "an index give --documents", file=conf)  # fmt: skip
    processes = [f"scorer.processes is {config.scorer.processes}"]
    processes += [f"that of training {training.processes}"] if training else []
    return rows, machine, (f"of {machine.gpus} GPUs: {', '.join(processes)}",) if machine.gpus > 1 else ()


def _of_curation(
    config: CurationConfig, documents: int | None, tokens: int | None, machine: Machine
) -> tuple[list[Row], Machine, tuple[str, ...]]:
    """One run of a curation that takes in so many documents, or what stands in its folders."""
    if (documents is None) != (tokens is None):
        raise InputError("--documents and --tokens of a curation go together: those of one run")
    queries = _lengths([config.queries], "error", config.scorer.max_length)
    if documents is not None and tokens is not None:
        count, read = documents, documents * float(min(tokens, config.scorer.max_length))
        text, note = documents * tokens * BYTES_A_TOKEN, f"a run of {documents:,} new documents"
    else:
        files = []
        for name, source in sorted(config.intake.sources.items()):
            if source.folder is None:
                raise InputError("is a data set of the hub, whose documents are not counted; give --documents and "
                                 "--tokens", field=f"intake.sources.{name}")  # fmt: skip
            files += files_of(name, source)
        found = _lengths(files, config.intake.on_bad_row, config.scorer.max_length)
        count, read, text = found
        note = f"all {count:,} documents of {len(files):,} files, as the first run takes them"
    rows = curation_rows(config, shape_of(config.scorer.model, config.scorer.revision), count, read, text, queries[:2],
                         machine)  # fmt: skip
    size = bytes_a_document(config.signature.stored, config.signature.sketch.dimension)
    return rows, machine, (note, f"signatures of {size:,} bytes a document, {config.signature.stored}; repeats are "
                                 "counted as if they were scored",)


def curation_rows(
    config: CurationConfig, shape: Shape, documents: int, tokens: float, text: float, queries: tuple[int, float],
    machine: Machine,
) -> list[Row]:  # fmt: skip
    """The stages of a run that begins an index with so many documents.

    Args:
        config: the curation.
        shape: its scorer's.
        documents: number of documents.
        tokens: tokens read of them together.
        text: bytes of their text.
        queries: number of queries, and tokens read of them.
        machine: what it runs on.
    """
    signature, length = config.signature, tokens / max(documents, 1)
    size = bytes_a_document(signature.stored, signature.sketch.dimension)
    spread = 4.0 if signature.fit is not None and signature.fit.spread else 0.0
    asked, asked_tokens = queries
    score = _forward(config.scorer, shape, tokens, length, [signature.sketch], machine)
    ask = _forward(config.scorer, shape, asked_tokens, length, [signature.sketch], machine)
    searching = SEARCH * documents * size * (1 + FURTHER * (asked - 1))
    return [
        Row("take in", host=STARTED + 2 * text, disk=text),
        replace(score, stage="score", host=_documents_bytes(documents, length, config.scorer),
                disk=documents * (size + spread)),
        replace(ask, stage="select", seconds=ask.seconds + searching, host=STARTED + 8.0 * asked * documents,
                disk=asked * bytes_a_document("fp32", signature.sketch.dimension)),
    ]  # fmt: skip


def _lengths(files: Sequence[Path], on_bad_row: Literal["error", "skip"], most: int) -> tuple[int, float, float]:
    """Number of documents of some files, tokens that are read of them, at most ``most`` each, and bytes of text."""
    count, tokens, total = 0, 0.0, 0.0
    for file in files:
        for text in read_documents(file, on_bad_row=on_bad_row).table["text"].to_pylist():
            size = len(text.encode())
            count, total = count + 1, total + size
            tokens += min(size / BYTES_A_TOKEN, most)
    return count, tokens, total


def closed_loop_rows(config: ClosedLoopConfig, machine: Machine) -> list[Row]:
    """The stages of a closed loop."""
    length = document_tokens(config.pool, config.scorer.max_length)
    shape = shape_of(config.scorer.model, config.scorer.revision)
    rows = [_pool(config.pool), *scoring_rows("scoring", config.arms, config.scorer, shape, config.pool, machine)]
    chosen = config.selection.size(config.pool.size)
    trained = len(config.arms) + config.oracle
    trainee = shape_of(config.pretraining.model, config.pretraining.revision)
    one = training_row(config.pretraining, trainee, chosen, length, machine)
    rows.append(replace(one, stage=f"pretraining: {trained} arms", tokens=one.tokens * trained,
                        seconds=one.seconds * trained, disk=one.disk * trained))  # fmt: skip
    models = trained + config.base
    one = evaluation_row(config.evaluation, trainee, config.pool, machine)
    rows.append(replace(one, stage=f"evaluation: {models} models", tokens=one.tokens * models,
                        seconds=one.seconds * models))  # fmt: skip
    return rows


def study_rows(config: StudyConfig, machine: Machine) -> list[Row]:
    """The stages of a study, its pools together."""
    shape = shape_of(config.scorer.model, config.scorer.revision)
    arms: dict[str, MethodConfig] = {}
    for name, method in config.methods.items():
        seeds = config.seeds if isinstance(method, RiseConfig) else config.seeds[:1]
        for seed in seeds:
            arms[f"{name}@{seed}"] = method
            if isinstance(method, RiseConfig):
                sketch = method.sketch.model_copy(update={"seed": seed})
                arms[f"{name}@{seed}"] = method.model_copy(update={"sketch": sketch})
    rows: dict[str, Row] = {}
    for studied in config.pools.values():
        made = [_pool(studied.pool)]
        if config.finetuning is not None and RECALL in config.paradigms:
            length = document_tokens(studied.pool, config.finetuning.max_length)
            one = training_row(config.finetuning, shape, studied.pool.size, length, machine)
            made.append(replace(one, stage="finetuning"))
        for paradigm in (PREDICT, RECALL):
            if paradigm in config.paradigms:
                made += scoring_rows(paradigm, arms, config.scorer, shape, studied.pool, machine)
        if isinstance(config, LdsConfig):
            made.append(_retraining(config, shape, studied.pool, machine))
        for row in made:
            rows[row.stage] = rows[row.stage] + row if row.stage in rows else row
    return list(rows.values())


def _retraining(config: LdsConfig, shape: Shape, pool: PoolConfig, machine: Machine) -> Row:
    """Training on the halves of a pool, and the queries' loss after each; the weights are not kept."""
    assert config.finetuning is not None  # the configuration saw to it
    times = config.subsets * len(config.training_seeds)
    length = document_tokens(pool, config.finetuning.max_length)
    one = training_row(config.finetuning, shape, pool.size // 2, length, machine)
    asked = pool.queries * document_tokens(pool, config.scorer.max_length)
    seconds = one.seconds + shape.forward_flops(asked, asked / pool.queries) / machine.flops("float32")
    return replace(one, stage="retraining", tokens=times * (one.tokens + asked), seconds=times * seconds,
                   disk=0.0, passing=one.disk + one.passing)  # fmt: skip


def document_tokens(pool: PoolConfig, max_length: int) -> float:
    """Tokens of a document: the mean of ``pool.lengths``; without them an upper bound by max_words and max_length."""
    if pool.lengths:
        words = sum(part.share * sum(part.words) / 2 for part in pool.lengths)
    else:
        words = max(source.max_words for source in pool.sources.values())
    return min(words * TOKENS_A_WORD, float(max_length))


def _pool(pool: PoolConfig) -> Row:
    documents = pool.size + pool.queries + sum(pool.heldout.values())
    return Row("pool", disk=documents * document_tokens(pool, 1 << 20) * BYTES_A_TOKEN)


def scoring_rows(
    stage: str, arms: dict[str, MethodConfig], scorer: ScorerConfig, shape: Shape, pool: PoolConfig, machine: Machine
) -> list[Row]:
    """What the methods take on one pool: a forward pass for all of RISE and perplexity, and a row a further method."""
    length = document_tokens(pool, scorer.max_length)
    tokens = (pool.size + pool.queries) * length
    rises = [one for one in map(_channel, arms.values()) if isinstance(one, RiseConfig)]
    sketches = list(dict.fromkeys(one.sketch for one in rises))
    host = _documents_bytes(pool.size, length, scorer) + 8.0 * pool.queries * pool.size
    rows = []
    if sketches or any(isinstance(method, PerplexityConfig) for method in arms.values()):
        row = _forward(scorer, shape, tokens, length, sketches, machine)
        shared: IndexType = "fp32" if any(one.index_type == "fp32" for one in rises) else "fp16"
        kept = sum(bytes_a_document(shared, sketch.dimension) for sketch in sketches)
        kept += sum(bytes_a_document(one.index_type, one.sketch.dimension) for one in rises if one.index_type != shared)
        widest = max((sketch.dimension for sketch in sketches), default=0)
        rows.append(replace(row, stage=f"{stage}: RISE, perplexity", host=host + 8.0 * ROWS * widest,
                            disk=kept * float(pool.size + pool.queries)))  # fmt: skip
    for method in arms.values():
        if (rival := _rival(method, scorer, shape, tokens, length, pool, machine)) is not None:
            rows.append(replace(rival, stage=f"{stage}: {method.method}", host=host + rival.host))
    together: dict[str, Row] = {}
    for row in rows:
        together[row.stage] = together[row.stage] + row if row.stage in together else row
    return list(together.values())


def _channel(method: MethodConfig) -> MethodConfig:
    """RISE's own channel under its other name."""
    return method.channel() if isinstance(method, LmHeadConfig) and method.variant == "sparse-sketch" else method


def _rival(
    method: MethodConfig, scorer: ScorerConfig, shape: Shape, tokens: float, length: float, pool: PoolConfig,
    machine: Machine,
) -> Row | None:  # fmt: skip
    """A method beside RISE in forward passes (a backward pass is two) and in bytes of its features; None for those that
    take next to nothing."""
    gradient = 4.0 * shape.parameters + _activations(shape, scorer.batch_tokens)
    match method:
        case EmbeddingConfig():
            encoder = shape_of(method.model, method.revision, encoder=True)
            config = scorer.model_copy(update={"precision": "float32", "processes": 1, "device_map": None})
            row = _forward(config, encoder, tokens, length, [], machine)
            return replace(row, disk=4.0 * encoder.width * pool.size)
        case HiddenConfig():
            passes, size, more = 1.0, 4.0 * shape.width, 0.0
        case LmHeadConfig(variant="sparse-sketch"):
            return None
        case LmHeadConfig():
            passes, more = SKETCHING, 0.0
            size = 2.0 * method.width if method.variant == "gradient-sketch" else 4.0 * shape.width * length
        case RapidInConfig():
            passes, size, more = 3.0 * max(1, len(method.checkpoints)), 4.0 * method.k, gradient
        case ZoInfConfig():
            passes, size, more = 2.0 * method.samples, 4.0 * method.k, 0.0
        case LoGraConfig():
            modules = (7 if method.modules == "all" else 3) * shape.layers
            passes, size, more = 3.0, 4.0 * modules * method.rank**2, gradient
        case TrackStarConfig():
            size = machine.bytes_a_weight(scorer.precision) * 7.0 * shape.layers * method.projection_dim**2
            passes, more = TRACKSTAR, gradient
        case EkfacConfig():
            passes, size, more = 3.0 * (2 + math.ceil(pool.queries / method.query_batch_size)), 0.0, gradient
        case GShapleyConfig() | TmcShapleyConfig():  # TMC to the end of every walk: where it stops is not known before
            players, asked = math.ceil(pool.size / method.chunk), pool.queries * length
            if method.trained == "all":
                walk, size, more = 3.0 + players * asked / tokens, 0.0, gradient
            else:  # the head is moved, and the queries' logits with it; their loss is taken after every step
                head = shape.vocabulary * (4.0 * shape.width + 2.0 * asked + players * asked / tokens)
                walk, size, more = head / (2.0 * shape.parameters), 0.0, 4.0 * shape.vocabulary * asked
            passes = 1.0 + method.permutations * walk
        case _:
            return None
    row = _forward(scorer, shape, tokens, length, [], machine)
    return replace(row, seconds=row.seconds * passes, device=row.device + more, disk=size * pool.size)


def _forward(
    scorer: ScorerConfig, shape: Shape, tokens: float, length: float, sketches: Sequence[SketchConfig], machine: Machine
) -> Row:
    """A forward pass with its sketches. Devices that a model is spread over work one after the other."""
    from tasks.scoring.engine import LOGIT_BYTES

    weights = machine.bytes_a_weight(scorer.precision) * shape.parameters
    beside = 4.0 * shape.vocabulary * sum(sketch.kg for sketch in sketches)
    beside += 4.0 * shape.width * sum(sketch.km for sketch in sketches)
    beside += 16.0 * shape.width * scorer.batch_tokens + (3.0 * LOGIT_BYTES["cuda" if machine.gpus else "cpu"])
    spread = math.ceil(weights / max(machine.memory - beside, 1.0)) if scorer.device_map and machine.gpus else 1
    working = max(1, min(scorer.processes, machine.devices // spread))
    flops = shape.forward_flops(tokens, length) * (1 + (SKETCHING - 1) * len(sketches))
    copies = scorer.processes if not machine.gpus else 1
    return Row("", tokens, flops / machine.flops(scorer.precision) / working,
               copies * (weights / min(spread, machine.devices) + beside))  # fmt: skip


def _documents_bytes(documents: float, length: float, scorer: ScorerConfig) -> float:
    """Memory of the texts and tokens of a batch of data in each process that reads it, and of the process."""
    readers = scorer.processes + (scorer.processes > 1)
    return readers * (STARTED + documents * (300.0 + length * (BYTES_A_TOKEN + 8.0)))


def _activations(shape: Shape, tokens: float, *, recompute: bool = False) -> float:
    """Bytes of what a backward pass needs of so many tokens in float32: 34·d values of half precision a layer
    (Korthikanti et al. 2022, without the attention's own), and logits with their gradient."""
    return tokens * (2.0 * (2.0 if recompute else 34.0) * shape.layers * shape.width + 12.0 * shape.vocabulary)


def training_row(config: PretrainingConfig, shape: Shape, documents: int, length: float, machine: Machine) -> Row:
    """Training on so many documents: AdamW in float32, 16 bytes a parameter, of which 28 are moved a step."""
    length = min(length, float(config.max_length))
    steps = config.epochs * math.ceil(documents / config.batch_size)
    steps = min(steps, config.max_steps or steps)
    tokens = min(steps * config.batch_size, config.epochs * documents) * length
    flops = shape.training_flops(tokens, length, recompute=config.gradient_checkpointing)
    working = max(1, min(config.processes, machine.devices))
    piece = config.batch_size / (config.processes * config.gradient_accumulation) * config.max_length
    copies = 1 if machine.gpus else config.processes
    state = 16.0 * shape.parameters + _activations(shape, piece, recompute=config.gradient_checkpointing)
    seconds = flops / machine.flops(config.precision, training=True) / working
    seconds += steps * 28.0 * shape.parameters / machine.bandwidth
    # A checkpoint is weights and two moments, and replaces the one before when it is whole.
    passing = 24.0 * shape.parameters if steps > config.checkpoint_every else 0.0
    return Row("", tokens, seconds, copies * state, copies * STARTED, 4.0 * shape.parameters, passing)


def evaluation_row(config: EvaluationConfig, shape: Shape, pool: PoolConfig, machine: Machine) -> Row:
    """One model's evaluation: perplexity, ARC-Challenge and RULER-CWE. A token that is written reads all weights."""
    length = document_tokens(pool, config.max_length)
    parts = [(sum(pool.heldout.values()) * length, length)]
    written, longest = 0, float(config.batch_tokens)
    if config.arc is not None:
        parts.append(((config.arc.limit or QUESTIONS) * float(CHOICES * ARC_TOKENS), float(ARC_TOKENS)))
    if config.ruler_cwe is not None:
        parts.append((float(config.ruler_cwe.samples * config.ruler_cwe.length), float(config.ruler_cwe.length)))
        written = math.ceil(config.ruler_cwe.samples / config.batch_size) * ANSWER
        longest = max(longest, float(config.batch_size * config.ruler_cwe.length))
    weights = machine.bytes_a_weight(config.precision) * shape.parameters
    flops = sum(shape.forward_flops(tokens, length) for tokens, length in parts)
    seconds = flops / machine.flops(config.precision) + written * weights / machine.bandwidth
    cache_and_states = longest * shape.width * (16.0 + 4.0 * shape.layers)
    logits = 8.0 * config.batch_tokens * shape.vocabulary
    return Row("", sum(tokens for tokens, _ in parts), seconds, weights + cache_and_states + logits, STARTED)


def _of_index(
    documents: int, tokens: int, batch: int, shape: Shape, sketch: SketchConfig, dtype: Any, scorer: ScorerConfig,
    machine: Machine,
) -> tuple[list[Row], Machine, tuple[str, ...]]:  # fmt: skip
    """An index of so many documents, and a query of it."""
    size = bytes_a_document(dtype, sketch.dimension)
    row = _forward(scorer, shape, float(documents) * tokens, tokens, [sketch], machine)
    processes = min(scorer.processes, NODE)
    host = _documents_bytes(batch, tokens, scorer.model_copy(update={"processes": processes}))
    host += processes * 4.0 * PIECE * sketch.dimension
    rows = [replace(row, stage="index build", host=host, disk=float(documents) * size)]
    if dtype == "bit":
        rows.append(Row("search, a query", seconds=SEARCH * documents * size, host=STARTED))
    notes = [f"{documents:,} documents of {tokens:,} tokens, a scorer of {shape.parameters / 1e9:,.1f} G parameters",
             f"signatures {sketch.shape}, {dtype}: {size:,} bytes a document",
             f"{shape.forward_flops(1.0, tokens) / 1e9:,.1f} GFLOP a token, "
             f"{_number(documents * tokens / row.seconds)} tokens a second; read in batches of {batch:,} documents"]
    if machine.gpus:
        nodes = math.ceil(machine.gpus / NODE)
        notes.append(f"{row.seconds * machine.gpus / 3600:,.0f} GPU hours"
                     + (f" on {nodes} machines, an index each; memory is that of one" if nodes > 1 else ""))
    return rows, machine, tuple(notes)


def _shown(rows: Sequence[Row], machine: Machine, notes: Sequence[str]) -> str:
    """The table, and whether it fits."""
    width = max(len("together"), *(len(row.stage) for row in rows))
    lines = [*notes, *([""] if notes else [])]
    device = "a GPU" if machine.gpus else ""
    lines.append(f"{'stage':<{width}}  {'tokens':>8}  {'time':>9}  {device:>8}  {'memory':>8}  {'disk':>8}")
    if not machine.gpus:  # one memory for both
        rows = [replace(row, device=0.0, host=row.device + row.host) for row in rows]
    total = Row("together")
    for row in rows:
        total += row
    for row in [*rows, total]:
        gpu, memory = _bytes(row.device) if machine.gpus else "", _bytes(row.host)
        lines.append(f"{row.stage:<{width}}  {_number(row.tokens):>8}  {_time(row.seconds):>9}  {gpu:>8}  {memory:>8}  "
                     f"{_bytes(row.disk):>8}")  # fmt: skip
    lines += ["", f"an estimate for {machine.described()}; loading models, tokenizing and downloads come on top"]
    return "\n".join([*lines, _fits(rows, machine)])


def _fits(rows: Sequence[Row], machine: Machine) -> str:
    needed = max(row.device if machine.gpus else row.host for row in rows)
    disk = sum(row.disk for row in rows) + max(row.passing for row in rows)
    what = f"memory {_bytes(needed)} of {_bytes(machine.memory)}"
    what += f" of a GPU, disk {_bytes(disk)}" if machine.gpus else f", disk {_bytes(disk)}"
    whole = needed <= machine.memory
    if machine.disk is not None:
        what += f" of {_bytes(machine.disk)} free"
        whole = whole and disk <= machine.disk
    return f"{'fits' if whole else 'does not fit'}: {what}"


def _number(value: float) -> str:
    return _scaled(value, 1000.0, ("", " k", " M", " G", " T")) if value else "–"


def _bytes(value: float) -> str:
    return _scaled(value, 1000.0, (" B", " kB", " MB", " GB", " TB", " PB")) if value else "–"


def _scaled(value: float, step: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.0f}{unit}" if value >= 99.5 or unit == units[0] else f"{value:.1f}{unit}"
        value /= step
    return f"{value:,.1f}{units[-1]}"


def _time(seconds: float) -> str:
    for limit, unit, name in ((119.5, 1.0, "s"), (119.5 * 60, 60.0, "min"), (48 * 3600.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if seconds else "–"
    return f"{seconds / 86400.0:,.1f} d"
