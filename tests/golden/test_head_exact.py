"""The closed forms on the LM head's gradient against autograd and float64, on every kind of head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tasks.scoring.config import SketchConfig
from tasks.scoring.countsketch import CountSketch
from tasks.scoring.engine import Positions
from tasks.scoring.readout import Readout
from tasks.scoring.rivals.head import GradientSketch, exact_gradients, norms, products, sparse_gradients
from tests.golden import heads
from tests.golden.heads import HEADS, VOCAB, build, reference_signature

DOCUMENTS = [np.random.default_rng(seed).integers(2, VOCAB, length).tolist()
             for seed, length in enumerate([2, 5, 9, 9, 23])]  # fmt: skip


def untied(name: str) -> Any:
    """A model whose loss depends on its head's weight through the head alone."""
    model = build(name)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


def gradients(model: Any) -> np.ndarray:
    """∇_W Σ_t ℓ_t of each document by autograd, (N, V, d)."""
    made = []
    for tokens in DOCUMENTS:
        ids = torch.tensor([tokens])
        model.zero_grad()
        logits = model(input_ids=ids).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        made.append(model.get_output_embeddings().weight.grad.double().numpy().copy())
    return np.stack(made)


@torch.inference_mode()
def positions(readout: Readout, documents: list[list[int]]) -> Positions:
    h_Td = torch.cat([readout.hidden(torch.tensor([tokens]))[0, :-1] for tokens in documents])
    label_T = torch.tensor([token for tokens in documents for token in tokens[1:]])
    return Positions(h_Td, label_T, [len(tokens) - 1 for tokens in documents])


@pytest.mark.parametrize("name", HEADS)
def test_exact_products_are_those_of_autograds_gradients(name: str) -> None:
    model = untied(name)
    readout = Readout(model, name)
    with torch.inference_mode():
        made = exact_gradients(readout, positions(readout, DOCUMENTS))
        ours, lengths = products(made, made).numpy(), norms(made).numpy()
    flat = gradients(model).reshape(len(DOCUMENTS), -1)
    exact = flat @ flat.T
    np.testing.assert_allclose(ours / np.abs(exact).max(), exact / np.abs(exact).max(), atol=1e-5)
    np.testing.assert_allclose(lengths, np.sqrt(np.diag(exact)), rtol=1e-5)
    np.testing.assert_allclose(ours / np.outer(lengths, lengths), exact / np.sqrt(np.outer(np.diag(exact),
                               np.diag(exact))), atol=1e-5)  # fmt: skip


class Identity(CountSketch):
    """A sketch of full width that moves nothing."""

    def __init__(self, dimension: int, width: int, *, seed: int, family: str) -> None:
        super().__init__(dimension, width, seed=seed, family=family)
        self.bucket, self.sign = np.arange(dimension), np.ones(dimension, dtype=np.float32)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_sparse_products_are_algorithm_2_without_sketches(
    name: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "CountSketch", Identity)
    config = SketchConfig(kr=VOCAB, kh=32, kg=32, lambda_gh=0.0, max_top=40, alpha=alpha)
    model = build(name)
    readout = Readout(model, name)
    with torch.inference_mode():
        made = sparse_gradients(readout, positions(readout, DOCUMENTS), config)
        ours, lengths = products(made, made).numpy(), norms(made).numpy()
    phi = np.stack([reference_signature(model, tokens, config) for tokens in DOCUMENTS])
    np.testing.assert_allclose(ours / np.outer(lengths, lengths), phi @ phi.T, atol=1e-5)


@pytest.mark.parametrize("name", ["llama untied", "gemma2 soft-capped", "phi with head bias"])
@pytest.mark.parametrize("width", [64, 101])
def test_the_gradients_sketch_is_a_countsketch_of_all_its_coordinates(name: str, width: int) -> None:
    model = untied(name)
    readout = Readout(model, name)
    with torch.inference_mode():
        ours = GradientSketch(readout, width, seed=3)(positions(readout, DOCUMENTS)).numpy()
    residual = CountSketch(VOCAB, width, seed=3, family="gradient residual")
    hidden = CountSketch(readout.width, width, seed=3, family="gradient hidden")
    bucket = (residual.bucket[:, None] + hidden.bucket) % width
    sign = residual.sign[:, None] * hidden.sign
    for sketch, gradient in zip(ours, gradients(model), strict=True):
        expected = np.bincount(bucket.ravel(), (sign * gradient).ravel(), minlength=width)
        np.testing.assert_allclose(sketch, expected, atol=1e-5 * np.linalg.norm(expected))


def test_a_wide_sketch_keeps_the_cosines() -> None:
    """The sketch is unbiased and its spread falls with √K: at K = 2^16 the cosines stand to a few hundredths."""
    model = untied("llama untied")
    readout = Readout(model, "llama")
    with torch.inference_mode():
        sketch = GradientSketch(readout, 1 << 16, seed=0)(positions(readout, DOCUMENTS)).numpy()
    flat = gradients(model).reshape(len(DOCUMENTS), -1)
    cosines = [unit @ unit.T for unit in (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (sketch, flat))]
    np.testing.assert_allclose(*cosines, atol=0.03)


def test_a_document_of_one_token_has_no_gradient() -> None:
    readout = Readout(build("llama tied"), "llama")
    documents = [[5], *DOCUMENTS[:2], [7]]
    with torch.inference_mode():
        given = positions(readout, documents)
        for made in (exact_gradients(readout, given), sparse_gradients(readout, given, SketchConfig())):
            product = products(made, made)
            assert not product[[0, 3]].any()
            assert norms(made).tolist() == pytest.approx(product.diag().sqrt().tolist())
        assert not GradientSketch(readout, 64, seed=0)(given)[[0, 3]].any()
