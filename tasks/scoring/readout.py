"""The readout of any causal language model: final hidden states, logits and the head between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tasks.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """z = cap · tanh(s (W h + b) / cap), without the tanh where the model has no soft-capping.

    Most models have s = 1, no bias and no cap.
    """

    weight: torch.Tensor
    """W: (V, d)."""
    bias: torch.Tensor | None
    """b: (V,)."""
    scale: float
    """s."""
    cap: float | None
    """Soft-capping of the logits (Gemma)."""

    def logits(self, h_Td: torch.Tensor) -> torch.Tensor:
        """Logits (T, V) in float32."""
        z_TV = torch.nn.functional.linear(h_Td, self.weight, self.bias).float()
        if self.scale != 1.0:
            z_TV *= self.scale
        if self.cap is not None:
            z_TV = torch.tanh(z_TV / self.cap) * self.cap
        return z_TV

    def slope(self, z: torch.Tensor) -> torch.Tensor | float:
        """∂z/∂(W h + b) at logits z: what turns p − 1_y into the residual whose outer product is ∇_W ℓ (Lemma C.1)."""
        if self.cap is None:
            return self.scale
        return self.scale * (1.0 - (z / self.cap) ** 2)


class Readout:
    """Runs a causal language model up to its head.

    The head's input is taken by a hook on the head itself, which then computes on no position at all: what is sketched
    is what the model multiplies with W, whatever the architecture does before. Padding stands on the right and no
    attention mask is given: under causal attention a real position never sees what follows it, and the attention
    kernels are faster without a mask.

    Raises:
        InputError: the model's logits are not those of its head, or it is not causal.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model = model
        self.name = name
        module: Any = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.head = Head(module.weight, getattr(module, "bias", None), _scale(config), _cap(config))
        self.vocabulary, self.width = self.head.weight.shape
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        self.device = next(iter(model.parameters())).device
        self._module = module
        self._check()

    @torch.inference_mode()
    def hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Final hidden states h (B, T, d), as the head receives them."""
        captured: list[torch.Tensor] = []

        def capture(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            captured.append(inputs[0])
            return (inputs[0][:, :0], *inputs[1:])

        hook = self._module.register_forward_pre_hook(capture)
        try:
            self.model(input_ids=ids_BT.to(self.device), use_cache=False)
        finally:
            hook.remove()
        if not captured:
            raise InputError("the model does not call its LM head as a module", file=self.name)
        return captured[0]

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare with the model's own logits on a few tokens, and a prefix with the whole."""
        ids = torch.arange(1, 9).remainder(self.vocabulary).unsqueeze(0)
        given = self.model(input_ids=ids.to(self.device), use_cache=False).logits[0].float()
        h_Td = self.hidden(ids)[0]
        made = self.head.logits(h_Td).to(given.device)
        tolerance = 1e-4 if self.head.weight.dtype == torch.float32 else 5e-2
        size = given.abs().max().clamp_min(1e-6)
        if not torch.isfinite(given).all():
            raise InputError("the model's logits are not finite", file=self.name)
        if given.shape != made.shape or (given - made).abs().max() > tolerance * size:
            raise InputError("the model's logits are not those of its LM head on its final hidden states",
                             file=self.name)  # fmt: skip
        prefix = self.hidden(ids[:, :4])[0].float()
        if (prefix - h_Td[:4].float()).abs().max() > tolerance * h_Td.float().abs().max():
            raise InputError("the model is not causal: a position sees what follows it", file=self.name)


def _scale(config: Any) -> float:
    """Factor between the head's output and the logits: Cohere multiplies, Granite divides."""
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


def _cap(config: Any) -> float | None:
    cap = getattr(config, "final_logit_softcapping", None)
    return float(cap) if cap else None
