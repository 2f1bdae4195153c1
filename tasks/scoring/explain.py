"""Looking into an attribution: what the index's model says itself, and which tokens of a document made its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.models import load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.scoring.build import scorer_of
from tasks.scoring.config import SketchConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tasks.scoring.calibration import Fitted, Signatures
    from tasks.scoring.index import Index
    from tasks.scoring.readout import Readout
    from tasks.scoring.rise import Sketcher
    from tasks.scoring.search import Hit

CONTEXT = 12
"""Tokens shown before the one that is predicted."""


@dataclass(frozen=True)
class TokenShare:
    """What one position of a document gave to the document's score."""

    token: int
    """Number of the token that the position predicts, from 0 on; the first of a document is predicted by none."""
    text: str
    """That token."""
    context: str
    """The text before it, with an ellipsis where it is cut."""
    share: float
    """Of the score; see :func:`position_shares`."""


def generate(whole: Index, prompt: str, max_new_tokens: int, *, model: str | None = None) -> str:
    """What the index's model writes after a prompt, greedily, so always the same.

    It ends at the model's end of text, after ``max_new_tokens``, or where prompt and continuation together have as many
    tokens as the index reads of a document.

    Args:
        whole: the index.
        prompt: text to continue.
        max_new_tokens: most tokens to write.
        model: where the index's model lies now; None takes the place it was read from.

    Raises:
        InputError: the model is another one, the prompt fills all tokens that are read, or the model ends it at once.
    """
    import torch
    from transformers import GenerationConfig

    loaded, tokenizer, longest = _load(whole, model)
    longest = min(longest, getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or longest)
    ids_1T = tokenizer(prompt, return_tensors="pt")["input_ids"].to(loaded.device)
    room = longest - ids_1T.shape[1]
    if room < 1:
        raise InputError(f"--prompt has {ids_1T.shape[1]} tokens, and {longest} are read of prompt and continuation "
                         "together; give a shorter one")  # fmt: skip
    # The settings that come with a model (sampling, penalties) are left out, but for where it ends.
    plain = GenerationConfig(do_sample=False, max_new_tokens=min(max_new_tokens, room),
                             eos_token_id=loaded.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    loaded.generation_config = plain
    with torch.inference_mode():
        made_1T = loaded.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=plain)
    written = _decode(tokenizer, made_1T[0, ids_1T.shape[1] :].tolist(), skip_special_tokens=True)
    if not written.strip():
        raise InputError("the model ends the text of --prompt at once, so there is nothing to attribute; give another")
    return written


def explain(
    whole: Index, query_QD: Signatures, hits: Sequence[Hit], texts: Mapping[str, str], count: int, *, fitted: Fitted,
    model: str | None = None,
) -> list[list[TokenShare]]:  # fmt: skip
    """The positions of some documents that gave the most to their mean-pooled scores.

    Args:
        whole: the index.
        query_QD: signatures of the queries (Q, D), not calibrated.
        hits: documents that were found.
        texts: their texts, by id.
        count: positions to name for each; ties by position.
        fitted: calibration of both sides.
        model: where the index's model lies now; None takes the place it was read from.

    Returns:
        For each document its positions, the largest share first.

    Raises:
        InputError: the model is another one, or a text is missing or is not the one that was indexed.
    """
    from tasks.scoring.readout import Readout
    from tasks.scoring.rise import Sketcher

    for hit in hits:
        if hit.doc_id not in texts:
            raise InputError(f"the document {hit.doc_id} is not in --data, which --tokens needs: name its file too")
    loaded, tokenizer, longest = _load(whole, model)
    readout = Readout(loaded, whole.directory.name)
    sketcher = Sketcher(readout.head, SketchConfig(**whole.manifest["sketch"]))
    pooled_D = fitted.apply(query_QD).mean(axis=0, dtype=np.float64)
    return [
        _strongest(tokenizer, ids, position_shares(readout, sketcher, ids, pooled_D), count)
        for ids in (_indexed(whole, tokenizer, hit, texts[hit.doc_id], longest) for hit in hits)
    ]


def position_shares(
    readout: Readout, sketcher: Sketcher, ids: Sequence[int], direction_D: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What each position of a document gives to φᵀ u: ⟨e_t ⊗ ĥ_t, u⟩ / ‖Σ_s e_s ⊗ ĥ_s‖ with e_t = [λ_rh r̂_t; λ_gh ĝ_t]
    (lines 15–18 of Algorithm 2), and what its hidden state gives to the MH channel, where there is one.

    With u the mean query signature the shares sum to the score of an index without calibration. A calibrated score is
    no sum over positions. There u is the mean of the calibrated query signatures and the share the linear one, which
    leaves out what the calibration does to the document's own signature (power, sign, pool mean, unit length; and the
    spread of its scores). For ``center`` that changes no order: the pool mean is the same for every position.

    Args:
        readout: the scorer.
        sketcher: the index's sketch.
        ids: the document's T + 1 tokens.
        direction_D: u, (D,).

    Returns:
        (T,): the share of the position that predicts token t + 1 at t.
    """
    import torch

    from tasks.scoring.engine import readout_factors

    if len(ids) < 2:
        return np.zeros(0)
    ids_T = torch.tensor(ids)
    device, config = readout.head.weight.device, sketcher.config
    with torch.inference_mode():
        h_Td = readout.hidden(ids_T.unsqueeze(0))[0, :-1].to(device)
        (made,), _ = readout_factors(readout, h_Td, ids_T[1:].to(device), [sketcher])
        error_TE = torch.cat([config.lambda_rh * made.r_TR, config.lambda_gh * made.g_TG], -1).double()
        h_TH = made.h_TH.double()
        direction = torch.from_numpy(direction_D).to(device)
        direction_EH = direction[: config.cuts[1]].view(-1, config.kh)
        size = torch.linalg.vector_norm(error_TE.T @ h_TH)
        share_T = ((error_TE @ direction_EH) * h_TH).sum(-1) / size.masked_fill(size == 0, 1.0)
        if sketcher.mean_dM is not None:
            m_TM = config.lambda_mh * (made.m_Td @ sketcher.mean_dM).double()
            whole = torch.linalg.vector_norm(m_TM.sum(0)) / config.lambda_mh
            share_T += m_TM @ direction[config.cuts[1] :] / whole.masked_fill(whole == 0, 1.0)
            share_T /= (float(size > 0) + float(whole > 0) * config.lambda_mh**2) ** 0.5 or 1.0
    return np.asarray(share_T.cpu().numpy(), dtype=np.float64)


def _load(whole: Index, model: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """The index's model and tokenizer, and the tokens that are read of a document."""
    scorer = scorer_of(whole, model=model)
    located = locate(scorer.model, revision=scorer.revision)
    loaded = load_causal_lm(located, dtype=torch_dtype(scorer.precision))
    return loaded, load_tokenizer(located), scorer.max_length


def _indexed(whole: Index, tokenizer: PreTrainedTokenizerBase, hit: Hit, text: str, longest: int) -> list[int]:
    """The tokens of a document as they were indexed."""
    ids: list[int] = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
    number = int(np.searchsorted(whole.starts, hit.place, side="right")) - 1
    shard = whole.shards[number]
    counted = shard.documents().column("n_tokens")[hit.place - int(whole.starts[number])].as_py()
    if len(ids) != counted:
        raise InputError(f"the document {hit.doc_id} has {counted} tokens in the index and {len(ids)} in --data: give "
                         "the file that the index was made from")  # fmt: skip
    return ids


def _strongest(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], share_T: NDArray[np.float64], count: int
) -> list[TokenShare]:
    return [
        TokenShare(
            place + 1, _decode(tokenizer, [ids[place + 1]]),
            ("… " if place >= CONTEXT else "") + _decode(tokenizer, ids[max(0, place + 1 - CONTEXT) : place + 1]),
            float(share_T[place]),
        )
        for place in np.argsort(-share_T, kind="stable")[:count].tolist()
    ]  # fmt: skip


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, skip_special_tokens: bool = False) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))
