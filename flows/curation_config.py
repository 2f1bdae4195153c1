"""Configuration of a curation: sources that grow, queries that say what is good, and a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from tasks.common.config import Config, parse, read_with_settings
from tasks.pool.intake import IntakeConfig
from tasks.scoring.config import ScorerConfig
from tasks.scoring.growing import SignatureConfig
from tasks.selection.budget import BudgetConfig


class CurationConfig(Config):
    """A curation: what is new in the sources is scored once, and the best so far is published under the budget."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the curation; it stands in ``runs/NAME`` unless ``--out`` says otherwise."""
    title: str = "Curation"
    """Heading of the cards."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the hashes that find near duplicates."""
    intake: IntakeConfig
    """Where documents come from, and which count as new. Its near_duplicate stays what it was in the first run."""
    queries: Path
    """JSONL, JSON or Parquet file of documents like those that are wanted. Another set searches the index again and
    scores no document anew."""
    scorer: ScorerConfig
    """The model that scores. Another model begins a new index beside the old one."""
    signature: SignatureConfig = SignatureConfig()
    """What is kept of a document. Another sketch, type or calibration begins a new index beside the old one."""
    budget: BudgetConfig
    """How much is selected."""
    positive: str | None = None
    """Label that good documents carry, where some carry labels: its share of the selection is the purity."""

    @property
    def place(self) -> PlaceConfig:
        """The part that must stay as it was in the first run."""
        return PlaceConfig(curation=self.name, seed=self.seed, near_duplicate=self.intake.near_duplicate)


class PlaceConfig(Config):
    """What a curation's directory is claimed for."""

    kind: Literal["curation"] = "curation"
    """Tells the directory from that of a closed loop or a study."""
    curation: str
    """Name of the curation."""
    seed: int
    """Seed of the hashes that find near duplicates."""
    near_duplicate: float
    """Jaccard index from which a document is a near duplicate."""


def load(path: Path, settings: tuple[str, ...] = ()) -> CurationConfig:
    """Read a configuration and apply ``a.b=value`` settings.

    Raises:
        InputError: naming the file and the field.
    """
    return parse(CurationConfig, read_with_settings(path, settings), path)
