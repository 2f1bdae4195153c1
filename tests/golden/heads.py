"""A tiny random model of every kind of LM head, and Algorithm 2 written out a token at a time in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.scoring.config import SketchConfig
from tasks.scoring.countsketch import CountSketch, sparse_projection

VOCAB = 320


def _config(name: str, **overrides: Any) -> Any:
    import transformers

    base = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip
    config = getattr(transformers, name)
    return config(**{**base, **overrides})


HEADS: dict[str, Callable[[], Any]] = {
    "llama tied": lambda: _config("LlamaConfig", tie_word_embeddings=True),
    "llama untied": lambda: _config("LlamaConfig", tie_word_embeddings=False),
    "gpt-neox": lambda: _config("GPTNeoXConfig", tie_word_embeddings=False),
    "olmo3": lambda: _config("Olmo3Config", tie_word_embeddings=False),
    "phi with head bias": lambda: _config("PhiConfig", tie_word_embeddings=False, num_key_value_heads=4),
    "gemma scaled embeddings": lambda: _config("GemmaConfig", head_dim=8),
    "gemma2 soft-capped": lambda: _config("Gemma2Config", head_dim=8, final_logit_softcapping=2.0),
    "granite divided logits": lambda: _config("GraniteConfig", logits_scaling=4.0),
    "cohere multiplied logits": lambda: _config("CohereConfig", logit_scale=0.25),
}


def build(name: str) -> Any:
    """The tiny random model of a head, in float32, with weights large enough that the softmax is not flat."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(HEADS[name](), dtype=torch.float32).eval()
        head = model.get_output_embeddings()
        with torch.no_grad():
            head.weight.mul_(12.0)
            if getattr(head, "bias", None) is not None:
                head.bias.normal_()
    return model


def reference_signature(model: Any, tokens: list[int], config: SketchConfig) -> NDArray[np.float64]:
    """Algorithm 2 for one document, line by line, in float64.

    The model's own hidden states and logits are taken in float32 from its full forward pass; everything after is
    float64, a position and a candidate at a time.
    """
    captured: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, __: captured.append(inputs[0]))
    with torch.no_grad():
        z_TV = model(input_ids=torch.tensor([tokens])).logits[0].double().numpy()
    hook.remove()
    h_Td = captured[0][0].double().numpy()
    weight = head.weight.detach().double().numpy()
    cap = getattr(model.config, "final_logit_softcapping", None)
    sketches = {
        "residual": CountSketch(weight.shape[0], config.kr, seed=config.seed, family="residual"),
        "hidden": CountSketch(weight.shape[1], config.kh, seed=config.seed, family="hidden"),
        **({"error": CountSketch(weight.shape[1], config.kg, seed=config.seed, family="error")} if config.kg else {}),
    }

    def sketch(family: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        made = np.zeros(sketches[family].width)
        for j, value in enumerate(x):
            made[sketches[family].bucket[j]] += sketches[family].sign[j] * value
        return made / np.linalg.norm(made)

    rh = np.zeros((config.kr, config.kh))
    gh = np.zeros((config.kg, config.kh))
    h_sum = np.zeros(weight.shape[1])
    for t in range(len(tokens) - 1):
        y = tokens[t + 1]
        order = np.argsort(-z_TV[t], kind="stable")[: config.max_top].tolist()
        if y not in order:
            order[-1] = y
        scaled = np.array([z_TV[t, v] for v in order]) / config.tau
        p_bar = np.exp(scaled - scaled.max())
        p_bar /= p_bar.sum()
        s, total = 0, 0.0
        while s < len(order) and total < config.rho_cum:
            total += p_bar[s]
            s += 1
        support = [c for c in range(len(order)) if c < max(s, config.min_top) or order[c] == y]
        mass = sum(p_bar[c] for c in support)
        r = np.zeros(weight.shape[0])
        for c in support:
            slope = 1.0 if cap is None else 1.0 - (z_TV[t, order[c]] / cap) ** 2
            r[order[c]] = (p_bar[c] / mass - (order[c] == y)) * slope
        r_hat, h_hat = sketch("residual", r), sketch("hidden", h_Td[t])
        share = np.linalg.norm(r) ** config.alpha
        rh += config.lambda_rh * share * np.outer(r_hat, h_hat)
        if config.kg:
            gh += config.lambda_gh * share * np.outer(sketch("error", weight.T @ r), h_hat)
        h_sum += share * h_Td[t] / np.linalg.norm(h_Td[t])
    phi = np.concatenate([rh.ravel(), gh.ravel()])
    phi /= np.linalg.norm(phi)
    if config.km:
        mh = sparse_projection(weight.shape[1], config.km, seed=config.seed, family="mean").T.astype(np.float64) @ h_sum
        phi = np.concatenate([phi, config.lambda_mh * mh / np.linalg.norm(mh)])
    return phi / np.linalg.norm(phi)
