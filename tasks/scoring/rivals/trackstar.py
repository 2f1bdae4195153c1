"""TrackStar (Chang et al. 2024) through bergson: gradients of all linear layers but the LM head, projected at random.

With g the gradient of a document's loss, projected to p × p numbers a layer, H_x the mean of g gᵀ over the documents x,
a block a layer, and H = λ H_queries + (1 − λ) H_pool, damped (Table 15):

    base     ⟨g_i, g_q⟩                 unit norm                 cos(g_i, g_q)
    Hessian  ⟨g_i, H⁻¹ g_q⟩             unit norm and Hessian     cos(H^-½ g_i, H^-½ g_q)

bergson makes the gradients and the inverse; they are kept, and the products are taken here. What its own ``trackstar``
command gives, which fits H in passes of its own, is the same (tests/rivals).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import read_json, whole_file, write_json
from tasks.common.usage import searching
from tasks.scoring.rivals.child import read_tokens, require, run_child, serve, tell, write_tokens

if TYPE_CHECKING:
    from tasks.scoring.batching import Tokenized
    from tasks.scoring.config import TrackStarConfig
    from tasks.scoring.methods import Request
    from tasks.scoring.rivals.gradients import Gradients, PerQuery

SIDES = ("pool", "queries")
GRADIENTS, MODULES, INVERSE = "gradients.bin", "modules.json", "inverse.npy"
_ROWS = 256
"""Gradients that are multiplied at once."""


def trackstar_scores(config: TrackStarConfig, request: Request) -> PerQuery:
    """The score of every document for every query. A document of one token has no gradient and the score 0.

    Raises:
        InputError: bergson is not installed, or the scorer, ``token_batch_size`` or the memory does not allow it.
    """
    require("bergson", config.method)
    from tasks.common.models import torch_dtype
    from tasks.scoring.index import begin
    from tasks.scoring.rivals.gradients import Gradients, ids

    reading = Gradients(request)
    request.work.mkdir(parents=True, exist_ok=True)
    _check(config, reading, request.work)
    rows = {name: _rows(documents) for name, documents in reading.sides}
    precision = str(torch_dtype(reading.scorer.precision))
    index, library = request.work / "index", request.work / "bergson"
    begin(index, {"model": reading.located.digest, "precision": precision, **config.plain(),
                  **{name: documents.digest() for name, documents in reading.sides}})  # fmt: skip
    missing = [name for name in SIDES if not (index / name / GRADIENTS).exists()]
    if missing or (config.hessian and not (index / INVERSE).exists()):
        shutil.rmtree(library, ignore_errors=True)  # half of what a killed call left
        for name, documents in reading.sides:
            write_tokens(documents, rows[name], library / f"{name}.npz")
        run_child(
            __name__, {"config": config.plain(), "model": str(reading.located.path), "index": str(index),
                       "precision": {"torch.bfloat16": "bf16", "torch.float32": "fp32"}[precision],
                       "processes": reading.scorer.processes, "library": str(library)},
            request.work / "bergson.log", label="gradients", documents=sum(len(rows[name]) for name in missing),
            threads=reading.scorer.threads, report=request.report,
        )  # fmt: skip
        shutil.rmtree(library)
    scores = np.zeros((len(reading.queries), len(reading.pool)), dtype=np.float32)
    with searching():
        scores[np.ix_(rows["queries"], rows["pool"])] = products(config, index)
    return *ids(reading), scores


def _rows(documents: Tokenized) -> list[int]:
    """Places of the documents that have a gradient, in the order of the hashes of their ids.

    The Hessian is fitted on the first of them, which so are a sample that does not depend on the order of a file.
    """
    places = [place for place in range(len(documents)) if documents.length(place) > 1]
    return sorted(places, key=lambda place: hashlib.sha256(documents.doc_ids[place].encode()).digest())


def _check(config: TrackStarConfig, reading: Gradients, work: Path) -> None:
    """Refuse what bergson would refuse, and what does not fit, before anything is loaded."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from tasks.common.models import load_tokenizer, torch_dtype

    text = reading.skeleton.config.get_text_config()
    limit = min(load_tokenizer(reading.located).model_max_length, getattr(text, "max_position_embeddings", 1 << 62))
    tokens = config.token_batch_size
    if tokens > limit:
        raise InputError(f"bergson takes at most as many tokens a batch as the scorer and its tokenizer take in a "
                         f"document, here {limit}, got {tokens}", field="token_batch_size")  # fmt: skip
    if reading.longest > tokens:
        raise InputError(f"a document has {reading.longest} tokens and a batch {tokens}; raise token_batch_size or "
                         "lower max_length", field="token_batch_size")  # fmt: skip
    for name, documents in reading.sides:
        if documents.length(len(documents) - 1) < 2:
            raise InputError(f"no document of the {name} has two tokens, so there is no gradient")
    weights = [module.weight.numel() for module in reading.skeleton.base_model.modules()
               if isinstance(module, torch.nn.Linear | Conv1D)]  # fmt: skip
    block, size = config.projection_dim**2, torch_dtype(reading.scorer.precision).itemsize
    features = sum(block or weight for weight in weights)
    # H of both sides with its eigenvectors; and the pool's gradients once they are multiplied.
    besides = 16 * len(weights) * block**2 + 4 * len(reading.pool) * features * config.unit_normalize
    reading.check_room("TrackStar", work, tokens=tokens, backward=True, stored=reading.rows * features * size,
                       model=reading.count * size + besides * config.hessian)  # fmt: skip


def products(config: TrackStarConfig, index: Path) -> NDArray[np.float32]:
    """The score of every pair of gradients, (Q, N)."""
    pool_NF, query_QF = (gradients(index, name) for name in SIDES)
    if config.hessian:
        inverse_Mbb = np.load(index / INVERSE, mmap_mode="r")
        query_QF = _multiplied(query_QF, inverse_Mbb)
        if config.unit_normalize:
            pool_NF = _multiplied(pool_NF, inverse_Mbb)
    if config.unit_normalize:
        from tasks.scoring.rivals.similarity import cosine_scores

        return cosine_scores(pool_NF, query_QF, config.calibration)
    queries = np.asarray(query_QF, dtype=np.float32)
    return np.concatenate([queries @ block.T for block in _blocks(pool_NF)], axis=1)


def gradients(index: Path, name: str) -> NDArray[Any]:
    """Gradients of the documents with two tokens, in the order of the hashes of their ids, mapped, (N, F)."""
    import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)

    kept = read_json(index / MODULES)
    flat = np.memmap(index / name / GRADIENTS, dtype=np.dtype(kept["type"]), mode="r")
    return flat.reshape(-1, sum(kept["sizes"].values()))


def _blocks(gradient_NF: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(gradient_NF), _ROWS):
        yield np.asarray(gradient_NF[start : start + _ROWS], dtype=np.float32)


def _multiplied(gradient_NF: NDArray[Any], inverse_Mbb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each layer's b coordinates times its matrix, (N, F)."""
    layers, width = inverse_Mbb.shape[:2]
    made_NMb = np.empty((len(gradient_NF), layers, width), dtype=np.float32)
    for number, block in enumerate(_blocks(gradient_NF)):
        part_MNb = block.reshape(len(block), layers, width).swapaxes(0, 1) @ inverse_Mbb
        made_NMb[number * _ROWS : number * _ROWS + len(block)] = part_MNb.swapaxes(0, 1)
    return made_NMb.reshape(len(gradient_NF), -1)


def work(given: dict[str, Any]) -> None:
    """Make what the index lacks; runs in a process of its own, where bergson may start others."""
    config, index = given["config"], Path(given["index"])
    for name in SIDES:
        if not (index / name / GRADIENTS).exists():
            _build(name, given)
    if config["hessian"] and not (index / INVERSE).exists():
        inverse = _inverse(config, index)
        with whole_file(index / INVERSE) as part, part.open("wb") as opened:
            np.save(opened, inverse)


def write_dataset(tokens: list[NDArray[np.int32]], directory: Path) -> None:
    """Tokens as a data set that bergson takes as they are: it neither tokenizes nor cuts them."""
    import pyarrow as pa
    from datasets import Dataset

    table = pa.table({"input_ids": pa.array(tokens, pa.list_(pa.int32())),
                      "length": pa.array([len(ids) for ids in tokens], pa.int32())})  # fmt: skip
    Dataset(table).save_to_disk(directory)


def index_config(given: dict[str, Any], data: Path, out: Path) -> Any:
    """bergson's configuration for the gradients of one data set."""
    from bergson.config.config import DataConfig, DistributedConfig, TrackstarIndexConfig

    config = given["config"]
    return TrackstarIndexConfig(
        run_path=str(out), model=given["model"], precision=given["precision"], data=DataConfig(dataset=str(data)),
        model_kwargs="trust_remote_code=False", projection_dim=config["projection_dim"], loss_fn="ce",
        projection_type=config["projection_type"], projection_seed=config["seed"], include_bias=False,
        loss_reduction=config["loss_reduction"], token_batch_size=config["token_batch_size"],
        distributed=DistributedConfig(nproc_per_node=given["processes"]),
    )  # fmt: skip


def _build(name: str, given: dict[str, Any]) -> None:
    from bergson.build import build
    from bergson.collector import collector
    from bergson.config.config import PreprocessConfig

    collector.tqdm = _counted  # its bar goes to a log that nobody reads
    library, index = Path(given["library"]), Path(given["index"])
    write_dataset(read_tokens(library / f"{name}.npz"), library / f"{name}.hf")
    build(index_config(given, library / f"{name}.hf", library / name), PreprocessConfig())
    info = read_json(library / name / "info.json")
    write_json(index / MODULES, {"type": info["base_dtype"], "layers": list(info["grad_sizes"]),
                                 "sizes": info["grad_sizes"]})  # fmt: skip
    (index / name).mkdir(exist_ok=True)
    os.replace(library / name / "gradients.bin", index / name / GRADIENTS)


def _counted(batches: Iterable[list[int]], **_: Any) -> Iterator[list[int]]:
    for batch in batches:
        yield batch
        tell(len(batch))


def _inverse(config: dict[str, Any], index: Path) -> NDArray[np.float32]:
    """H⁻¹, or H^-½ with unit norm, a (b, b) matrix a layer, (M, b, b).

    A block of H_x is GᵀG/n over the gradients that stand in the index, so it takes no pass of its own.
    """
    import torch
    from bergson.config.config import InversionConfig
    from bergson.gradients import GradientProcessor
    from bergson.hessians.preconditioner import DensePreconditioner
    from bergson.process_autocorrelation import process_autocorrelation_matrices
    from bergson.utils.math import compute_lambda

    kept = read_json(index / MODULES)
    fitted = {}
    for name in SIDES:
        gradient_NF = gradients(index, name)[: config["hessian_documents"]]
        gram: dict[str, torch.Tensor] = {}
        start = 0
        for layer in kept["layers"]:
            stop = start + kept["sizes"][layer]
            g_Nb = torch.from_numpy(np.asarray(gradient_NF[:, start:stop], dtype=np.float32))
            gram[layer], start = g_Nb.T @ g_Nb, stop
        fitted[name] = GradientProcessor(projection_dim=config["projection_dim"])
        process_autocorrelation_matrices(fitted[name], gram, len(gradient_NF), kept["sizes"], rank=0)
    pool, queries = (fitted[name] for name in SIDES)
    share = compute_lambda(queries.hessians_eigen, pool.hessians_eigen, config["downweight"])
    mixed = GradientProcessor(hessians={
        layer: share * queries.hessians[layer] + (1 - share) * pool.hessians[layer] for layer in kept["layers"]
    })  # fmt: skip
    inverse = DensePreconditioner.from_processor(
        mixed, inversion_cfg=InversionConfig(damping_factor=config["damping"]),
        power=-0.5 if config["unit_normalize"] else -1.0,
    )  # fmt: skip
    return np.stack([inverse.h_inv[layer].numpy() for layer in kept["layers"]])


if __name__ == "__main__":
    serve(work)
