"""RapidIn, ZO-Inf and LoGra against gradients that torch computes, on tiny random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from flows.cli import rise
from tasks.common.errors import InputError
from tasks.common.models import load_causal_lm, load_tokenizer, locate
from tasks.common.stage import digest_directory
from tasks.scoring.config import LoGraConfig, MethodConfig, RapidInConfig, ScorerConfig, ZoInfConfig
from tasks.scoring.methods import Request, score_pool
from tasks.scoring.rivals import gradients, logra, rapidin
from tasks.scoring.rivals.logra import linear_modules
from tasks.scoring.rivals.rapidin import Compression, direction
from tasks.scoring.search import Scores
from tests.tiny import tiny_gpt_neox, tiny_llama, tiny_olmo3

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXTS = {"pool": ["the fox", "a lazy dog jumps over", "seven wizards", "box", "quick brown foxes", "over and over"],
         "queries": ["the dog", "seven boxes of wizards"]}  # fmt: skip


def ask(
    folder: Path, model: Path, *, batch_tokens: int = 40, shard_tokens: int = 60,
    pool: list[str] | None = None, reverse: bool = False,
) -> Request:  # fmt: skip
    """A request for the texts above, or others as the pool; its documents are called p0, p1, … and q0, …"""
    folder.mkdir()
    for name, texts in (("pool", pool or TEXTS["pool"]), ("queries", TEXTS["queries"])):
        rows = [(f"{name[0]}{number}", text) for number, text in enumerate(texts)]
        rows = rows[::-1] if reverse else rows
        pq.write_table(pa.table({"doc_id": [row[0] for row in rows], "text": [row[1] for row in rows]}),
                       folder / f"{name}.parquet")  # fmt: skip
    scorer = ScorerConfig(model=str(model), batch_tokens=batch_tokens, shard_tokens=shard_tokens, precision="float32")
    work = folder / "work"
    work.mkdir()
    return Request(folder / "pool.parquet", folder / "queries.parquet", scorer, work)


def matrix(scores: Scores) -> np.ndarray:
    """Scores per query with queries and documents in the order of their ids."""
    assert scores.per_query is not None
    np.testing.assert_allclose(scores.per_query.mean(axis=0), scores.mean, rtol=1e-5, atol=1e-7)
    return scores.per_query[np.argsort(scores.query_ids)][:, np.argsort(scores.doc_ids)].astype(np.float64)


def exact(model: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    """The gradient of each text's loss, by parameter, as the model's own loss gives it; tied parameters once."""
    located = locate(str(model))
    tokenizer, loaded = load_tokenizer(located), load_causal_lm(located, dtype=torch.float32)
    made: dict[str, list[dict[str, torch.Tensor]]] = {}
    for side, texts in TEXTS.items():
        made[side] = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            loaded.zero_grad()
            loaded(input_ids=ids, labels=ids).loss.backward()
            made[side].append({name: p.grad.double().clone() for name, p in loaded.named_parameters()
                               if p.grad is not None})  # fmt: skip
    return made


def products(
    made: dict[str, list[dict[str, torch.Tensor]]], *, unit: bool = False, among: set[str] | None = None
) -> np.ndarray:
    """⟨g(q), g(x)⟩ over the parameters (or those ``among``), each at unit length if so asked."""
    rows = {side: torch.stack([
        torch.cat([torch.nn.functional.normalize(g.flatten(), dim=0) if unit else g.flatten()
                   for name, g in sorted(document.items()) if among is None or name in among])
        for document in documents]) for side, documents in made.items()}  # fmt: skip
    return (rows["queries"] @ rows["pool"].T).numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), **SMALL, num_key_value_heads=1)


def test_a_compression_moves_every_entry_to_one_of_equal_segments() -> None:
    """Recovered from unit vectors: 8 segments of 12 entries, signs of both kinds, neighbours apart."""
    compression = Compression(96, 8, shuffles=20, seed=1, where=CPU)
    images = np.stack([compression([row]) for row in torch.eye(96)])
    assert (np.abs(images).sum(axis=1) == 1).all()
    assert (np.abs(images).sum(axis=0) == 12).all()
    assert 30 < (images.sum(axis=1) > 0).sum() < 66
    segment = np.abs(images).argmax(axis=1)
    assert (segment[1:] == segment[:-1]).mean() < 0.3
    again = Compression(96, 8, shuffles=20, seed=1, where=CPU)
    other = Compression(96, 8, shuffles=20, seed=2, where=CPU)
    vector = torch.randn(96, generator=torch.Generator().manual_seed(0))
    parts = [vector[:10], vector[10:90].reshape(8, 10), vector[90:]]
    np.testing.assert_allclose(compression(parts), vector.numpy() @ images, atol=1e-6)
    np.testing.assert_array_equal(compression(parts), again(parts))
    assert not np.allclose(compression(parts), other(parts))


def test_compressed_products_are_unbiased_over_seeds() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, generator=generator)
    y = x + torch.randn(300, generator=generator)
    made = np.array([float(c([x]) @ c([y])) for seed in range(1500)
                     for c in [Compression(300, 16, shuffles=3, seed=seed, where=CPU)]])  # fmt: skip
    error = made.std() / np.sqrt(len(made))
    assert made.std() > 10  # at this K a single product is far off
    assert error < 0.02 * float(x @ y)
    assert abs(made.mean() - float(x @ y)) < 3.5 * error


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt_neox, tiny_olmo3])
@pytest.mark.parametrize("layer_normalize", [False, True])
def test_rapidin_at_full_k_is_the_exact_product(
    make: Callable[..., Path], layer_normalize: bool, tmp_path: Path
) -> None:
    model = make(tmp_path / "model", **SMALL, **({} if make is tiny_gpt_neox else {"num_key_value_heads": 1}))
    count = sum(p.numel() for p in load_causal_lm(locate(str(model)), dtype=torch.float32).parameters())
    config = RapidInConfig(k=count + 7, layer_normalize=layer_normalize)
    made = matrix(score_pool(config, ask(tmp_path / "full", model)))
    expected = products(exact(model), unit=layer_normalize)
    np.testing.assert_allclose(made, expected, atol=1e-5 * np.abs(expected).max())
    small = matrix(score_pool(config.model_copy(update={"k": 64}), ask(tmp_path / "small", model)))
    assert not np.allclose(small, expected, atol=0.01 * np.abs(expected).max())


def test_rapidin_adds_up_checkpoints_with_their_learning_rates(tmp_path: Path, model: Path) -> None:
    later = tiny_llama(tmp_path / "later", seed=1, **SMALL, num_key_value_heads=1)
    alone = [matrix(score_pool(RapidInConfig(k=64), ask(tmp_path / name, checkpoint)))
             for name, checkpoint in (("first", model), ("second", later))]  # fmt: skip
    both = {"k": 64, "checkpoints": (str(model), str(later))}
    rates = matrix(score_pool(RapidInConfig(**both, learning_rates=(0.5, 2.0)), ask(tmp_path / "rates", model)))
    np.testing.assert_allclose(rates, 0.5 * alone[0] + 2.0 * alone[1], rtol=1e-5, atol=1e-5)
    summed = matrix(score_pool(RapidInConfig(**both), ask(tmp_path / "sum", model)))
    np.testing.assert_allclose(summed, alone[0] + alone[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValidationError, match="2 checkpoints have 1 learning rates"):
        RapidInConfig(**both, learning_rates=(0.5,))
    with pytest.raises(InputError, match="other parameters than the scorer"):
        score_pool(RapidInConfig(k=64, checkpoints=(str(tiny_gpt_neox(tmp_path / "neox")),)),
                   ask(tmp_path / "refused", model))  # fmt: skip


def test_zo_inf_is_the_product_of_estimated_gradients(tmp_path: Path, model: Path) -> None:
    """At full K against d(x)ᵀ⟨z_j, z_k⟩d(q) with d_j = ⟨g, z_j⟩ from autograd: central differences come this close."""
    config = ZoInfConfig(k=20_000, normalize=False)
    made = matrix(score_pool(config, ask(tmp_path / "zo", model)))
    loaded = load_causal_lm(locate(str(model)), dtype=torch.float32)
    names = [name for name, _ in loaded.named_parameters()]
    z_jP = torch.stack([torch.cat([z.flatten() for z in direction(config, sample, loaded.parameters())])
                        for sample in range(config.samples)]).double()  # fmt: skip
    count = z_jP.shape[1]
    assert count <= config.k
    d = {side: torch.stack([torch.cat([g[name].flatten() for name in names]) for g in documents]) @ z_jP.T
         for side, documents in exact(model).items()}  # fmt: skip
    expected = (d["queries"] @ (z_jP @ z_jP.T) @ d["pool"].T / 16 * 4 / (count + 5)).numpy()
    np.testing.assert_allclose(made, expected, atol=0.01 * np.abs(expected).max())


def test_zo_inf_approaches_the_exact_products(tmp_path: Path, model: Path) -> None:
    """Var of the mean over n directions is (‖g‖²‖g'‖² + ⟨g, g'⟩²)/n: none is off by 4 deviations, all by about 1."""
    n = 128
    request = ask(tmp_path / "zo", model, batch_tokens=1000, shard_tokens=1000)
    made = matrix(score_pool(ZoInfConfig(k=20_000, samples=n, normalize=False), request))
    grads = exact(model)
    expected = products(grads)
    norms = {side: np.sqrt(np.diag(products({"queries": rows, "pool": rows}))) for side, rows in grads.items()}
    deviation = np.sqrt((np.outer(norms["queries"], norms["pool"]) ** 2 + expected**2) / n)
    off = (made - expected) / deviation
    assert np.abs(off).max() < 4
    assert 0.3 < (off**2).mean() < 2
    assert (made * expected).sum() / (expected**2).sum() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("modules", ["all", "mlp"])
def test_logra_at_full_rank_is_the_exact_product_of_its_modules(modules: Any, tmp_path: Path, model: Path) -> None:
    made = matrix(score_pool(LoGraConfig(rank=1000, modules=modules, hessian=False), ask(tmp_path / "logra", model)))
    loaded = load_causal_lm(locate(str(model)), dtype=torch.float32)
    found = {f"{name}.weight" for name in linear_modules(loaded, modules, "")}
    assert len(found) == {"all": 14, "mlp": 6}[modules]
    grads = exact(model)
    expected = products(grads, among=found)
    np.testing.assert_allclose(made, expected, atol=1e-5 * np.abs(expected).max())
    assert not np.allclose(expected, products(grads), rtol=0.05)


def test_logra_puts_the_inverse_hessian_of_each_module_between(tmp_path: Path, model: Path) -> None:
    """At full rank an orthogonal projection turns gradients and Hessian alike: the plain ones say what is due."""
    config = LoGraConfig(rank=1000, modules="mlp", damping=0.3)
    made = matrix(score_pool(config, ask(tmp_path / "logra", model)))
    grads = exact(model)
    loaded = load_causal_lm(locate(str(model)), dtype=torch.float32)
    expected = np.zeros_like(made)
    for name in linear_modules(loaded, "mlp", ""):
        g = {side: np.stack([d[f"{name}.weight"].flatten().numpy() for d in rows]) for side, rows in grads.items()}
        hessian = g["pool"].T @ g["pool"] / len(g["pool"])
        damped = hessian + 0.3 * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
        expected += g["queries"] @ np.linalg.solve(damped, g["pool"].T)
    np.testing.assert_allclose(made, expected, atol=1e-4 * np.abs(expected).max())


def test_logra_projections_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [logra._projection(12, 3, generator) for _ in range(4000)]
    for p_kd in drawn[:5]:
        torch.testing.assert_close(p_kd @ p_kd.T, 4 * torch.eye(3), atol=1e-5, rtol=0)
    mean = torch.stack([p_kd.T @ p_kd for p_kd in drawn]).mean(dim=0)
    torch.testing.assert_close(mean, torch.eye(12), atol=0.12, rtol=0)


METHODS = [RapidInConfig(k=256), ZoInfConfig(k=256, normalize=False), LoGraConfig(rank=4),
           LoGraConfig(rank=4, hessian=False, modules="mlp")]  # fmt: skip


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_scores_do_not_depend_on_batches_shards_or_order(config: MethodConfig, tmp_path: Path, model: Path) -> None:
    plans: list[dict[str, Any]] = [{}, {"batch_tokens": 1}, {"batch_tokens": 2000, "shard_tokens": 100_000},
                                   {"reverse": True, "shard_tokens": 10}]  # fmt: skip
    first, *others = [matrix(score_pool(config, ask(tmp_path / str(number), model, **plan)))
                      for number, plan in enumerate(plans)]  # fmt: skip
    # ZO-Inf divides the rounding of a loss by 2ε.
    tolerance = 2e-3 if config.method == "zo-inf" else 1e-5
    for other in others:
        np.testing.assert_allclose(other, first, atol=tolerance * np.abs(first).max())


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
@pytest.mark.parametrize("calibration", ["none", "center", "power:0.3", "median-bit"])
def test_a_document_of_one_token_has_score_zero(
    config: MethodConfig, calibration: str, tmp_path: Path, model: Path
) -> None:
    config = config.model_copy(update={"calibration": calibration})
    made = matrix(score_pool(config, ask(tmp_path / "one", model, pool=[*TEXTS["pool"], "x", "y"])))
    assert np.isfinite(made).all()
    assert (made[:, -2:] == 0).all()
    assert (made[:, :-2] != 0).any(axis=0).all()
    if calibration != "none":
        assert np.abs(made).max() < 1 + 1e-5


@pytest.mark.parametrize(("config", "module", "name"), [
    (RapidInConfig(k=64), rapidin, "document_gradient"), (ZoInfConfig(k=64), rapidin, "document_losses"),
    (LoGraConfig(rank=2), logra, "document_losses")], ids=["rapidin", "zo-inf", "logra"])  # fmt: skip
def test_a_killed_call_goes_on(
    config: MethodConfig, module: Any, name: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(module, name)
    calls = 0

    def counted(*given: Any, stop: int | None = None) -> Any:
        nonlocal calls
        if calls == stop:
            raise KeyboardInterrupt
        calls += 1
        return real(*given)

    monkeypatch.setattr(module, name, counted)
    plan = {"batch_tokens": 1, "shard_tokens": 20}
    whole = ask(tmp_path / "whole", model, **plan)
    expected = matrix(score_pool(config, whole))
    total, calls = calls, 0
    request = ask(tmp_path / "killed", model, **plan)
    stop = total // 2
    monkeypatch.setattr(module, name, lambda *given: counted(*given, stop=stop))
    with pytest.raises(KeyboardInterrupt):
        score_pool(config, request)
    done, calls = calls, 0
    monkeypatch.setattr(module, name, counted)
    np.testing.assert_array_equal(matrix(score_pool(config, request)), expected)
    assert done == stop > 3
    assert 0 < calls < total - done / 2
    assert digest_directory(request.work) == digest_directory(whole.work)


@pytest.mark.parametrize("config", METHODS[:3], ids=lambda config: config.method)
def test_what_cannot_fit_is_refused_before_anything_is_loaded(
    config: MethodConfig, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(gradients, "load_causal_lm", fail)
    request = ask(tmp_path / "request", model)
    with monkeypatch.context() as little:
        free = psutil.virtual_memory()._replace(available=1 << 16)
        little.setattr(psutil, "virtual_memory", lambda: free)
        with pytest.raises(InputError, match=rf"out of memory: {config.method} needs about .* GiB, this machine has"):
            score_pool(config, request)
    with monkeypatch.context() as little:
        usage = gradients.shutil.disk_usage(tmp_path)._replace(free=0)
        little.setattr(gradients.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match=rf"out of disk: {config.method} needs about .* GiB"):
            score_pool(config, request)
    with pytest.raises(AssertionError, match="was loaded"):
        score_pool(config, request)


def test_logra_refuses_a_model_without_linear_layers(tmp_path: Path) -> None:
    from transformers import GPT2Config

    from tests.tiny import VOCAB, tiny_model

    model = tiny_model(tmp_path / "gpt2", GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(InputError, match="no linear layers"):
        score_pool(LoGraConfig(), ask(tmp_path / "request", model))


@pytest.mark.parametrize(("method", "options"), [
    ("rapidin", ["--option", "k=64", "--calibration", "center"]), ("zo-inf", ["--option", "samples=2"]),
    ("logra", ["--option", "rank=2"])])  # fmt: skip
def test_rise_score_knows_the_method(method: str, options: list[str], tmp_path: Path, model: Path) -> None:
    files = {"--pool": tmp_path / "pool.jsonl", "--queries": tmp_path / "queries.jsonl", "--model": model,
             "--out": tmp_path / "out.parquet", "--per-query": tmp_path / "pairs.parquet"}  # fmt: skip
    for name, texts in TEXTS.items():
        files[f"--{name}"].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = CliRunner().invoke(rise, ["score", "--method", method, *options,
                                     *(str(part) for pair in files.items() for part in pair)])  # fmt: skip
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["rank"].to_pylist() == list(range(1, 7))
    assert len(set(table["score"].to_pylist())) == 6
    assert len(pq.read_table(tmp_path / "pairs.parquet")) == 12
