"""Weights are read from any usual file, never by running what is in it."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coldframe.extract.weights import TowerError, read_weights, weights_sha256


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"visual.proj": torch.randn(4, 3, generator=generator), "logit_scale": torch.tensor(2.5)}


class OpenAIModel(nn.Module):
    """What OpenAI's exporter leaves in its archives: half-precision weights, and numbers kept as buffers."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.proj = nn.Parameter(tensors["visual.proj"].half())
        self.logit_scale = nn.Parameter(tensors["logit_scale"])
        self.register_buffer("input_resolution", torch.tensor(224))
        self.register_buffer("context_length", torch.tensor(77))
        self.register_buffer("vocab_size", torch.tensor(49408))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.visual.proj


def write_torchscript(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.trace(model, example), path)


def test_every_usual_file_gives_the_same_weights(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "told_by_content.bin")
    torch.save(tensors, tmp_path / "b.pt")
    torch.save(tensors, tmp_path / "old_format.pt", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "c.pt")
    for path in tmp_path.iterdir():
        weights = read_weights(path)
        assert not weights.is_openai
        assert weights.tensors.keys() == tensors.keys()
        assert all(torch.equal(weights.tensors[k], v) for k, v in tensors.items())


def test_openai_layout_is_recognised_and_its_extras_left_out(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save({**tensors, "input_resolution": torch.tensor(224), "vocab_size": 49408}, tmp_path / "state.pt")
    write_torchscript(OpenAIModel(tensors), torch.zeros(1, 4, dtype=torch.half), tmp_path / "archive.pt")
    for name in ("state.pt", "archive.pt"):
        weights = read_weights(tmp_path / name)
        assert weights.is_openai
        assert weights.tensors.keys() == tensors.keys()
        torch.testing.assert_close(weights.tensors["visual.proj"].float(), tensors["visual.proj"], atol=2e-3, rtol=0)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_of_more_than_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"visual.proj": Touch(tmp_path / "trace")}, tmp_path / "evil.pt")
    with pytest.raises(TowerError, match=r"could run code.*safetensors"):
        read_weights(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(
        pickle.dumps(Touch(tmp_path / "trace"), protocol=4)
    )  # torch warns of protocol 4
    with pytest.raises(TowerError, match="could run code"):
        read_weights(tmp_path / "plain.pt")
    assert not (tmp_path / "trace").exists()


def test_damaged_files_are_named_in_one_line(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, tmp_path / "a.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "b.safetensors")
    for path in list(tmp_path.iterdir()):
        for keep in (0.5, 0.9):
            whole = path.read_bytes()
            (tmp_path / f"cut{keep}.{path.name}").write_bytes(whole[: int(keep * len(whole))])
        path.unlink()
    (tmp_path / "empty.pt").touch()
    (tmp_path / "page.pt").write_text("<html>Not found</html>")
    for path in tmp_path.iterdir():
        with pytest.raises(TowerError, match=r"cannot be read as weights|could run code") as caught:
            read_weights(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"a": 1.0}, [torch.zeros(2)], torch.zeros(2)])
def test_something_other_than_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(TowerError, match="is not a state dict"):
        read_weights(tmp_path / "a.pt")


def test_the_hash_is_of_names_shapes_and_values(tensors: dict[str, torch.Tensor]) -> None:
    half = {name: value.half() for name, value in tensors.items()}
    reference = weights_sha256(half)
    assert weights_sha256({name: value.float() for name, value in reversed(half.items())}) == reference
    assert weights_sha256({**half, "logit_scale": half["logit_scale"] + 1}) != reference
    assert weights_sha256({**half, "visual.proj": half["visual.proj"].reshape(3, 4)}) != reference
    assert weights_sha256({"visual.projection": half["visual.proj"], "logit_scale": half["logit_scale"]}) != reference
