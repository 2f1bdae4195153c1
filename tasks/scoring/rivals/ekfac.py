"""EK-FAC influence (Grosse et al. 2023; Table 19) through kronfluence.

    score(d, q) = ∇ℓ(q)ᵀ (H + damping)⁻¹ ∇ℓ(d)

over the linear layers that the user names. H is the Kronecker-factored, eigenvalue-corrected Fisher matrix of the
summed log-likelihood of the pool's documents, its labels drawn from the scorer. The library takes a pass over the pool
for each batch of queries; what it keeps of the pool are H's factors.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import whole_file, write_text
from tasks.common.usage import searching
from tasks.scoring.rivals.child import read_tokens, require, run_child, serve, tell, write_tokens

if TYPE_CHECKING:
    import torch

    from tasks.scoring.config import EkfacConfig
    from tasks.scoring.methods import Request
    from tasks.scoring.rivals.gradients import Gradients, PerQuery

FACTORS = ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")
"""What of H answers a query, by kronfluence's names."""
NAME, FITTED, SCORES = "ekfac", "fitted", "scores.npy"
Batch = dict[str, Any]


def ekfac_scores(config: EkfacConfig, request: Request) -> PerQuery:
    """The score of every document for every query. A document of one token has no gradient and the score 0.

    Raises:
        InputError: kronfluence is not installed, no layer has such a name, or the memory does not allow it.
    """
    require("kronfluence", config.method)
    from tasks.common.models import torch_dtype
    from tasks.scoring.index import begin
    from tasks.scoring.rivals.gradients import Gradients, ids

    reading = Gradients(request)
    layers = named_layers(reading.skeleton, config.modules, reading.located.spec)
    rows = {name: [place for place in range(len(documents)) if documents.length(place) > 1]
            for name, documents in reading.sides}  # fmt: skip
    for name, places in rows.items():
        if not places:
            raise InputError(f"no document of the {name} has two tokens, so there is no gradient")
    request.work.mkdir(parents=True, exist_ok=True)
    _check(config, reading, request.work, layers)
    library = request.work / "kronfluence"
    begin(library, {"model": reading.located.digest, "precision": str(torch_dtype(reading.scorer.precision)),
                    **{name: documents.digest() for name, documents in reading.sides}, **config.plain()})  # fmt: skip
    if not (library / SCORES).exists():
        for name, documents in reading.sides:
            write_tokens(documents, rows[name], library / f"{name}.npz")
        passes = 2 + -(-len(rows["queries"]) // config.query_batch_size)
        run_child(
            __name__, {"config": config.plain(), "model": str(reading.located.path), "layers": layers,
                       "precision": reading.scorer.precision,
                       "library": str(library), "index": str(request.work / "index")},
            request.work / "kronfluence.log", label="influence", threads=reading.scorer.threads, report=request.report,
            documents=passes * len(rows["pool"]) + len(rows["queries"]),
        )  # fmt: skip
    scores = np.zeros((len(reading.queries), len(reading.pool)), dtype=np.float32)
    scores[np.ix_(rows["queries"], rows["pool"])] = np.load(library / SCORES)
    shutil.rmtree(library)
    return *ids(reading), scores


def named_layers(model: torch.nn.Module, parts: Sequence[str], spec: str) -> list[str]:
    """Names of the linear layers in which one of ``parts`` occurs, in the model's order.

    Raises:
        InputError: there is none; kronfluence has no transposed layers (GPT-2).
    """
    import torch

    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    layers = [name for name in linear if any(part in name for part in parts)]
    if not layers:
        raise InputError(f"no linear layer has {' or '.join(map(repr, parts))} in its name; there are "
                         f"{', '.join(linear[-4:]) or 'none of any name'}", file=spec, field="modules")  # fmt: skip
    return layers


def _check(config: EkfacConfig, reading: Gradients, work: Path, layers: list[str]) -> None:
    """Refuse what does not fit, before anything is loaded."""
    from tasks.common.models import torch_dtype

    weights = [reading.skeleton.get_submodule(name).weight for name in layers]
    largest, inner = max(weight.numel() for weight in weights), sum(weight.numel() for weight in weights)
    outer = sum(side**2 for weight in weights for side in weight.shape)
    # Factors; the gradients of a batch of queries, twice while they are put together; those of a layer's documents.
    besides = 2 * outer + inner + 2 * config.query_batch_size * inner + 2 * config.batch_size * largest
    reading.check_room(
        "EK-FAC", work, tokens=max(config.batch_size, config.query_batch_size) * reading.longest, backward=True,
        model=reading.count * torch_dtype(reading.scorer.precision).itemsize + 4 * besides,
        stored=4 * (3 * outer + 2 * inner),
    )  # fmt: skip


def collate(documents: list[NDArray[np.int32]]) -> Batch:
    """Documents as one batch, padded on the right: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens = [torch.from_numpy(ids).long() for ids in documents]
    return {"input_ids": pad_sequence(tokens, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True),
            "labels": pad_sequence(tokens, batch_first=True, padding_value=-100)}  # fmt: skip


@dataclass
class LanguageModel:
    """kronfluence's ``Task``: what a loss is. The library calls the methods by keyword."""

    layers: list[str]
    """Names of the layers, listed before the library wraps them."""
    reduction: str
    """mean or sum, over the tokens of a document."""
    enable_post_process_per_sample_gradient = False

    def compute_train_loss(self, batch: Batch, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        """Sum of the documents' losses; with ``sample``, of the summed log-likelihoods of labels from the model."""
        import torch

        z_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        z_BTV, label_BT = z_BTV[:, :-1].float(), batch["labels"][:, 1:]
        real_BT = label_BT != -100
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(z_BTV.flatten(0, 1).softmax(-1), 1).view_as(label_BT)
            label_BT = drawn.masked_fill(~real_BT, -100)
        nll_BT = torch.nn.functional.cross_entropy(z_BTV.flatten(0, 1), label_BT.flatten(), reduction="none",
                                                   ignore_index=-100).view_as(label_BT)  # fmt: skip
        if self.reduction == "mean" and not sample:
            nll_BT = nll_BT / real_BT.sum(1, keepdim=True)
        return nll_BT.sum()

    def compute_measurement(self, batch: Batch, model: torch.nn.Module) -> torch.Tensor:
        """Sum of the queries' losses: a document with a high score lowers them when it is trained on."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Names of the layers."""
        return self.layers

    def get_attention_mask(self, batch: Batch) -> torch.Tensor:
        """Which positions are no padding, (B, T)."""
        mask: torch.Tensor = batch["attention_mask"]
        return mask

    def post_process_per_sample_gradient(self, module_name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Not used: see ``enable_post_process_per_sample_gradient``."""
        del module_name
        return gradient


def pairwise(
    task: LanguageModel, model: torch.nn.Module, pool: list[Any], queries: list[Any], config: dict[str, Any], out: Path
) -> NDArray[np.float32]:
    """Scores of every pair (Q, N), by kronfluence in ``out``; factors that were fitted there before are used again."""
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    def counted(documents: list[Any]) -> Batch:
        tell(len(documents))
        return collate(documents)

    analyzer = Analyzer(NAME, prepare_model(model, task), task, cpu=not torch.cuda.is_available(), disable_tqdm=True,
                        output_dir=str(out))  # fmt: skip
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=counted))
    if not (out / FITTED).exists():
        torch.manual_seed(config["seed"])
        analyzer.fit_all_factors(
            NAME, pool, per_device_batch_size=config["batch_size"], overwrite_output_dir=True,
            factor_args=FactorArguments(strategy="ekfac", covariance_max_examples=None, lambda_max_examples=None),
        )  # fmt: skip
        write_text(out / FITTED, "")
    how = {"per_device_query_batch_size": config["query_batch_size"], "overwrite_output_dir": True,
           "per_device_train_batch_size": config["batch_size"]}  # fmt: skip
    with searching():  # there is no index of the pool: a search takes its gradients again
        analyzer.compute_pairwise_scores(NAME, NAME, queries, pool, **how,
                                         score_args=ScoreArguments(damping_factor=config["damping"]))  # fmt: skip
    scores: NDArray[np.float32] = analyzer.load_pairwise_scores(NAME)["all_modules"].float().numpy()
    return scores


def work(given: dict[str, Any]) -> None:
    """Score every pair, in a process of its own: the library changes the model and keeps global state."""
    from tasks.common.models import load_causal_lm, locate, torch_dtype

    library = Path(given["library"])
    model = load_causal_lm(locate(given["model"]), dtype=torch_dtype(given["precision"]))
    task = LanguageModel(given["layers"], given["config"]["loss_reduction"])
    pool, queries = (read_tokens(library / f"{name}.npz") for name in ("pool", "queries"))
    scores = pairwise(task, model, pool, queries, given["config"], library)
    _keep_factors(library / NAME / f"factors_{NAME}", Path(given["index"]))
    with whole_file(library / SCORES) as part, part.open("wb") as opened:
        np.save(opened, scores)


def _keep_factors(fitted: Path, index: Path) -> None:
    """Write the factors without the library's notes, whose order differs from one run to the next."""
    from safetensors.torch import load_file, save_file

    for name in FACTORS:
        factor = load_file(fitted / f"{name}.safetensors")
        with whole_file(index / f"{name}.safetensors") as part:
            save_file(factor, part)


if __name__ == "__main__":
    serve(work)
