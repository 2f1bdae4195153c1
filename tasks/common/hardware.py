"""What a machine can do and what a model asks of it, without loading a weight: the ground of every estimate.

A figure here is an estimate: FLOPs are counted, speed is a peak (of a data sheet, or of a matrix product timed here)
times a utilisation.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.errors import InputError
from tasks.common.models import Precision, locate, native_bfloat16

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Machine:
    """The devices that a run computes on."""

    name: str
    gpus: int
    """Number of GPUs; 0 computes on the CPU."""
    peak: float | None
    """FLOP/s of one GPU in bfloat16, without sparsity; None on a CPU, where :func:`timed_product` measures it."""
    bandwidth: float
    """Bytes a second that one device (the CPU, a GPU) reads of its memory."""
    memory: float
    """Bytes of one device's memory."""
    disk: float | None = None
    """Bytes free; None for a machine that is only named."""

    @property
    def devices(self) -> int:
        """GPUs, or the one CPU."""
        return max(self.gpus, 1)

    def flops(self, precision: Precision, *, training: bool = False) -> float:
        """FLOP/s of one device that a run reaches (:data:`UTILISATION`)."""
        kind = "gpu" if self.gpus else "cpu"
        peak = self.peak if self.peak is not None else timed_product(self.resolved(precision))
        # torch leaves float32 to the ordinary cores: 67 of 989 TFLOP/s on an H100, 19.5 of 312 on an A100.
        slower = 15.0 if self.gpus and self.resolved(precision) == "float32" else 1.0
        return peak * UTILISATION[kind, "training" if training else "forward"] / slower

    def described(self) -> str:
        """What its speed is taken from, in words."""
        if self.peak is None:
            product = timed_product(self.resolved("auto"))
            return f"{self.name}, whose matrix product ran at {product / 1e9:,.0f} GFLOP/s just now"
        return f"{self.name} at {UTILISATION['gpu', 'forward']:.0%} of {self.peak / 1e12:,.0f} TFLOP/s each"

    def resolved(self, precision: Precision) -> Precision:
        """``auto`` as this machine takes it."""
        if precision != "auto":
            return precision
        return "bfloat16" if self.gpus or native_bfloat16() else "float32"

    def bytes_a_weight(self, precision: Precision) -> int:
        """Bytes of a parameter in a forward pass."""
        return 2 if self.resolved(precision) == "bfloat16" else 4


_H100 = 989e12, 3.35e12, 80e9
GPUS = {"H100": _H100, "H200": (989e12, 4.8e12, 141e9), "A100": (312e12, 2.04e12, 80e9)}
"""FLOP/s in bfloat16 (dense), bytes a second and bytes of memory: NVIDIA's data sheets of H100 SXM, H200 SXM and A100
SXM 80GB."""

UTILISATION = {("gpu", "forward"): 0.40, ("gpu", "training"): 0.40, ("cpu", "forward"): 0.80, ("cpu", "training"): 0.65}
"""Share of the peak that a pass reaches.

gpu: 38–43 % of the bfloat16 peak is what Llama 3 reports for its pretraining on H100s (The Llama 3 Herd of Models,
Table 4); the same is taken for forward passes. It is not measured with this project.
cpu: of :func:`timed_product`, by turns on one core of an AMD EPYC (Zen 3) with a model of SmolLM2's width and head and
8 layers, 320 tokens a pass: .81–.86 forward, .67–.68 forward and backward (22 November 2026).
"""
CPU_BANDWIDTH = 4e9
"""Bytes a second and core: AdamW's step, which moves 28 bytes a parameter, took 7.4 ns a parameter in the same runs."""
SKETCHING = 1.05
"""CPU seconds of signatures over the bare forward pass with SmolLM2-135M (reports/bench/engine.json)."""


@cache
def timed_product(precision: Precision) -> float:
    """FLOP/s of a 1024 × 1024 matrix product on this machine's CPU, measured for a second."""
    import torch

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    size = 1024
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    left @ right
    begun, products = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begun) < 1.0:
        left @ right
        products += 1
    return 2.0 * size**3 * products / seconds


def named(gpu: str, count: int) -> Machine:
    """A machine of ``count`` GPUs of one of :data:`GPUS`."""
    peak, bandwidth, memory = GPUS[gpu]
    return Machine(f"{count} × {gpu}", count, peak, bandwidth, memory)


def here(folder: Path) -> Machine:
    """This machine, with the disk that ``folder`` is, or will be, on.

    Raises:
        InputError: its GPU is none of :data:`GPUS`.
    """
    import torch

    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    disk = float(shutil.disk_usage(place).free)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        known = next((gpu for gpu in GPUS if gpu in name), None)
        if known is None:
            raise InputError(f"the GPU here, {name}, is unknown; name a like one with --gpu {'|'.join(GPUS)}")
        machine = named(known, torch.cuda.device_count())
        return Machine(machine.name, machine.gpus, machine.peak, machine.bandwidth, machine.memory, disk)
    cores = len(os.sched_getaffinity(0))
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Machine(f"this machine, {cores} cores", 0, None, CPU_BANDWIDTH * cores, memory, disk)


@dataclass(frozen=True)
class Shape:
    """What a model's cost depends on."""

    parameters: float
    multiplied: float
    """Parameters that a token is multiplied with: all but an input embedding that is not the head too. Of a mixture of
    experts all are counted, an upper bound."""
    layers: int = 0
    width: int = 0
    """d."""
    vocabulary: int = 0
    """V."""

    def forward_flops(self, tokens: float, length: float) -> float:
        """FLOPs of a forward pass over documents of ``length`` tokens: 2·P a token, and 2·layers·d·length for a causal
        attention's two products."""
        return tokens * (2.0 * self.multiplied + 2.0 * self.layers * self.width * length)

    def training_flops(self, tokens: float, length: float, *, recompute: bool = False) -> float:
        """FLOPs of forward and backward pass: three forward passes, four where activations are recomputed."""
        return (4 if recompute else 3) * self.forward_flops(tokens, length)


@cache
def shape_of(spec: str, revision: str | None = None, *, encoder: bool = False) -> Shape:
    """A model's shape from its configuration alone, built on torch's meta device.

    Args:
        spec: as :func:`tasks.common.models.locate` takes it, or a ``config.json`` of its own.
        revision: revision of a hub id.
        encoder: a model without a head that predicts tokens.

    Raises:
        InputError: there is no configuration, or transformers knows no such model.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    place = str(locate(spec).path) if spec.startswith("pypi:") else spec
    if (Path(place).exists() or place.startswith((".", "/", "~"))) and not _config(Path(place)).is_file():
        raise InputError("is no model directory and no config.json", file=spec)
    try:
        config = AutoConfig.from_pretrained(place, revision=revision or "main", trust_remote_code=False)
        with torch.device("meta"):
            model = (AutoModel if encoder else AutoModelForCausalLM).from_config(config, trust_remote_code=False)
        text = config.get_text_config()
        layers, width, vocabulary = text.num_hidden_layers, text.hidden_size, text.vocab_size
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"has no model configuration that can be used here ({first}); a config.json in its place is "
                         "enough to plan with", file=spec) from None  # fmt: skip
    looked_up = _looked_up(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Shape(parameters, parameters - looked_up, layers, width, vocabulary)


def _config(place: Path) -> Path:
    return place if place.suffix == ".json" else place / "config.json"


def _looked_up(model: Any) -> int:
    """Parameters of the input embedding, 0 where it is the head too."""
    embedding: torch.Tensor = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    return 0 if head is not None and head.weight is embedding else embedding.numel()
