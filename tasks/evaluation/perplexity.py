"""Token perplexity of held-out documents, the same for every arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.common.errors import InputError
from tasks.common.progress import Progress, Report

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def token_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: pa.Table,
    *,
    max_length: int,
    batch_tokens: int,
    report: Report | None = None,
) -> pa.Table:
    """Negative log-likelihood of each document under ``model``.

    Perplexity of a set of documents is exp(total nll / total n_tokens).

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        documents: table with ``doc_id``, ``text`` and ``label``.
        max_length: tokens looked at; the rest of a longer document is left out.
        batch_tokens: rows times longest row of a batch, at most.
        report: told the share done.

    Returns:
        A row a document, in the order given: ``doc_id``, ``label``, ``n_tokens`` (predicted: all but the first),
        ``n_cut`` (left out beyond ``max_length``), ``nll`` (summed over the predicted tokens, in nats).

    Raises:
        InputError: ``max_length`` is more than the model's context.
    """
    import numpy as np
    import pyarrow as pa
    import torch

    context = context_length(model)
    if max_length > context:
        raise InputError(f"{max_length} tokens are more than the model's context of {context}", field="max_length")
    tokens: list[list[int]] = tokenizer(documents["text"].to_pylist(), verbose=False)["input_ids"]
    kept = [row[:max_length] for row in tokens]
    nll = np.zeros(len(kept), dtype=np.float64)
    with Progress("perplexity", sum(map(len, kept)), "tokens", report=report) as progress, torch.inference_mode():
        for batch in batches([len(row) for row in kept], batch_tokens):
            rows = [kept[i] for i in batch]
            nll[batch] = _nll(model, rows)
            progress.add(sum(map(len, rows)))
    return pa.table(
        {
            "doc_id": documents["doc_id"],
            "label": documents["label"],
            "n_tokens": pa.array([max(len(row) - 1, 0) for row in kept], pa.int64()),
            "n_cut": pa.array([len(row) - len(part) for row, part in zip(tokens, kept, strict=True)], pa.int64()),
            "nll": nll,
        }
    )


def context_length(model: PreTrainedModel) -> int:
    """The number of positions that ``model`` was made for, in tokens.

    Raises:
        InputError: its configuration does not say.
    """
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise InputError("the model's configuration has no max_position_embeddings", file=model.name_or_path)
    return length


def batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices of rows by falling length, ties by index, in batches of at most ``batch_tokens`` with padding.

    Rows shorter than two tokens predict nothing and are left out; a row longer than ``batch_tokens`` goes alone.
    """
    made: list[list[int]] = []
    for i in sorted((i for i, n in enumerate(lengths) if n > 1), key=lambda i: (-lengths[i], i)):
        if made and (len(made[-1]) + 1) * lengths[made[-1][0]] <= batch_tokens:
            made[-1].append(i)
        else:
            made.append([i])
    return made


def _nll(model: PreTrainedModel, rows: list[list[int]]) -> Any:
    """Summed negative log-likelihood of each row (B,), float64.

    The rows are padded on the right and no mask is given: under causal attention no real token sees what follows it.
    The head is given only the hidden states that predict a real token, so logits are (N, V) and never (B, T, V), while
    all that a model does to its logits (Gemma's soft-capping, Granite's scale) still happens.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    ids_BT = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
    lengths_B = torch.tensor([len(row) for row in rows], device=model.device)
    predicts_BT = torch.arange(ids_BT.shape[1], device=model.device) < lengths_B[:, None] - 1

    def only_real(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0][predicts_BT][None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(only_real)
    try:
        logits_NV = model(input_ids=ids_BT, use_cache=False).logits[0]
    finally:
        hook.remove()
    targets_N = ids_BT[:, 1:][predicts_BT[:, :-1]]
    losses_N = cross_entropy(logits_NV.float(), targets_N, reduction="none").double()
    nll_B = torch.zeros(len(rows), dtype=torch.float64, device=model.device)
    return nll_B.index_add_(0, predicts_BT.nonzero()[:, 0], losses_N).cpu().numpy()
