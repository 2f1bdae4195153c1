"""Configuration of a retrieval study: pools, paradigms, methods, and the rule that chooses the default."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from flows.config import read_pool
from tasks.common.config import Config, parse, read_with_settings
from tasks.pool.config import PoolConfig
from tasks.pretraining.config import PretrainingConfig
from tasks.scoring.config import MethodConfig, ScorerConfig
from tasks.selection.choice import RuleConfig
from tasks.selection.metrics import KS

STAGES = ("pool", "pretraining", "scoring", "selection")
"""The stages of a study, as ``--refresh`` names them."""
PREDICT, RECALL = "predict", "recall"
NAME = r"[a-z0-9][a-z0-9._-]{0,99}"


class StudyPool(Config):
    """A candidate pool that the methods are judged on."""

    task: str = Field(min_length=1)
    """Column of the unified table: Howdy!, Finance–Medical, Brain Rot, or a task of your own."""
    split: Literal["dev", "heldout"]
    """``dev``: the rule chooses on it; ``heldout``: the choice is reported on it."""
    pool: PoolConfig
    """The pool; in a file also the path of a YAML file with its fields, relative to the study's file, or that path as
    ``file`` beside the fields that differ."""
    ks: tuple[int, ...] = Field(KS, min_length=1)
    """The Ks that are averaged over; Table 34 has 5, 10, 50, 100 for Howdy! and Finance–Medical."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if list(self.ks) != sorted(set(self.ks)) or self.ks[0] < 1:
            raise ValueError(f"ks must rise from 1 on, got {list(self.ks)}")
        if 2 * self.ks[-1] > self.pool.size:
            raise ValueError(f"the metric at K = {self.ks[-1]} needs {2 * self.ks[-1]} documents, and the pool has "
                             f"{self.pool.size}")  # fmt: skip
        return self


class StudyConfig(Config):
    """A retrieval study: every method on every pool, under every paradigm (section 3.1, Tables 2, 3 and 20–35)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the study; it stands in ``runs/NAME`` unless ``--out`` says otherwise."""
    title: str = "Retrieval study"
    """Heading of the report."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the pools' draw and of the bootstrap."""
    scorer: ScorerConfig
    """The model that scores."""
    pools: dict[str, StudyPool] = Field(min_length=1)
    """Name → pool."""
    methods: dict[str, MethodConfig] = Field(min_length=1)
    """Arm → method."""
    seeds: tuple[int, ...] = Field((42,), min_length=1)
    """Seeds of the hashes: every arm with a sketch is made once a seed, in place of the sketch's own. The first also
    stands for the arms without one."""
    paradigms: tuple[Literal["predict", "recall"], ...] = Field(("predict",), min_length=1)
    """``predict`` (prospective): the scorer as it is. ``recall`` (retrospective): the scorer is fine-tuned on the whole
    pool first, once a pool."""
    finetuning: PretrainingConfig | None = None
    """How the scorer is fine-tuned for ``recall``; its model is the scorer's, and may be left out."""
    default: str | None = None
    """The arm that is the project's default: wins and losses are shown for it. None takes what the rule chooses."""
    rule: RuleConfig | None = None
    """The rule that chooses a default on the dev pools; None chooses none."""
    resamples: int = Field(1000, ge=1, le=100_000)
    """Bootstrap resamples behind every interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Mass of the intervals."""

    @model_validator(mode="before")
    @classmethod
    def _tune_the_scorer(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("finetuning"), dict):
            scorer = values.get("scorer")
            if isinstance(scorer, dict) and "model" not in values["finetuning"]:
                same = {name: scorer[name] for name in ("model", "revision") if name in scorer}
                return {**values, "finetuning": {**same, **values["finetuning"]}}
        return values

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        for kind, names in (("pool", self.pools), ("arm", self.methods)):
            for name in names:
                if not re.fullmatch(NAME, name) or name.endswith(".partial"):
                    raise ValueError(f"the {kind} {name!r} is not a plain lower-case name")
        folders = Counter(f"{pool}.{arm}" for pool in self.pools for arm in self.methods)
        if folders.most_common(1)[0][1] > 1:
            raise ValueError(f"two pairs of a pool and an arm make the name {folders.most_common(1)[0][0]!r}")
        for field in ("seeds", "paradigms"):
            if len(set(getattr(self, field))) < len(getattr(self, field)):
                raise ValueError(f"{field} names one twice")
        if RECALL in self.paradigms:
            if self.finetuning is None:
                raise ValueError("the paradigm recall needs finetuning: how the scorer is trained on a pool")
            if (self.finetuning.model, self.finetuning.revision) != (self.scorer.model, self.scorer.revision):
                raise ValueError("finetuning.model must be the scorer's: recall reads out what was fine-tuned")
        for arm in [*filter(None, [self.default]), *(self.rule.candidates if self.rule else ())]:
            if arm not in self.methods:
                raise ValueError(f"{arm!r} is named by default or rule and is no arm of methods")
        if self.rule and not (PREDICT in self.paradigms and any(pool.split == "dev" for pool in self.pools.values())):
            raise ValueError("the rule needs the paradigm predict and a pool with split dev")
        return self


def load(path: Path, settings: tuple[str, ...] = ()) -> StudyConfig:
    """Read a study and the pools it names by file, and apply ``a.b=value`` settings, which reach into those too.

    Raises:
        InputError: naming the file and the field.
    """
    return parse(StudyConfig, read_with_pools(path, settings), path)


def read_with_pools(path: Path, settings: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a study's file, with the contents of pool files in the place of their paths.

    Raises:
        InputError: naming the file and the field.
    """

    def fill(values: dict[str, Any]) -> None:
        pools = values.get("pools")
        if not isinstance(pools, dict):
            return  # parse says what is wrong with it
        for name, pool in pools.items():
            if isinstance(pool, dict) and "pool" in pool:
                pool["pool"] = read_pool(pool["pool"], path, f"pools.{name}.pool")

    return read_with_settings(path, settings, fill)
