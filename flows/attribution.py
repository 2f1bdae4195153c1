"""Retrieval studies: pool → (fine-tune) → score → judge → ledger → report, every method on every pool (section 3.1)."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.rundir import claimed, write_manifest
from flows.study_config import RECALL, StudyConfig
from tasks.common.errors import InputError
from tasks.common.stage import Ref
from tasks.pool.task import pool
from tasks.pretraining.config import PretrainingConfig
from tasks.pretraining.task import pretrain
from tasks.reporting.study import report_study, study_table
from tasks.scoring.config import MethodConfig, PerplexityConfig, RandomConfig, RiseConfig, ScorerConfig
from tasks.scoring.methods import shared_type, sketch_name
from tasks.scoring.task import needs_readout, readout, score, tokens
from tasks.selection.config import SelectionConfig
from tasks.selection.retrieval import RetrievalConfig
from tasks.selection.study_ledger import Absent, Judged, PoolFiles, study_digest, write_study
from tasks.selection.task import retrieve, select

OUT_OF = "out of "
"""How the line begins with which a method says before it starts that this machine cannot run it: out of memory …"""


@flow(name="attribution", flow_run_name="{config.name}", log_prints=False)
def attribution(config: StudyConfig, out: str, refresh: tuple[str, ...] = ()) -> str:
    """Run a retrieval study in the directory ``out``, or go on with it.

    Args:
        config: everything the study is made of.
        out: the study's directory; what is whole in it is not made again.
        refresh: stages to make again although they are whole.

    Returns:
        The digest of the study: equal for equal studies, interrupted or not.
    """
    directory = Path(out)
    with claimed(directory, config):
        return StudyRun(config, directory, frozenset(refresh)).run()


@dataclass(frozen=True)
class Scored:
    """A pool as one arm scored it."""

    arm: str
    seed: int | None
    """Of the hashes; None where the arm has none."""
    directory: str
    """Name of its stages' directories."""
    read: Ref | None
    """The forward pass it was scored from."""
    scores: Ref | str
    """The scores, or what this machine had too little of: out of memory."""


class Scoring:
    """The stages of one run so far, and a pool's scores by every arm."""

    def __init__(
        self, methods: Mapping[str, MethodConfig], seeds: tuple[int, ...], out: Path, refresh: frozenset[str]
    ) -> None:
        self.methods, self.seeds, self.out, self.refresh = methods, seeds, out, refresh
        self.stages: list[Ref] = []

    def made(self, task: Any, *inputs: Any, stage: str, directory: str, **options: Any) -> Ref:
        """The result of one stage; in the study it goes by its directory's name."""
        state = task(*inputs, str(self.out / stage / directory), refresh=stage in self.refresh, return_state=True,
                     **options)  # fmt: skip
        ref: Ref = state.result()
        self.stages.append(replace(ref, method=directory))
        return ref

    def scored(self, where: str, scorer: ScorerConfig, documents: Ref) -> Iterator[Scored]:
        """Score a pool by every arm, with every seed where it has hashes."""
        arms = [(arm, seed, method) for arm, configured in self.methods.items()
                for seed, method in _seeded(configured, self.seeds).items()]  # fmt: skip
        shared = self.read_out(where, scorer, documents, [method for _, _, method in arms])
        for arm, seed, method in arms:
            directory = f"{where}.{arm}" + ("" if seed is None else f"@{seed}")
            read = shared if needs_readout(method) else None
            try:
                scores: Ref | str = self.made(score, method, scorer, documents, read, stage="scoring",
                                              directory=directory, arm=directory)  # fmt: skip
            except InputError as error:
                if not error.problem.startswith(OUT_OF):
                    raise
                print(f"{directory}: {error}", file=sys.stderr)
                scores = error.problem.partition(":")[0]
            yield Scored(arm, seed, directory, read, scores)

    def read_out(
        self, where: str, scorer: ScorerConfig, documents: Ref, methods: list[MethodConfig]
    ) -> Ref | None:
        """One forward pass for all sketches and for perplexity; arms make their own type of index from its floats."""
        if not any(needs_readout(method) for method in methods):
            return None
        rises = [method for method in methods if isinstance(method, RiseConfig)]
        stored = shared_type(rises)
        return self.made(
            readout, scorer, {sketch_name(rise.sketch): rise.sketch for rise in rises}, documents, stage="scoring",
            directory=f"{where}.readout@{stored}", name=f"{where}.readout@{stored}", stored=stored,
            losses=any(isinstance(method, PerplexityConfig) for method in methods),
        )  # fmt: skip


class StudyRun(Scoring):
    """One run of the flow: its stages so far."""

    def __init__(self, config: StudyConfig, out: Path, refresh: frozenset[str]) -> None:
        super().__init__(config.methods, config.seeds, out, refresh)
        self.config = config
        self.judged: list[Judged] = []
        self.absent: list[Absent] = []

    def run(self) -> str:
        """Every pool under every paradigm, then the ledger and the report."""
        config, pools = self.config, {}
        for name, studied in config.pools.items():
            documents = self.made(pool, studied.pool, stage="pool", directory=name, seed=config.seed)
            counted = self.made(tokens, config.scorer, documents, stage="scoring", directory=f"tokens.{name}")
            pools[name] = PoolFiles(studied.task, studied.split, studied.pool.control_label, documents.dir,
                                    counted.dir / "tokens.parquet")  # fmt: skip
            for paradigm in config.paradigms:
                scorer = self.fine_tuned(name, documents) if paradigm == RECALL else config.scorer
                self.judge(name, paradigm, scorer, documents)
        book = self.out / "study.duckdb"
        write_study(book, pools=pools, methods={arm: method.plain() for arm, method in config.methods.items()},
                    judged=self.judged, absent=self.absent, rule=config.rule, confidence=config.confidence,
                    stages=self.stages)  # fmt: skip
        digest = write_manifest(self.out, config, self.stages, {"ledger": study_digest(book)})
        page = report_study(self.out)
        create_markdown_artifact(f"```\n{study_table(book)}\n```\n\nReport: `{page.resolve()}`",
                                 key=f"{config.name.replace('_', '-')}-unified", description="Table 3 of this study")
        return digest

    def fine_tuned(self, name: str, documents: Ref) -> ScorerConfig:
        """The scorer after training on the whole pool (retrospective attribution)."""
        recipe = self.config.finetuning
        assert isinstance(recipe, PretrainingConfig)  # the configuration saw to it
        # Any ranking of all documents is the whole pool; training sorts them by id.
        ranking = self.made(score, RandomConfig(), self.config.scorer, documents, None, stage="scoring",
                            directory=f"all.{name}", arm=f"all.{name}")  # fmt: skip
        everything = self.made(select, SelectionConfig(k=documents.rows), documents, ranking, stage="selection",
                               directory=f"all.{name}", arm=f"all.{name}")  # fmt: skip
        trained = self.made(pretrain, recipe, everything, stage="pretraining", directory=name, arm=name)
        return self.config.scorer.model_copy(update={"model": str(trained.dir / "model"), "revision": None})

    def judge(self, name: str, paradigm: str, scorer: ScorerConfig, documents: Ref) -> None:
        """Score the pool by every arm, with every seed where it has hashes, and take the metrics."""
        config = self.config
        judging = RetrievalConfig(positive=config.pools[name].pool.control_label, ks=config.pools[name].ks,
                                  resamples=config.resamples, confidence=config.confidence, seed=config.seed)
        for one in self.scored(f"{paradigm}.{name}", scorer, documents):
            if isinstance(one.scores, str):
                self.absent.append(Absent(name, paradigm, one.arm, one.seed, one.scores))
                continue
            found = self.made(retrieve, judging, documents, one.scores, stage="selection", directory=one.directory,
                              arm=one.directory)  # fmt: skip
            self.judged.append(Judged(name, paradigm, one.arm, one.seed, found.dir, one.scores.dir,
                                      one.read.dir if one.read else None))  # fmt: skip


def _seeded(method: MethodConfig, seeds: tuple[int, ...]) -> Mapping[int | None, MethodConfig]:
    """Seed → the method with these hashes; None → the method as it is, where it is not RISE."""
    if not isinstance(method, RiseConfig):
        return {None: method}
    return {seed: method.model_copy(update={"sketch": method.sketch.model_copy(update={"seed": seed})})
            for seed in seeds}  # fmt: skip
