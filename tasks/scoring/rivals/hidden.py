"""Cosine of token-mean hidden states of the scorer (Table 13, Figure 7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.usage import searching
from tasks.scoring.batching import Tokenized
from tasks.scoring.readout import Readout
from tasks.scoring.rivals.reading import Reading
from tasks.scoring.rivals.similarity import cosine_scores
from tasks.scoring.search import Scores

if TYPE_CHECKING:
    from tasks.scoring.config import HiddenConfig
    from tasks.scoring.methods import Request

Layer = str | int


def hidden_scores(config: HiddenConfig, request: Request) -> Scores:
    """Scores by the cosine of the mean, over all tokens of a text, of one layer's hidden states.

    The features, float32, are kept in ``work/hidden-LAYER``.

    Raises:
        InputError: the model cannot be used or has no such layer.
    """
    reading = Reading(request)

    def features(documents: Tokenized, side: str) -> list[NDArray[Any]]:
        def make(places: range, count: Callable[[int], None]) -> NDArray[np.float32]:
            return _token_means(reading, documents, places, config.layer, count)

        directory: Path = request.work / f"hidden-{config.layer}" / side
        return reading.keep(directory, documents, {"layer": config.layer}, make, label=f"hidden states, {side}")

    pool, queries = features(reading.pool, "pool"), features(reading.queries, "queries")
    with searching():
        per_query = cosine_scores(pool, np.concatenate(queries), config.calibration)
    return Scores(list(reading.pool.doc_ids), per_query.mean(axis=0, dtype=np.float64),
                  list(reading.queries.doc_ids), per_query)  # fmt: skip


@torch.inference_mode()
def _token_means(
    reading: Reading, documents: Tokenized, places: range, layer: Layer, count: Callable[[int], None]
) -> NDArray[np.float32]:
    means: list[torch.Tensor] = []
    for ids_BT, tokens in reading.batches(documents, places):
        state_BTd = states(reading.readout, ids_BT, layer)
        means += [state_Td[:n].float().mean(dim=0) for state_Td, n in zip(state_BTd, tokens, strict=True)]
        count(sum(tokens))
    return torch.stack(means).cpu().numpy()


@torch.inference_mode()
def states(readout: Readout, ids_BT: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Hidden states (B, T, d) of a layer.

    Args:
        readout: the scorer.
        ids_BT: token ids, padded on the right.
        layer: ``embedding``: the input embeddings. ``last``: the final hidden states, after the final norm, as the head
            reads them. A number from 1 on: the output of that layer, before any final norm.

    Raises:
        InputError: the model has no such layer.
    """
    if layer == "embedding":
        embedded: torch.Tensor = readout.model.get_input_embeddings()(ids_BT.to(readout.device))
        return embedded
    if layer == "last":
        return readout.hidden(ids_BT)
    captured: list[torch.Tensor] = []

    def capture(_: Any, __: Any, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)

    hook = _block(readout, int(layer)).register_forward_hook(capture)
    try:
        readout.hidden(ids_BT)
    finally:
        hook.remove()
    return captured[0]


def _block(readout: Readout, number: int) -> torch.nn.Module:
    """Layer ``number`` of the model, counted from 1: transformers keeps the layers in one list, under several names."""
    layers = readout.model.config.get_text_config().num_hidden_layers
    if number > layers:
        raise InputError(f"layer {number}: the model has layers 1 to {layers}", file=readout.name, field="layer")
    for module in readout.model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return module[number - 1]
    raise InputError("keeps its layers in no list of modules; take the layer embedding or last", file=readout.name,
                     field="layer")  # fmt: skip
