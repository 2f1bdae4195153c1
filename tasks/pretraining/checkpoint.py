"""One file to go on from: weights, AdamW's moments and the losses so far.

Everything else is a function of the step and so is not stored: the learning rate, the order of the documents and the
state of the random numbers. The file is safetensors (nothing is unpickled) and replaces the one before by rename.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.errors import InputError
from tasks.common.files import whole_file

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""State of AdamW for one parameter: first and second moment (the parameter's shape), and its number of updates."""


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around a writing of safetensors, which tells a full disk by an error of its own.

    Raises:
        InputError: naming ``place``.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise InputError(f"cannot be written ({error})", file=place) from None


class Checkpoint:
    """The checkpoint of one training run.

    Args:
        directory: where it stands, or shall stand.
        key: what the run is made of; a checkpoint with another key is refused.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self._file = directory / "state.safetensors"
        self._key = key

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
        """Replace the checkpoint by the state after ``len(losses)`` steps.

        Args:
            model: the bare model; tied weights are stored once.
            optimizer: AdamW over ``model.parameters()``, in that order.
            losses: the loss of every step so far.
        """
        import torch
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {"loss": torch.tensor(losses, dtype=torch.float64)}
        for name, parameter in model.named_parameters():
            tensors[f"model/{name}"] = parameter.detach()
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{moment}/{name}"] = value
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with writing(self._file), whole_file(self._file) as part:
            save_file(kept, part, {"key": self._key, "sha256": _digest(kept)})

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        """Bring ``model`` and ``optimizer`` to the stored state in place.

        Returns:
            The losses of the steps done; empty where there is no checkpoint, and then nothing is changed.

        Raises:
            InputError: the checkpoint cannot be read, or is of another run.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        if not self._file.is_file():
            return []
        try:
            with safe_open(self._file, framework="pt") as stored, torch.no_grad():
                if (stored.metadata() or {}).get("key") != self._key:
                    raise InputError(
                        "the checkpoint is of another configuration, model or selection; "
                        "remove it, or train into another directory", file=self._file,
                    )
                names = set(stored.keys())
                noted = (stored.metadata() or {}).get("sha256")
                if noted != _digest({name: stored.get_tensor(name) for name in names}):
                    raise InputError("the checkpoint is damaged; remove it to train from the start", file=self._file)
                state: dict[int, dict[str, Any]] = {}
                for index, (name, parameter) in enumerate(model.named_parameters()):
                    parameter.copy_(stored.get_tensor(f"model/{name}"))
                    moments = {moment: f"{moment}/{name}" for moment in MOMENTS}
                    if moments["step"] in names:
                        state[index] = {moment: stored.get_tensor(place) for moment, place in moments.items()}
                optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
                return [float(loss) for loss in stored.get_tensor("loss")]
        except SafetensorError as error:
            raise InputError(f"the checkpoint cannot be read ({error}); remove it", file=self._file) from None


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors, which safetensors has no checksum of."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
