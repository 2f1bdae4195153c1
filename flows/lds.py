"""The linear datamodeling score: pool → score by every method → train on random halves → what the scores foretold."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from prefect import flow, task

from flows.attribution import StudyRun
from flows.lds_config import LdsConfig
from flows.rundir import claimed, write_manifest
from flows.study_config import RECALL
from tasks.common.errors import InputError
from tasks.common.files import sha256_file, whole_file, write_text
from tasks.common.models import load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.common.progress import Progress
from tasks.common.stage import Ref, run_stage
from tasks.evaluation.perplexity import token_perplexity
from tasks.face import reporter, settle
from tasks.pool.task import pool
from tasks.pretraining.config import PretrainingConfig
from tasks.pretraining.train import VERSION as TRAINING_VERSION
from tasks.pretraining.train import train
from tasks.reporting.results import NOTHING
from tasks.reporting.table import clean_name, text_table
from tasks.scoring.config import ScorerConfig
from tasks.selection.datamodeling import Noise, datamodeling_score, half, noise, predictions, read_scores

VERSION = 1
"""Raise when the same inputs give other NLLs: part of every retraining's key."""
NLL, NLLS, SCORES, TABLE = "nll.parquet", "nlls.parquet", "lds.parquet", "lds.txt"
COLUMNS = pa.schema([
    ("pool", pa.string()), ("paradigm", pa.string()), ("method", pa.string()), ("lds", pa.float64()),
    ("low", pa.float64()), ("high", pa.float64()), ("queries", pa.int32()), ("subsets", pa.int32()),
    ("reason", pa.string()),
])  # fmt: skip
"""Of lds.parquet: a row a method on every pool under every paradigm; ``reason`` is why there is no figure."""


@flow(name="lds", flow_run_name="{config.name}", log_prints=False)
def lds(config: LdsConfig, out: str, refresh: tuple[str, ...] = ()) -> str:
    """Take the linear datamodeling score of every method in the directory ``out``, or go on with it.

    Args:
        config: everything it is made of.
        out: its directory; what is whole in it is not made again, a training of one seed on one half the least of it.
        refresh: stages to make again although they are whole.

    Returns:
        The digest of the run: equal for equal runs, interrupted or not.
    """
    directory = Path(out)
    with claimed(directory, config):
        return _Datamodeling(config, directory, frozenset(refresh)).run()


@task(name="retrain", task_run_name="retrain {arm}")
def retrain(
    recipe: PretrainingConfig, scorer: ScorerConfig, pool: Ref, directory: str, *, subset: int, seed: int, arm: str,
    refresh: bool = False,
) -> Any:  # fmt: skip
    """NLL of every query after training on half ``subset`` of the pool; the weights are not kept."""

    def work(out: Path) -> int:
        import torch

        training = out / "training"
        queries = pq.read_table(pool.dir / "queries.parquet").sort_by("doc_id")
        if not (out / NLL).exists():
            documents = pq.read_table(pool.dir / "pool.parquet").sort_by("doc_id")
            with whole_file(training / "subset.parquet") as part:
                pq.write_table(documents.take(half(len(documents), subset, seed)), part)
            train(recipe, training / "subset.parquet", training, report=reporter(f"retrain {arm}"))
            located = locate(str(training / "model"))
            # In float32, as trained: rounded weights would blur the small differences that this is about.
            measured = token_perplexity(
                load_causal_lm(located, dtype=torch.float32), load_tokenizer(located), queries,
                max_length=scorer.max_length, batch_tokens=scorer.batch_tokens,
            )  # fmt: skip
            with whole_file(out / NLL) as part:
                pq.write_table(measured.select(["doc_id", "n_tokens", "nll"]), part)
        shutil.rmtree(training, ignore_errors=True)
        return len(queries)

    return settle(run_stage(
        Path(directory), stage="pretraining", method=arm, version=VERSION, work=work, refresh=refresh,
        config={**recipe.model_dump(mode="json", exclude={"model", "revision", "checkpoint_every"}), "subset": subset,
                "subset_seed": seed, "query_length": scorer.max_length, "batch_tokens": scorer.batch_tokens},
        inputs={"pool": pool.digest, "trainee": locate(recipe.model, revision=recipe.revision).digest,
                "precision": str(torch_dtype(recipe.precision)), "training": f"version {TRAINING_VERSION}"},
    ))  # fmt: skip


class _Datamodeling(StudyRun):
    """A study whose scores are held against retraining."""

    config: LdsConfig

    def run(self) -> str:
        """Scores first, which find a user's errors soonest, then the trainings, then the table."""
        config, pools = self.config, {}
        for name, studied in config.pools.items():
            pools[name] = self.made(pool, studied.pool, stage="pool", directory=name, seed=config.seed)
            for paradigm in config.paradigms:
                scorer = self.fine_tuned(name, pools[name]) if paradigm == RECALL else config.scorer
                self.judge(name, paradigm, scorer, pools[name])
        nlls = {name: self.retrained(name, documents) for name, documents in pools.items()}
        _write(pa.concat_tables(_long(name, nll_SRQ, pools[name], config) for name, nll_SRQ in nlls.items()),
               self.out / NLLS)  # fmt: skip
        rows = [row for name, nll_SRQ in nlls.items() for row in self.rows(name, pools[name], nll_SRQ)]
        _write(pa.Table.from_pylist(rows, schema=COLUMNS), self.out / SCORES)
        write_text(self.out / TABLE, lds_table(config, rows, {name: noise(one) for name, one in nlls.items()}) + "\n")
        return write_manifest(self.out, config, self.stages, {SCORES: sha256_file(self.out / SCORES)})

    def retrained(self, name: str, documents: Ref) -> NDArray[np.float64]:
        """NLL per token (S, R, Q) of every query, in the order of their ids, after training on every half."""
        config = self.config
        assert config.finetuning is not None  # the configuration saw to it
        seeds, found = config.training_seeds, []
        with Progress("retraining", config.subsets * len(seeds), "trainings") as progress:
            for subset in range(config.subsets):
                for seed in seeds:
                    arm = f"{name}.half{subset:03d}@{seed}"
                    ref = self.made(retrain, config.finetuning.model_copy(update={"seed": seed}), config.scorer,
                                    documents, stage="pretraining", directory=arm, subset=subset, seed=config.seed,
                                    arm=arm)  # fmt: skip
                    table = pq.read_table(ref.dir / NLL)
                    if not all(table["n_tokens"].to_pylist()):
                        raise InputError("a query of one token has nothing to predict; ask for longer ones",
                                         file=documents.dir / "queries.parquet")  # fmt: skip
                    found.append(table["nll"].to_numpy() / table["n_tokens"].to_numpy())
                    progress.add(1)
        return np.stack(found).reshape(config.subsets, len(seeds), -1)

    def rows(self, name: str, documents: Ref, nll_SRQ: NDArray[np.float64]) -> list[dict[str, Any]]:
        """The rows of lds.parquet for one pool, in the order of the configuration."""
        config = self.config
        halves = [half(documents.rows, subset, config.seed) for subset in range(config.subsets)]
        rows: list[dict[str, Any]] = []
        for judged in (one for one in self.judged if one.pool == name):
            predicted_QS = predictions(read_scores(documents.dir, judged.scored), halves)
            found = datamodeling_score(predicted_QS, nll_SRQ, resamples=config.resamples,
                                       confidence=config.confidence, seed=config.seed)  # fmt: skip
            rows.append({"paradigm": judged.paradigm, "method": _arm(judged.method, judged.seed, config),
                         **vars(found), "reason": None})  # fmt: skip
        rows += [{"paradigm": one.paradigm, "method": _arm(one.method, one.seed, config), "reason": one.reason}
                 for one in self.absent if one.pool == name]  # fmt: skip
        return [{"pool": name, "queries": nll_SRQ.shape[2], "subsets": config.subsets, **row} for row in rows]


def _arm(method: str, seed: int | None, config: LdsConfig) -> str:
    """A method's name, with the seed of its hashes where there are several."""
    return method if seed is None or len(config.seeds) == 1 else f"{method}@{seed}"


def _long(name: str, nll_SRQ: NDArray[np.float64], documents: Ref, config: LdsConfig) -> pa.Table:
    """A row a pool, half, seed and query, with the query's NLL in nats a token."""
    query_ids = sorted(pq.read_table(documents.dir / "queries.parquet", columns=["doc_id"])["doc_id"].to_pylist())
    subset_SRQ, seed_SRQ, query_SRQ = np.indices(nll_SRQ.shape)
    return pa.table({
        "pool": [name] * nll_SRQ.size, "subset": pa.array(subset_SRQ.ravel(), pa.int32()),
        "seed": pa.array(np.array(config.training_seeds)[seed_SRQ.ravel()], pa.int64()),
        "query_id": [query_ids[place] for place in query_SRQ.ravel()], "nll": nll_SRQ.ravel(),
    })  # fmt: skip


def _write(table: pa.Table, file: Path) -> None:
    with whole_file(file) as part:
        pq.write_table(table, part)


def lds_table(config: LdsConfig, rows: list[dict[str, Any]], noises: dict[str, Noise]) -> str:
    """The rows of lds.parquet as plain text, with what the seeds' noise leaves to be reached."""
    lines = [config.title, ""]
    for name, blur in noises.items():
        queries = next(row["queries"] for row in rows if row["pool"] == name)
        for paradigm in config.paradigms:
            body = [[clean_name(row["method"], 24), *_figures(row)] for row in rows
                    if (row["pool"], row["paradigm"]) == (name, paradigm)]  # fmt: skip
            body.append(["ceiling", NOTHING if blur.ceiling is None else f"{blur.ceiling:.3f}", ""])
            head = ["method", "LDS", f"{config.confidence:.0%} interval"]
            lines += [f"{name}, {paradigm}: {config.subsets} random halves, {len(config.training_seeds)} seeds each, "
                      f"{queries} queries", *text_table(head, body), ""]  # fmt: skip
        lines.append(f"{name}: {blur.nll:.4f} nats a token after training, ±{blur.between:.4f} over the halves")
        if blur.within is not None and blur.reliability is not None:
            lines.append(f"±{blur.within:.4f} over the seeds of a half; reliability of the halves' order "
                         f"{blur.reliability:.3f}")  # fmt: skip
        lines.append("")
    lines += ["±: standard deviation; intervals: bootstrap over halves and queries together",
              "ceiling: about what exact foresight would reach, the root of the reliability"]  # fmt: skip
    return "\n".join(lines)


def _figures(row: dict[str, Any]) -> list[str]:
    if row["reason"] is not None:
        return [row["reason"], ""]
    return [f"{row['lds']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
