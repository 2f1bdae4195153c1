"""``rise plan``: shapes without weights, what is counted, and the table of docs/scale.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from flows import plan as planning
from flows.cli import rise
from flows.config import load
from flows.lds_config import load as load_lds
from flows.study_config import load as load_study
from tasks.common import hardware
from tasks.common.errors import InputError
from tasks.common.hardware import SKETCHING, Machine, Shape, named, shape_of
from tasks.scoring.config import PerplexityConfig, RiseConfig, ScorerConfig, SketchConfig
from tasks.scoring.store import bytes_a_document

ROOT = Path(__file__).parents[2]
CPU = Machine("a test's machine, 1 core", 0, None, 1e9, 8e9, 50e9)
SMALL = Shape(1000.0, 900.0, layers=2, width=10, vocabulary=50)


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 1 GFLOP/s, whatever runs beside."""
    monkeypatch.setattr(hardware, "timed_product", lambda precision: 1e9)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations without weights: a causal model (tied and not) and an encoder."""
    from transformers import BertConfig, LlamaConfig

    folder = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, tie_word_embeddings=tied).save_pretrained(folder / str(tied))
    BertConfig(vocab_size=70, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
               intermediate_size=8).save_pretrained(folder / "encoder")  # fmt: skip
    return folder


def test_a_shape_is_counted_without_weights(models: Path) -> None:
    # q and o d², k and v half of it (4 heads, 2 of them keys), three d × 64 and two norms; the last norm.
    body = 2 * (32 * 32 * 3 + 3 * 32 * 64 + 2 * 32) + 32
    assert shape_of(str(models / "True")) == Shape(body + 3200, body + 3200, 2, 32, 100)
    assert shape_of(str(models / "False" / "config.json")) == Shape(body + 6400, body + 3200, 2, 32, 100)
    encoder = shape_of(str(models / "encoder"), encoder=True)
    assert (encoder.layers, encoder.width, encoder.parameters - encoder.multiplied) == (1, 16, 70 * 16)


@pytest.mark.parametrize("spec", ["./none", "{folder}", "{folder}/odd.json"])
def test_a_model_without_a_configuration_is_named(tmp_path: Path, spec: str) -> None:
    (tmp_path / "odd.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(InputError, match=r"config\.json"):
        shape_of(spec.format(folder=tmp_path))


def test_flops_are_two_a_parameter_and_attention() -> None:
    assert SMALL.forward_flops(10, 7) == 10 * (2 * 900 + 2 * 2 * 10 * 7)
    assert SMALL.training_flops(10, 7) == 3 * SMALL.forward_flops(10, 7)
    assert SMALL.training_flops(10, 7, recompute=True) == 4 * SMALL.forward_flops(10, 7)


def test_a_forward_pass_takes_its_flops_over_what_the_devices_reach() -> None:
    sketch = SketchConfig()
    scorer = ScorerConfig(model="m", precision="bfloat16", processes=8, device_map="auto")
    big = Shape(32e9, 32e9, 64, 5120, 100_278)
    one = planning._forward(scorer.model_copy(update={"processes": 1}), big, 1e6, 500, [sketch], named("H100", 1))
    assert one.seconds == pytest.approx(SKETCHING * 1e6 * (64e9 + 2 * 64 * 5120 * 500) / (0.4 * 989e12))
    eight = planning._forward(scorer, big, 1e6, 500, [sketch], named("H100", 8))
    assert eight.seconds == pytest.approx(one.seconds / 8)
    assert 64e9 < one.device < 68e9
    # 150 GB of weights on GPUs of 80 GB: two a copy, which work one after the other, so four of eight work.
    huge = Shape(75e9, 75e9, 80, 8192, 100_278)
    spread = planning._forward(scorer, huge, 1e6, 500, [sketch], named("A100", 8))
    alone = huge.forward_flops(1e6, 500) * SKETCHING / (0.4 * 312e12)
    assert spread.seconds == pytest.approx(alone / (8 // 2))
    assert spread.device < 80e9


def test_an_index_keeps_its_bytes_a_document() -> None:
    given: dict[str, Any] = {"conf": None, "settings": (), "gpu": "H100", "gpus": 8, "model": None, "batch": 10**6,
                             "precision": "auto", "kr": 128, "kh": 24, "kg": 128, "km": 0,
                             "documents": 10**8, "tokens": 500}
    wide = planning.plan(**given, parameters=32e9, dtype="fp16")
    assert "fp16: 12,288 bytes a document" in wide
    assert "1.2 TB" in wide.splitlines()[-1]
    bits = planning.plan(**given, parameters=32e9, dtype="bit")
    assert "76.8 GB" in bits.splitlines()[-1]
    assert "search, a query" in bits
    assert bits.splitlines()[-1].startswith("fits: memory")
    assert planning.plan(**given, parameters=32e12, dtype="bit").splitlines()[-1].startswith("does not fit: memory")


@pytest.fixture
def demo(models: Path, tmp_path: Path) -> Path:
    """The demo's configuration with models that have no weights."""
    values = yaml.safe_load((ROOT / "conf" / "closed_loop" / "demo.yaml").read_text())
    values["scorer"]["model"] = values["pretraining"]["model"] = str(models / "True")
    values["pool"] = yaml.safe_load((ROOT / "conf" / "pools" / "demo.yaml").read_text())
    values["arms"]["embedding"] = {"method": "embedding", "model": str(models / "encoder")}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "demo.yaml"


def test_a_closed_loop_is_counted_stage_by_stage(demo: Path, models: Path) -> None:
    config, shape = load(demo), shape_of(str(models / "True"))
    rows = {row.stage: row for row in planning.closed_loop_rows(config, CPU)}
    assert list(rows) == ["pool", "scoring: RISE, perplexity", "scoring: embedding", "pretraining: 8 arms",
                          "evaluation: 9 models"]  # fmt: skip
    length = planning.document_tokens(config.pool, 96)
    assert 25 < length < 35  # 30.6 measured
    readout = rows["scoring: RISE, perplexity"]
    assert readout.tokens == pytest.approx(1040 * length)
    speed = CPU.flops("float32")
    # The two arms of RISE are of two sketches: the paper's in fp16, and the compact one, whose bits are made from fp16.
    sketching = 1 + 2 * (SKETCHING - 1)
    assert readout.seconds == pytest.approx(shape.forward_flops(1040 * length, length) * sketching / speed)
    assert isinstance(config.arms["rise"], RiseConfig)
    assert isinstance(config.arms["perplexity"], PerplexityConfig)
    assert readout.disk == 1040 * (bytes_a_document("fp16", 24 * 256) + bytes_a_document("fp16", 8064)
                                   + bytes_a_document("bit", 8064))  # fmt: skip
    trained = rows["pretraining: 8 arms"]
    assert trained.tokens == pytest.approx(8 * 100 * length)
    assert trained.disk == 8 * 4 * shape.parameters
    assert trained.device > 16 * shape.parameters
    assert trained.passing == 0  # 13 steps, a checkpoint every 100
    longer = planning.closed_loop_rows(load(demo, ("pretraining.epochs=20",)), CPU)[3]
    assert longer.tokens == pytest.approx(20 * trained.tokens)
    assert longer.passing == 24 * shape.parameters


def test_a_study_counts_its_pools_seeds_and_paradigms(demo: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(demo.read_text())
    study = {"name": "s", "scorer": values["scorer"], "seeds": [1, 2], "paradigms": ["predict", "recall"],
             "pools": {name: {"task": "t", "split": "dev", "pool": values["pool"]} for name in ("a", "b")},
             "finetuning": {"epochs": 3},
             "methods": {"rise": {"method": "rise"}, "bm25": {"method": "bm25"}}}  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    config = load_study(tmp_path / "study.yaml")
    rows = {row.stage: row for row in planning.study_rows(config, CPU)}
    assert list(rows) == ["pool", "finetuning", "predict: RISE, perplexity", "recall: RISE, perplexity"]
    length = planning.document_tokens(config.pools["a"].pool, 96)
    assert rows["predict: RISE, perplexity"].tokens == pytest.approx(2 * 1040 * length)
    assert rows["predict: RISE, perplexity"].disk == 2 * 1040 * 2 * bytes_a_document("fp16", 24 * 256)
    assert rows["finetuning"].tokens == pytest.approx(2 * 3 * 1000 * length)


def test_retraining_is_counted_for_every_half_and_seed(demo: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(demo.read_text())
    lds = {"name": "s", "scorer": values["scorer"], "subsets": 6, "training_seeds": [1, 2],
           "pools": {"a": {"task": "t", "split": "dev", "pool": values["pool"]}}, "finetuning": {"epochs": 3},
           "methods": {"rise": {"method": "rise"}}}  # fmt: skip
    (tmp_path / "lds.yaml").write_text(yaml.safe_dump(lds))
    config = load_lds(tmp_path / "lds.yaml")
    rows = {row.stage: row for row in planning.study_rows(config, CPU)}
    assert list(rows) == ["pool", "predict: RISE, perplexity", "retraining"]
    length = planning.document_tokens(config.pools["a"].pool, 96)
    assert rows["retraining"].tokens == pytest.approx(6 * 2 * (3 * 500 + 40) * length)
    assert rows["retraining"].disk == 0
    shown = CliRunner().invoke(rise, ["plan", str(tmp_path / "lds.yaml")])
    assert shown.exit_code == 0, shown.exception
    assert "retraining" in shown.output


def test_the_command_says_whether_it_fits_here_and_names_bad_input(demo: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(rise, ["plan", str(demo)])
    assert done.exit_code == 0, done.exception
    assert "GFLOP/s just now" in done.output
    assert re.search(r"^(fits|does not fit): memory .* of .*, disk .* of .* free$", done.output.splitlines()[-1])
    (tmp_path / "odd.yaml").write_text("name: odd\n")
    for arguments, expected in {
        (): "either a configuration or --documents",
        (str(demo), "--documents", "5"): "either a configuration or --documents",
        (str(demo), "--gpus", "5"): "--gpus needs --gpu",
        ("--documents", "5"): "needs --tokens",
        ("--documents", "5", "--tokens", "5", "--model", "m", "--parameters", "5"): "either --model or --parameters",
        (str(tmp_path / "odd.yaml"),): "no closed loop",
        (str(ROOT / "conf" / "studies" / "facts.yaml"),): "is fact tracing",
        (str(tmp_path / "none.yaml"),): "no such configuration file",
    }.items():
        failed = CliRunner().invoke(rise, ["plan", *arguments])
        assert isinstance(failed.exception, InputError), arguments
        assert expected in str(failed.exception)


def test_the_tables_of_the_documentation_are_what_the_commands_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```\n\$ rise (plan [^`]*?[^\\])\n\n([^`]*?)\n```", (ROOT / "docs" / "scale.md").read_text())
    assert len(blocks) == 2
    for command, table in blocks:
        assert "olmo3-32b.json" in command
        done = CliRunner().invoke(rise, shlex.split(command.replace("\\\n", " ")))
        assert done.output.rstrip("\n") == table
