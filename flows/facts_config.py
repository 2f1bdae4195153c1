"""Configuration of fact tracing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from flows.study_config import NAME
from tasks.common.config import Config, parse, read_with_settings
from tasks.pool.facts import FactsConfig
from tasks.scoring.config import MethodConfig, ScorerConfig

STAGES = ("pool", "scoring", "selection")
"""The stages of fact tracing, as ``--refresh`` names them."""


class FactTracingConfig(Config):
    """Fact tracing: every method on candidate pools that grow (Table 17)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the run; it stands in ``runs/NAME`` unless ``--out`` says otherwise."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the draw and of the bootstrap."""
    scorer: ScorerConfig
    """The model that scores."""
    facts: FactsConfig
    """The facts and the pools."""
    methods: dict[str, MethodConfig] = Field(min_length=1)
    """Arm → method."""
    seeds: tuple[int, ...] = Field((42,), min_length=1)
    """Seeds of the hashes: every arm with a sketch is made once a seed, in place of the sketch's own."""
    ks: tuple[int, ...] = Field((10,), min_length=1)
    """The Ks of Recall@K and Hits@K."""
    resamples: int = Field(1000, ge=1, le=100_000)
    """Bootstrap resamples of the facts behind every interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Mass of the intervals."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        for arm in self.methods:
            if not re.fullmatch(NAME, arm) or arm.endswith(".partial"):
                raise ValueError(f"the arm {arm!r} is not a plain lower-case name")
        for field in ("seeds", "ks"):
            if len(set(getattr(self, field))) < len(getattr(self, field)):
                raise ValueError(f"{field} names one twice")
        if min(self.ks) < 1:
            raise ValueError(f"ks must be 1 or more, got {list(self.ks)}")
        return self


def load(path: Path, settings: tuple[str, ...] = ()) -> FactTracingConfig:
    """Read a configuration and apply ``a.b=value`` settings.

    Raises:
        InputError: naming the file and the field.
    """
    return parse(FactTracingConfig, read_with_settings(path, settings), path)
