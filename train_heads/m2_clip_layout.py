"""How the official code of M2-CLIP, sallymmx/m2clip 3c8c661, names and shapes what it trains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

BLOCK = "transformer.resblocks."  # of the text tower; of the image tower, behind `visual.`
LOCAL_KERNEL = ".local.conv.weight"  # theirs is of a convolution over time and space, one frame long


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the tensors of a checkpoint tell."""

    blocks: frozenset[int]  # of the image tower that have adapters, counted from 0
    text_blocks: frozenset[int]  # of the text tower; the one behind its last is the fusion block
    both: bool  # also before attention
    width: int  # of the bottlenecks of text adapters; 0 where there are none
    n_words: int | None  # rows of the classifier of words


def sizes_of(weights: Mapping[str, Tensor]) -> Sizes:
    """The sizes of a checkpoint."""
    narrow = [len(tensor) for name, tensor in weights.items() if name.endswith(".textad_fc1.bias")]
    return Sizes(
        blocks=_indices(weights, f"visual.{BLOCK}"),
        text_blocks=_indices(weights, BLOCK),
        both=any(".adapter_pre_attn." in name for name in weights),
        width=max(narrow, default=0),
        n_words=len(weights["mlm_adapter.bias"]) if "mlm_adapter.bias" in weights else None,
    )


def is_frozen(name: str, text_layers: int) -> bool:
    """Whether it is a weight of CLIP's in the fusion block, which stands behind the last of `text_layers` text blocks."""
    return re.match(rf"{re.escape(BLOCK)}{text_layers}\.(attn|ln_1|ln_2|mlp)\.", name) is not None


def their_names(blocks: range, text_blocks: range, both: bool) -> dict[str, str]:
    """Their name of every tensor → ours, of adapters in these blocks, counted from 0, and in the fusion block."""
    pairs = {
        "visual.t_adapter.fc1": "temporal.down",
        "visual.t_adapter.conv": "temporal.conv",
        "visual.t_adapter.fc2": "temporal.up",
        "visual.adapter_fc": "classifier",
        "mlm_adapter.transform.dense": "decoder.dense",
        "mlm_adapter.transform.LayerNorm": "decoder.layer_norm",
    }
    text_inserts = {k: f"sentences.inserts.{i}" for i, k in enumerate(text_blocks)}
    text_inserts[text_blocks.stop] = "decoder.insert"
    places = {"adapter_pre_mlp": "pre_mlp"} | ({"adapter_pre_attn": "pre_attention"} if both else {})
    for theirs, ours in places.items():
        for i, k in enumerate(blocks):
            for their_part, part in (("", "temporal"), (".offset_adapter", "local")):
                for their_layer, layer in (("fc1", "down"), ("conv", "conv"), ("fc2", "up")):
                    name = f"visual.{BLOCK}{k}.{theirs}{their_part}.{their_layer}"
                    pairs[name] = f"visual.{i}.{ours}.{part}.{layer}"
        for k, insert in text_inserts.items():
            pairs[f"{BLOCK}{k}.{theirs}.textad_fc1"] = f"{insert}.{ours}.down"
            pairs[f"{BLOCK}{k}.{theirs}.textad_fc2"] = f"{insert}.{ours}.up"
    leaves = {f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in pairs.items() for leaf in ("weight", "bias")}
    return leaves | {"mlm_adapter.decoder.weight": "decoder.decoder.weight", "mlm_adapter.bias": "decoder.decoder.bias"}


def without_frame_axis(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels of local differences as ours have them, [D, 1, 3, 3]."""
    return {n: rearrange(t, "d one 1 h w -> d one h w") if n.endswith(LOCAL_KERNEL) else t for n, t in state.items()}


def with_frame_axis(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels of local differences as theirs have them, [D, 1, 1, 3, 3]."""
    return {n: rearrange(t, "d one h w -> d one 1 h w") if n.endswith(LOCAL_KERNEL) else t for n, t in state.items()}


def _indices(weights: Mapping[str, Tensor], prefix: str) -> frozenset[int]:
    return frozenset(int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix))
