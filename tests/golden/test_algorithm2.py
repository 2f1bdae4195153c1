"""The engine against Algorithm 2 written out, and its exact product against autograd, on every kind of head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.scoring import engine
from tasks.scoring.batching import Tokenized, batches, padding_share
from tasks.scoring.config import SketchConfig
from tasks.scoring.engine import forward
from tasks.scoring.readout import Readout
from tasks.scoring.rise import Sketcher, sparse_residuals, top_k
from tests.golden.heads import HEADS, VOCAB, build, reference_signature

SKETCH = SketchConfig(kr=16, kh=6, kg=12, max_top=40)


def documents(count: int = 7, seed: int = 3) -> Tokenized:
    rng = np.random.default_rng(seed)
    return Tokenized.of([f"d{i}" for i in range(count)],
                        [rng.integers(2, VOCAB, rng.integers(3, 24)) for _ in range(count)])  # fmt: skip


def token_lists(docs: Tokenized) -> list[list[int]]:
    return [docs.ids(place).tolist() for place in range(len(docs))]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("config", [
    SKETCH, SKETCH.model_copy(update={"alpha": 1.0, "tau": 1.5, "rho_cum": 0.5}),
    SKETCH.model_copy(update={"alpha": 1.0, "kg": 0, "km": 40, "lambda_mh": 0.5}),
], ids=["table 6", "weighted, warmer, shorter", "mean hidden state"])  # fmt: skip
def test_engine_is_algorithm_2(name: str, config: SketchConfig) -> None:
    model, docs = build(name), documents()
    readout = Readout(model, name)
    made = forward(readout, docs, range(len(docs)), batch_tokens=64, sketchers=[Sketcher(readout.head, config)])
    expected = np.stack([reference_signature(model, tokens, config) for tokens in token_lists(docs)])
    np.testing.assert_allclose(made.signatures[0], expected, atol=1e-5)


def test_sketches_that_share_a_pass_have_the_bytes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sizes, weights, seeds and shares take the same residuals; another support takes its own."""
    same = [{}, {"seed": 1}, {"alpha": 0.5}, {"kr": 8, "kh": 3, "kg": 30}, {"lambda_rh": 0.0},
            {"km": 50}, {"kg": 0, "km": 50}]
    others = [{"tau": 1.5}, {"rho_cum": 0.5}, {"min_top": 9, "rho_cum": 0.1}, {"max_top": 10}]
    configs = [SKETCH.model_copy(update=update) for update in same + others]
    model, docs = build("llama tied"), documents(20)
    readout = Readout(model, "llama")
    sketchers = [Sketcher(readout.head, config) for config in configs]
    alone = [forward(readout, docs, range(20), batch_tokens=10_000, sketchers=[one], losses=True) for one in sketchers]
    counted: list[SketchConfig] = []
    monkeypatch.setattr(engine, "sparse_residuals", lambda z_TV, label_T, config, head: (
        counted.append(config), sparse_residuals(z_TV, label_T, config, head))[1])  # fmt: skip
    together = forward(readout, docs, range(20), batch_tokens=10_000, sketchers=sketchers, losses=True)
    for phi, one, config in zip(together.signatures, alone, configs, strict=True):
        assert phi.tobytes() == one.signatures[0].tobytes(), config
        assert phi.shape == (20, config.dimension)
    assert together.losses is not None
    assert together.losses.tobytes() == alone[0].losses.tobytes()
    batch_count = len(batches(docs, range(20), 10_000))
    assert len(counted) == batch_count * (1 + len(others))
    assert len({phi.tobytes() for phi in together.signatures}) == len(configs)


@pytest.mark.parametrize("name", HEADS)
def test_unsketched_product_is_the_head_gradient(name: str) -> None:
    """Σ_t r_t ⊗ h_t over the whole vocabulary equals ∇_W Σ_t ℓ_t (Lemma C.1), so the product of two documents does."""
    model = build(name)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied: only the path through the head counts
    readout = Readout(model, name)
    whole = SketchConfig(max_top=VOCAB, rho_cum=1.0)
    gradients, outers = [], []
    for tokens in token_lists(documents(3)):
        ids = torch.tensor([tokens])
        model.zero_grad()
        logits = model(input_ids=ids).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        gradients.append(head.weight.grad.double().flatten().clone())
        h_Td = readout.hidden(ids)[0, :-1].clone()
        residuals = sparse_residuals(readout.head.logits(h_Td), ids[0, 1:], whole, readout.head)
        r_TV = torch.zeros(len(h_Td), VOCAB).scatter_(1, residuals.index_TC, residuals.value_TC.detach())
        outers.append((r_TV.T.double() @ h_Td.double()).flatten())
    exact, ours = torch.stack(gradients), torch.stack(outers)
    scale = (exact @ exact.T).abs().max()
    torch.testing.assert_close(ours @ ours.T / scale, exact @ exact.T / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_tokens", [24, 100, 1000])
def test_scores_do_not_depend_on_the_batch(batch_tokens: int) -> None:
    model, docs = build("llama tied"), documents(20)
    readout = Readout(model, "llama")
    sketchers = [Sketcher(readout.head, SKETCH)]
    alone = [forward(readout, docs, range(i, i + 1), batch_tokens=1, sketchers=sketchers, losses=True)
             for i in range(len(docs))]  # fmt: skip
    together = forward(readout, docs, range(len(docs)), batch_tokens=batch_tokens, sketchers=sketchers, losses=True)
    assert together.losses is not None
    np.testing.assert_allclose(together.signatures[0], np.concatenate([one.signatures[0] for one in alone]), atol=1e-5)
    np.testing.assert_allclose(together.losses, np.concatenate([one.losses for one in alone]), rtol=1e-5)


def test_losses_are_the_models() -> None:
    model, docs = build("gpt-neox"), documents(3)
    made = forward(Readout(model, "gpt-neox"), docs, range(3), batch_tokens=1000, losses=True)
    for tokens, loss in zip(token_lists(docs), made.losses, strict=True):
        ids = torch.tensor([tokens])
        assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 5, 64, 256])
@pytest.mark.parametrize("vocabulary", [32 * 400, 32 * 1572, 50_257])
def test_top_k_by_blocks_is_top_k(k: int, vocabulary: int) -> None:
    z_TV = torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(0))
    values, index = top_k(z_TV, k)
    expected, _ = z_TV.topk(k, dim=-1)
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    torch.testing.assert_close(z_TV.gather(1, index), expected, rtol=0, atol=0)


def test_a_document_of_one_token_has_a_zero_signature_and_no_loss() -> None:
    model = build("llama tied")
    readout = Readout(model, "llama")
    docs = Tokenized.of(["b", "a"], [[6, 7, 8], [5]])
    made = forward(readout, docs, range(2), batch_tokens=100, sketchers=[Sketcher(readout.head, SKETCH)], losses=True)
    assert not made.signatures[0][0].any()
    assert np.isnan(made.losses[0])
    assert np.linalg.norm(made.signatures[0][1]) == pytest.approx(1.0, abs=1e-6)


def test_a_model_that_sees_ahead_is_refused() -> None:
    from tasks.common.errors import InputError

    model = build("llama tied")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(InputError, match="not causal"):
        Readout(model, "bidirectional")


def test_batches_keep_the_budget_and_cover_everything() -> None:
    docs = documents(200, seed=5)
    plan = batches(docs, range(len(docs)), 128)
    assert [place for batch in plan for place in batch] == list(range(len(docs)))
    assert all(len(batch) * docs.length(batch[-1]) <= 128 for batch in plan)
    assert padding_share(docs, plan) < 0.05
