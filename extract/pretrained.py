"""open_clip's architectures and weights: found, checked, loaded. The only file that imports open_clip."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from torch import Tensor, nn

from ..data_manifests.errors import ConfigError, UnknownName
from .specs import TransformSpec
from .tiny import CONFIG, WEIGHTS
from .weights import TowerError, first_line, read_weights

TINY = "coldframe-tiny"


def load_model(model: str, pretrained: str | None, seed: int) -> tuple[nn.Module, str, str]:
    """Build an open_clip model and load its weights; arguments and errors are those of `towers.load_tower`.

    Returns:
        The model, on the CPU in float32; its name or architecture file; the tag, file or `random` that its weights are.
    """
    name = _architecture(model)
    source = _find_weights(name, pretrained)
    module = _build(name, source.preprocess, seed)
    if source.path is not None:
        weights = read_weights(source.path)
        if source.quick_gelu is None and weights.is_openai:
            _check_gelu(name, source.name, quick_gelu=True)
        _copy_weights(module, weights.tensors, f"the weights {source.name!r} do not fit {name}")
    return module, model if model.endswith(".json") else name, source.name


def are_weights_here(model: str, pretrained: str | None) -> bool:
    """Whether loading a model needs no download; weights that do not exist count as here, for loading says so.

    Raises:
        UnknownName, TowerError: no such model; or weights that do not fit it, as `load_model` would say.
    """
    name = _architecture(model)
    facts = open_clip.get_pretrained_cfg(name, pretrained or "")
    if not facts or "file" in facts:
        return True
    _check_gelu(name, pretrained or "", facts.get("quick_gelu", False))
    if not facts.get("hf_hub"):
        return (Path("~/.cache/clip").expanduser() / Path(facts["url"]).name).is_file()
    repository, _, file = facts["hf_hub"].rpartition("/")
    files = [file, str(Path(file).with_suffix(".safetensors"))] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    return any(isinstance(try_to_load_from_cache(repository, each), str) for each in files)


def transform_of(module: nn.Module) -> TransformSpec:
    """The evaluation transform that a model expects."""
    facts = merge_preprocess_dict(PreprocessCfg(), open_clip.get_model_preprocess_cfg(module))
    height, width = (facts["size"], facts["size"]) if isinstance(facts["size"], int) else facts["size"]
    if height != width:
        raise TowerError("only towers that see square crops are supported", seen=f"{height} x {width} pixels")
    return TransformSpec(
        size_px=height,
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        interpolation=facts["interpolation"],
        resize_mode=facts["resize_mode"],
        fill_color=facts["fill_color"],
    )


def expect_transform(module: nn.Module, transform: TransformSpec) -> None:
    """Make a model expect another evaluation transform: the inverse of `transform_of`."""
    facts = dataclasses.asdict(transform)
    open_clip.set_model_preprocess_cfg(module, {"size": facts.pop("size_px"), "mode": "RGB", **facts})


def reference_transform(module: nn.Module) -> Callable[[Image.Image], Tensor]:
    """open_clip's own evaluation transform of a model, picture → [3, S, S], to which ours is held."""
    facts = merge_preprocess_dict(PreprocessCfg(), open_clip.get_model_preprocess_cfg(module))
    made: Any = image_transform_v2(PreprocessCfg(**facts), is_train=False)  # for training it would be something else
    return made


def tokenizer_of(model: str) -> Callable[..., Tensor]:
    """The tokenizer of a model; CLIP's own for one that open_clip does not know.

    Raises:
        TowerError: it is one of Hugging Face, and that library or its files are absent.
    """
    try:
        with _quiet_open_clip():
            return open_clip.get_tokenizer(_open_clip_name(model))
    except (OSError, ImportError) as error:
        raise TowerError(f"the tokenizer of {model} cannot be had: {first_line(error)}") from error


def is_class_token_vit(visual: nn.Module) -> bool:
    """Whether an image tower is a plain ViT whose embedding is read off its class token."""
    return isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"


def uses_quick_gelu(module: nn.Module) -> bool:
    """Whether any activation is OpenAI's approximation x·sigmoid(1.702x)."""
    return any(isinstance(part, QuickGELU) for part in module.modules())


@dataclass(frozen=True, slots=True)
class _Source:
    """Where weights come from, and what is known of them before they are read."""

    name: str  # tag, file or `random`
    path: Path | None  # None: drawn
    preprocess: Mapping[str, Any]  # what differs from open_clip's default transform
    quick_gelu: bool | None = None  # None: unknown, so the model's name is believed


def _architecture(model: str) -> str:
    """Make open_clip know the architecture and return the name under which it does."""
    name = _open_clip_name(model)
    if model == TINY or model.endswith(".json"):
        path = CONFIG if model == TINY else Path(model).expanduser()
        config, known = _read_architecture(path), open_clip.get_model_config(name)
        if known is None:
            open_clip.add_model_config(path)
        elif known != config:
            raise TowerError(f"open_clip already has another architecture named {name}", fix=f"Rename {path}.")
    if name not in open_clip.list_models():
        raise UnknownName("model", model, [*open_clip.list_models(), TINY])
    return name


def _read_architecture(path: Path) -> dict[str, Any]:
    # Checked before open_clip keeps the path: a file that it cannot read would break every later registration.
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TowerError(f"the architecture file {path} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict) or not config.keys() >= {"embed_dim", "vision_cfg", "text_cfg"}:
        raise TowerError(f"{path} is no architecture", wanted="the keys embed_dim, vision_cfg and text_cfg")
    return config


def _open_clip_name(model: str) -> str:
    return Path(model).stem if model.endswith(".json") else model.replace("/", "-")


def _find_weights(name: str, pretrained: str | None) -> _Source:
    tags = ["shipped"] if name == TINY else open_clip.list_pretrained_tags_by_model(name)
    choices = f"{', '.join([*tags, 'random'])}, or a file of weights"
    shared = _shared_preprocess(name, tags)
    if name == TINY and pretrained in (None, "shipped"):
        return _Source("shipped", WEIGHTS, shared)
    if pretrained is None:
        raise ConfigError(f"which weights {name} should have was not said", wanted=choices)
    if pretrained == "random":
        return _Source("random", None, shared)
    if facts := open_clip.get_pretrained_cfg(name, pretrained):
        quick_gelu = facts.get("quick_gelu", False)
        _check_gelu(name, pretrained, quick_gelu)  # before the download
        return _Source(pretrained, _download(name, pretrained, facts), _preprocess(facts), quick_gelu)
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise TowerError(f"{name} has no weights {pretrained!r}, nor is there such a file", wanted=choices)
    if facts := _published(path):
        quick_gelu = facts.get("quick_gelu", False)
        _check_gelu(name, pretrained, quick_gelu)
        return _Source(pretrained, path, _preprocess(facts), quick_gelu)
    return _Source(pretrained, path, shared)


def _preprocess(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in facts}


def _shared_preprocess(name: str, tags: Sequence[str]) -> dict[str, Any]:
    """The transform on which all published weights of a model agree, for a file that does not say; else the default."""
    found = [_preprocess(open_clip.get_pretrained_cfg(name, tag)) for tag in tags]
    return found[0] if found and all(other == found[0] for other in found) else {}


def _published(path: Path) -> Mapping[str, Any] | None:
    """open_clip's facts about a file that it publishes: addresses carry the file's SHA-256, or its first 8 digits."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    for name, tag in open_clip.list_pretrained():
        facts = open_clip.get_pretrained_cfg(name, tag)
        stated = re.search(r"[/-]([0-9a-f]{64}|[0-9a-f]{8})[/.]", facts.get("url", ""))
        if stated and digest.startswith(stated[1]):
            return facts
    return None


def _download(name: str, tag: str, facts: Mapping[str, Any]) -> Path:
    try:
        with _quiet_open_clip():
            return Path(open_clip.download_pretrained(dict(facts)))
    except (OSError, RuntimeError) as error:
        address = facts.get("url") or f"https://huggingface.co/{facts.get('hf_hub', '')}"
        raise TowerError(
            f"the weights {tag!r} of {name} could not be downloaded ({first_line(error)})",
            fix=f"Without network, fetch them from {address} elsewhere and give the file in place of the tag.",
        ) from error


def _check_gelu(name: str, weights: str, quick_gelu: bool) -> None:
    """Refuse weights trained with the other GELU: nothing would fail, every feature would be a little wrong.

    open_clip only warns of it, and not at all for a file (open_clip #771).
    """
    config = open_clip.get_model_config(name)
    assert config is not None, "the architecture was registered before its weights were looked for"
    if quick_gelu == config.get("quick_gelu", False):
        return
    other = f"{name}-quickgelu" if quick_gelu else name.removesuffix("-quickgelu")
    trained, built = ("QuickGELU", "GELU") if quick_gelu else ("GELU", "QuickGELU")
    raise TowerError(
        f"the weights {weights!r} were trained with {trained}, but {name} computes {built}",
        fix=f"Use the model {other}."
        if other in open_clip.list_models()
        else f'Use an architecture file with "quick_gelu": {str(quick_gelu).lower()}.',
    )


def _build(name: str, preprocess: Mapping[str, Any], seed: int) -> nn.Module:
    # Modules draw their first weights from the global generator: lend them a seeded one, then put the old state back.
    with _quiet_open_clip(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return open_clip.create_model(name, pretrained_text=False, force_preprocess_cfg=dict(preprocess))
        except (OSError, ImportError, RuntimeError, TypeError) as error:
            raise TowerError(f"open_clip cannot build {name}: {first_line(error)}") from error


def _copy_weights(module: nn.Module, tensors: dict[str, Tensor], problem: str) -> None:
    """Copy weights into a model, strictly; open_clip would resize position embeddings of another grid unasked."""
    if hasattr(module, "text"):
        tensors = convert_to_custom_text_state_dict(tensors)
    wanted = module.state_dict()
    if "logit_scale" in tensors and tensors["logit_scale"].numel() == 1:  # written with one dimension or with none
        tensors = tensors | {"logit_scale": tensors["logit_scale"].reshape(wanted["logit_scale"].shape)}
    for key, own in wanted.items():
        if key in tensors and tensors[key].shape != own.shape:
            raise TowerError(
                f"{problem}: {key} has another shape", seen=list(tensors[key].shape), wanted=list(own.shape)
            )
    for key in [*wanted, *tensors]:
        if key not in tensors:
            raise TowerError(f"{problem}: {key} is missing")
        if key not in wanted:
            raise TowerError(f"{problem}: {key} is no weight of this model")
    module.load_state_dict(tensors)


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """Hold back open_clip's log: it uses the root logger, whose shortcuts would also install a handler for everyone."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def is_not_open_clip(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root.addHandler(handler)
    root.addFilter(is_not_open_clip)
    try:
        yield
    finally:
        root.removeFilter(is_not_open_clip)
        root.removeHandler(handler)
