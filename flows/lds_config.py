"""Configuration of the linear datamodeling score: a study, and how often its scorer is trained again."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from flows.study_config import StudyConfig, read_with_pools
from tasks.common.config import parse


class LdsConfig(StudyConfig):
    """Every method of a study held against training on random halves of its pools (Table 16).

    ``finetuning`` is the recipe of these trainings, and of the one on the whole pool under ``recall``. The study's own
    metrics of the same scores, by the pools' ``ks``, stand in the folder ``selection``.
    """

    title: str = "Linear datamodeling score"
    """Heading of the table."""
    subsets: int = Field(ge=3, le=100_000)
    """Random halves of each pool; 128 in the paper. An interval narrows with their square root."""
    training_seeds: tuple[int, ...] = Field((1, 2, 3), min_length=1)
    """Seeds of the trainings on each half; they stand in place of the recipe's own. Two or more tell how much of the
    differences between the halves is the seeds' noise."""

    @model_validator(mode="after")
    def _retrains_the_scorer(self) -> Self:
        if self.finetuning is None:
            raise ValueError("finetuning is needed: how the scorer is trained on a half of the pool")
        if (self.finetuning.model, self.finetuning.revision) != (self.scorer.model, self.scorer.revision):
            raise ValueError("finetuning.model must be the scorer's: its scores are held against its own training")
        if len(set(self.training_seeds)) < len(self.training_seeds):
            raise ValueError("training_seeds names one twice")
        if self.rule or self.default:
            raise ValueError("rule and default are a study's: here nothing is chosen")
        return self


def load(path: Path, settings: tuple[str, ...] = ()) -> LdsConfig:
    """Read a configuration and the pools it names by file, and apply ``a.b=value`` settings, as a study's.

    Raises:
        InputError: naming the file and the field.
    """
    return parse(LdsConfig, read_with_pools(path, settings), path)
