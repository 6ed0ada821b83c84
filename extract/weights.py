"""Weights of a file, whatever wrote it, without running code from it.

Knows safetensors, `torch.save` of a state dict, training checkpoints that hold one beside the optimiser's, the `module.`
prefix of data-parallel training, and OpenAI's TorchScript archives.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..data_manifests.errors import ColdframeError

# Plain numbers that OpenAI's own exporter leaves between the weights.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")

# Where training checkpoints keep the weights.
CONTAINERS = ("state_dict", "model_state_dict", "model")


class TowerError(ColdframeError, ValueError):
    """Weights that cannot be loaded or do not fit the model, or something that a tower does not have."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A state dict on the CPU, under the names of the model that wrote it."""

    tensors: dict[str, Tensor]
    is_openai: bool  # laid out by OpenAI's exporter, hence trained with QuickGELU


def read_weights(path: Path) -> Weights:
    """Read the weights of a file.

    Raises:
        TowerError: the file is damaged, holds no weights, or is a pickle of more than weights, which could run code.
    """
    try:
        found, is_openai = _read(path)
    except pickle.UnpicklingError as error:
        raise TowerError(
            f"{path} is a pickle of more than weights, which could run code when opened; it was not",
            fix="Save model.state_dict() alone, best as safetensors.",
        ) from error
    except OSError as error:
        raise TowerError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:  # damage in a pickle can fail at any line of the unpickler: struct.error, KeyError, …
        raise TowerError(f"{path} cannot be read as weights: {first_line(error)}") from error
    found = found if isinstance(found, Mapping) else {}
    found = next((found[key] for key in CONTAINERS if isinstance(found.get(key), Mapping)), found)
    is_openai = is_openai or any(name in found for name in OPENAI_EXTRAS)
    tensors = {name: value for name, value in found.items() if name not in OPENAI_EXTRAS}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise TowerError(f"{path} is not a state dict", seen=_describe(found), wanted="a dictionary of tensors")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return Weights(tensors, is_openai)


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, shape and value as float32, so that a half-precision file of the same weights agrees."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().float().cpu().numpy()
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value, dtype="<f4").data)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """The first line of another library's message, cut to what fits in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read(path: Path) -> tuple[object, bool]:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
        return load_file(path), False
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        with warnings.catch_warnings():  # torch.jit is deprecated, but OpenAI's archives are what they are
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location="cpu").state_dict(), True
    if not start.startswith((b"PK", b"\x80")):
        raise ValueError("neither safetensors nor a file of torch.save")
    with warnings.catch_warnings():  # that a pickle is of another protocol: it is read, or refused in our words
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True), False


def _describe(found: Mapping) -> str:
    return f"keys {', '.join(map(repr, list(found)[:4]))}" if found else "nothing in it"
