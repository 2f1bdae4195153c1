"""What RapidIn, ZO-Inf and LoGra share: the loss of a document and its gradient, and scores from features of it.

The loss of a document is the mean over its next tokens, ℓ(x) = −1/(n−1) Σ_t log p(x_{t+1} | x_≤t), of the scorer in
float32 and in evaluation mode, whatever its precision elsewhere. A document of one token has the loss 0 and no
gradient. One process does all of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.models import Located, device, load_causal_lm
from tasks.scoring.config import FitConfig
from tasks.scoring.rivals.reading import Reading, require_memory
from tasks.scoring.rivals.similarity import cosine_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.scoring.methods import Request

PerQuery = tuple[list[str], list[str], NDArray[np.float32]]
"""Ids of N documents, ids of Q queries, scores (Q, N)."""
Told = Callable[[int], None]
"""Told the tokens that are done."""
WAY_OUT = "take fewer documents, a smaller scorer or smaller features"
_ACTIVATIONS = 80
"""Bytes that a backward pass keeps of a position, a layer and a unit of width: about twenty float32."""


class Gradients(Reading):
    """Tokenized pool and queries, and the scorer as it is differentiated.

    Raises:
        InputError: the scorer cannot be used, or has fewer positions than a document has tokens.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.skeleton = skeleton(self.located)
        """The scorer without weights: what a method needs is known before anything is loaded."""
        self.count = sum(parameter.numel() for parameter in self.skeleton.parameters())
        """P, trainable parameters; tied ones count once."""
        self.sides = (("pool", self.pool), ("queries", self.queries))
        """Both sides with the names of their folders."""
        self.rows = len(self.pool) + len(self.queries)
        """Documents of both sides."""
        self.longest = max(side.length(len(side) - 1) for _, side in self.sides)
        """Tokens of the longest document."""
        positions = getattr(self.skeleton.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and self.longest > positions:
            raise InputError(f"the scorer has {positions} positions, a document {self.longest} tokens; cut documents "
                             f"at {positions}", file=self.located.spec, field="max_length")  # fmt: skip

    def load(self, located: Located) -> PreTrainedModel:
        """The scorer, or a checkpoint of it, in float32 and evaluation mode."""
        if self.scorer.threads is not None:
            torch.set_num_threads(self.scorer.threads)
        return load_causal_lm(located, dtype=torch.float32, device_map=self.scorer.device_map)

    def check_room(self, what: str, work: Path, *, model: int, tokens: int, backward: bool, stored: int) -> None:
        """Refuse what cannot fit before it starts.

        Args:
            what: name of the method, for the message.
            work: where features are kept; what stands there already needs no further room.
            model: bytes of weights and of all that is of their size.
            tokens: positions of one pass; their logits and activations are added.
            backward: whether it is differentiated.
            stored: bytes of all features on disk.

        Raises:
            InputError: with what is needed and what this machine has.
        """
        config = self.skeleton.config.get_text_config()
        activations = _ACTIVATIONS * config.hidden_size * config.num_hidden_layers if backward else 0
        require_memory(model + tokens * (12 * config.vocab_size + activations), device(), what, WAY_OUT)
        need = stored - sum(file.stat().st_size for file in work.rglob("*.npy"))
        if need > (free := shutil.disk_usage(work).free):
            raise InputError(f"out of disk: {what} needs about {need / 2**30:.1f} GiB, this machine has "
                             f"{free / 2**30:.1f} free; {WAY_OUT}", file=work)  # fmt: skip


def skeleton(located: Located) -> PreTrainedModel:
    """A model with its modules and shapes, but without weights.

    Raises:
        InputError: its configuration is none of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(located.path, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        problem = str(error).strip().splitlines()
        raise InputError(f"is no causal language model ({problem[0] if problem else type(error).__name__})",
                         file=located.spec) from None  # fmt: skip


def document_losses(model: PreTrainedModel, ids_BT: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """ℓ of every document of a batch that is padded on the right, (B,) in nats and float64.

    No attention mask is given: under causal attention a real position never sees the padding behind it, and since no
    loss depends on the padding its gradient is zero.
    """
    ids_BT = ids_BT.to(model.get_input_embeddings().weight.device)
    z_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    positions = [count - 1 for count in tokens]
    real_BT = torch.arange(ids_BT.shape[1] - 1) < torch.tensor(positions).unsqueeze(1)
    z_TV, label_T = z_BTV[real_BT.to(z_BTV.device)].float(), ids_BT[:, 1:][real_BT.to(ids_BT.device)].to(z_BTV.device)
    nll_T = torch.nn.functional.cross_entropy(z_TV, label_T, reduction="none")
    return torch.stack([part.double().sum() / max(1, len(part)) for part in nll_T.split(positions)])


def document_gradient(
    model: PreTrainedModel, parameters: list[torch.nn.Parameter], ids_T: NDArray[np.int32]
) -> list[torch.Tensor]:
    """∂ℓ/∂θ of one document for each of the parameters, in their shapes; zero where the loss does not depend on one."""
    loss = document_losses(model, torch.from_numpy(ids_T).long().unsqueeze(0), [len(ids_T)]).sum()
    # A mixture of experts may have parameters that no token of a document came to.
    gradient: tuple[torch.Tensor, ...] = torch.autograd.grad(loss, parameters, allow_unused=True,
                                                             materialize_grads=True)  # fmt: skip
    return list(gradient)


def feature_scores(
    pool: Sequence[NDArray[Any]], query_QF: NDArray[Any], *, normalize: bool, calibration: str
) -> NDArray[np.float32]:
    """Products of features, (Q, N); cosines with ``normalize``, and with any calibration but none.

    Args:
        pool: features (n, F) in arrays that follow each other, N rows in all; they can be mapped.
        query_QF: features of the queries.
    """
    if calibration != "none":
        # The sample that a calibration is fitted on, and two copies on the way.
        need = 3 * 4 * min(FitConfig().documents, sum(map(len, pool))) * query_QF.shape[1]
        require_memory(need, torch.device("cpu"), "the calibration", WAY_OUT)
    if normalize or calibration != "none":
        return cosine_scores(pool, query_QF, calibration)
    return np.concatenate([query_QF @ part.T for part in pool], axis=1).astype(np.float32, copy=False)


def ids(reading: Reading) -> tuple[list[str], list[str]]:
    """Ids of the pool's documents and of the queries, in the order of their features."""
    return list(reading.pool.doc_ids), list(reading.queries.doc_ids)
