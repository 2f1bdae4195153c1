"""Configuration of the closed loop: every stage's own configuration, put together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from tasks.common.config import Config, parse, read_with_settings, read_yaml
from tasks.common.errors import InputError
from tasks.evaluation.config import EvaluationConfig
from tasks.pool.config import PoolConfig
from tasks.pretraining.config import PretrainingConfig
from tasks.scoring.config import MethodConfig, ScorerConfig
from tasks.selection.config import SelectionConfig

STAGES = ("pool", "scoring", "selection", "pretraining", "evaluation", "reporting")
"""The stages in pipeline order, as ``--refresh`` names them."""
BASE, ORACLE = "base", "oracle"
"""Arms every run may have beside its methods: the untrained trainee, and training on labels known."""
TAKEN = (BASE, ORACLE, "readout", "tokens", "prompts")
"""Names that no arm of a configuration may have: the stages' folders go by them."""


class ClosedLoopConfig(Config):
    """The closed loop: pool → score → select → pretrain → evaluate → report, one arm a method."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the run; it stands in ``runs/NAME`` unless ``--out`` says otherwise."""
    title: str = "Closed loop"
    """Heading of the report."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the pool's draw."""
    pool: PoolConfig
    """Stage 1; in a file also the path of a YAML file with its fields, relative to the configuration's, or that path as
    ``file`` beside the fields that differ."""
    scorer: ScorerConfig
    """Stage 2: the model that scores."""
    arms: dict[str, MethodConfig] = Field(min_length=1)
    """Stage 2: arm → method; every arm is scored, selected, trained and evaluated."""
    oracle: bool = True
    """Also train on documents of the wanted label alone: the upper bound."""
    base: bool = True
    """Also evaluate the trainee untrained."""
    selection: SelectionConfig = SelectionConfig()
    """Stage 3."""
    pretraining: PretrainingConfig
    """Stage 4a."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Stage 4b."""

    @model_validator(mode="after")
    def _arms_fit(self) -> Self:
        for arm in self.arms:
            if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", arm) or arm.endswith(".partial"):
                raise ValueError(f"the arm {arm!r} is not a plain lower-case name")
            if arm in TAKEN:
                raise ValueError(f"the name {arm!r} is taken by an arm or a folder of its own; call it otherwise")
        if self.selection.k is not None and self.selection.k > self.pool.size:
            raise ValueError(f"selection.k {self.selection.k} is larger than the pool of {self.pool.size} documents")
        if self.selection.positive not in self.pool.labels:
            raise ValueError(f"selection.positive {self.selection.positive!r} is no label of the pool's sources")
        return self


def load(path: Path, settings: tuple[str, ...] = ()) -> ClosedLoopConfig:
    """Read a configuration and the pool it may name by file, and apply ``a.b=value`` settings, which reach into both.

    Raises:
        InputError: naming the file and the field.
    """

    def fill(values: dict[str, Any]) -> None:
        if "pool" in values:
            values["pool"] = read_pool(values["pool"], path, "pool")

    return parse(ClosedLoopConfig, read_with_settings(path, settings, fill), path)


def read_pool(given: Any, path: Path, field: str) -> Any:
    """The fields of a pool that is given by them, by the path of a file, or by ``file`` beside the fields that differ.

    Args:
        given: what stands in the configuration.
        path: the configuration's file; the pool's is relative to it.
        field: name of the pool's field there.

    Raises:
        InputError: naming the file and the field.
    """
    changed = dict(given) if isinstance(given, dict) else {}
    source = changed.pop("file", None) if changed else given
    if not isinstance(source, str):
        return given  # parse says what is wrong with it
    file = path.parent / source
    if not file.is_file():
        raise InputError(f"no such pool file: {file}", file=path, field=field)
    fields = read_yaml(file)
    parse(PoolConfig, fields, file)  # an error in it names its own file
    return {**fields, **changed}
