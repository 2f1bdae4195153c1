"""EK-FAC against kronfluence called directly, and against plain gradients under a very large damping."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.models import load_causal_lm, load_tokenizer, locate
from tasks.common.stage import digest_directory
from tasks.scoring.batching import Tokenized, tokenize
from tasks.scoring.config import EkfacConfig
from tasks.scoring.methods import Request
from tasks.scoring.rivals import ekfac
from tasks.scoring.rivals.ekfac import ekfac_scores
from tasks.scoring.rivals.gradients import document_gradient
from tests.rivals.conftest import turned

pytestmark = pytest.mark.rivals
pytest.importorskip("kronfluence", reason="the extra rivals and kronfluence are not installed")

DIRECT = '''
import json, sys
import numpy as np
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from transformers import AutoModelForCausalLM, default_data_collator

model, tokens, layers, out = json.loads(sys.argv[1])
longest = max(len(ids) for side in tokens.values() for ids in side)


class LanguageModelingTask(Task):
    """The library's own example."""

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        logits = logits[..., :-1, :].contiguous()
        logits = logits.view(-1, logits.size(-1))
        labels = batch["labels"][..., 1:].contiguous()
        if not sample:
            return F.cross_entropy(logits, labels.view(-1), reduction="sum", ignore_index=-100)
        with torch.no_grad():
            sampled_labels = torch.multinomial(F.softmax(logits.detach(), dim=-1), num_samples=1).flatten()
            sampled_labels[labels.view(-1) == -100] = -100
        return F.cross_entropy(logits, sampled_labels, ignore_index=-100, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return layers

    def get_attention_mask(self, batch):
        return batch["attention_mask"]


def padded(side, to):
    return [{"input_ids": ids + [0] * (to - len(ids)), "attention_mask": [1] * len(ids) + [0] * (to - len(ids)),
             "labels": ids + [-100] * (to - len(ids))} for ids in side]


task = LanguageModelingTask()
model = prepare_model(AutoModelForCausalLM.from_pretrained(model), task)
analyzer = Analyzer("direct", model, task, cpu=True, output_dir=out)
analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=default_data_collator))
torch.manual_seed(42)
pool = padded(tokens["pool"], max(map(len, tokens["pool"])))
analyzer.fit_all_factors("f", pool, per_device_batch_size=64)
analyzer.compute_pairwise_scores("s", "f", query_dataset=padded(tokens["queries"], longest), train_dataset=pool,
                                 per_device_query_batch_size=2, per_device_train_batch_size=8,
                                 score_args=ScoreArguments(damping_factor=None))
np.save(out + "/scores.npy", analyzer.load_pairwise_scores("s")["all_modules"].numpy())
'''


def tokens_of(request: Request, file: Path) -> tuple[Tokenized, list[int]]:
    """Tokens of a file, and the places of the documents with two."""
    rows = pq.read_table(file).to_pylist()
    tokens = tokenize(load_tokenizer(locate(request.scorer.model)), [row["doc_id"] for row in rows],
                      [row["text"] for row in rows], 200)  # fmt: skip
    return tokens, [place for place in range(len(tokens)) if tokens.length(place) > 1]


def test_the_pairs_are_those_of_the_librarys_own_example(asked: Request, tmp_path: Path, model: Path) -> None:
    """All documents in one batch, padded alike, so that both draw the same labels."""
    sides = {name: tokens_of(asked, file) for name, file in (("pool", asked.pool), ("queries", asked.queries))}
    layers = [name for name, module in load_causal_lm(locate(str(model)), dtype=torch.float32).named_modules()
              if isinstance(module, torch.nn.Linear) and "mlp" in name]  # fmt: skip
    assert len(layers) == 4
    given = [str(model), {name: [tokens.ids(place).tolist() for place in places]
                          for name, (tokens, places) in sides.items()}, layers, str(tmp_path / "direct")]  # fmt: skip
    (tmp_path / "direct.py").write_text(DIRECT)
    subprocess.run([sys.executable, str(tmp_path / "direct.py"), json.dumps(given)], check=True, timeout=300,
                   capture_output=True)  # fmt: skip
    theirs = np.load(tmp_path / "direct" / "scores.npy")
    config = EkfacConfig(loss_reduction="sum", batch_size=64, query_batch_size=4)
    _, _, scores = ekfac_scores(config, asked)
    assert np.abs(theirs).max() > 0
    ours = scores[np.ix_(sides["queries"][1], sides["pool"][1])]
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())


def gradients(request: Request, file: Path) -> NDArray[np.float32]:
    """Gradient of every document's mean loss with regard to the weights and biases of the MLPs, (N, F)."""
    model = load_causal_lm(locate(request.scorer.model), dtype=torch.float32).requires_grad_(True)
    weights = [parameter for name, parameter in model.named_parameters() if "mlp" in name]
    tokens, _ = tokens_of(request, file)
    made = [document_gradient(model, weights, tokens.ids(place)) for place in range(len(tokens))]
    return np.stack([torch.cat([part.flatten() for part in parts]).numpy() for parts in made])


def test_a_large_damping_leaves_the_product_of_gradients(asked: Request, tmp_path: Path) -> None:
    config = EkfacConfig(damping=1e8, query_batch_size=3)
    forth, back = ekfac_scores(config, asked), ekfac_scores(config, turned(asked, tmp_path / "turned"))
    expected = gradients(asked, asked.queries) @ gradients(asked, asked.pool).T
    np.testing.assert_allclose(forth[2] * 1e8, expected, atol=1e-3 * np.abs(expected).max())
    assert forth[:2] == back[:2]
    assert (forth[2] == back[2]).all()
    assert np.count_nonzero(forth[2]) == 4 * 23  # a document and a query of one token have no gradient
    assert digest_directory(asked.work) == digest_directory(tmp_path / "turned" / "work")
    assert sorted(file.name for file in asked.work.rglob("*") if file.is_file()) == sorted(
        f"{name}.safetensors" for name in ekfac.FACTORS)  # fmt: skip


def test_factors_that_were_fitted_are_used_again(asked: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EkfacConfig()
    first = ekfac_scores(config, asked)[2]
    keep = ekfac.shutil.rmtree
    monkeypatch.setattr(ekfac.shutil, "rmtree", lambda path, **options: None)
    assert (ekfac_scores(config, asked)[2] == first).all()
    fitted = asked.work / "kronfluence" / ekfac.NAME / f"factors_{ekfac.NAME}"
    before = {file: file.stat().st_mtime_ns for file in fitted.glob("*.safetensors")}
    assert before
    (asked.work / "kronfluence" / ekfac.SCORES).unlink()
    assert (ekfac_scores(config, asked)[2] == first).all()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    keep(asked.work)


def test_layers_are_named_by_their_parts(asked: Request) -> None:
    model = load_causal_lm(locate(asked.scorer.model), dtype=torch.float32)
    assert [name.split(".", 2)[2] for name in ekfac.named_layers(model, ["dense_h_to_4h", "query"], "m")] == [
        "0.attention.query_key_value", "0.mlp.dense_h_to_4h", "1.attention.query_key_value", "1.mlp.dense_h_to_4h"]
    with pytest.raises(InputError, match=r"no linear layer has 'conv' in its name; there are .*lm_head"):
        ekfac_scores(EkfacConfig(modules=["conv"]), asked)
