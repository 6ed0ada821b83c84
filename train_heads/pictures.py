"""Where a head looked: its attention over the frames of a video, as numbers a pixel and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..data_manifests.errors import ConfigError
from ..extract.batches import FeatureBatch
from ..extract.decoders.contract import DecodeOptions
from ..extract.frames import Crops, decode
from ..extract.specs import IMPORTED, SpecMismatch
from ..extract.store import FeatureStore
from .checkpoint import Checkpoint

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
HIDDEN = 0.8  # of a pixel under the hottest colour


@dataclass(frozen=True, slots=True)
class Looked:
    """What a picture shows, in words and numbers."""

    video_id: str
    out: str
    predicted: str
    probability: float
    frame_shares: list[list[float]]  # of each layer, how its attention is shared between the frames; sums to one
    class_token_shares: list[float]  # of each layer, what went to class tokens, which have no place in a picture

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def describe(self) -> str:
        """A line for the video, and one for each layer of the head."""
        shares = (" ".join(f"{100 * share:3.0f}" for share in layer) for layer in self.frame_shares)
        layers = zip(shares, self.class_token_shares, strict=True)
        lines = [f"layer {i}: % of each frame {s}; class tokens {100 * c:.0f} %" for i, (s, c) in enumerate(layers, 1)]
        return "\n".join([f"{self.video_id}: {self.predicted} ({100 * self.probability:.0f} %)", *lines])


def draw_attention(
    checkpoint: Checkpoint, store: FeatureStore, video_id: str, out: Path, device: str = "auto"
) -> Looked:
    """Draw the frames of a video in a row, and below them a row for each layer of a head: red and yellow is where it looks.

    The frames come from the store where it has `pixels`, else from the video, decoded as it was. A layer is averaged over
    its attention heads, and its colours are scaled to its own hottest patch, so that frames can be compared.

    Raises:
        ConfigError: a head without attention maps, or a picture of an unknown format.
        StoreError: the store lacks the video.
        SpecMismatch, DecodeError: the video is not there any more, or is not the one that was extracted.
    """
    if out.suffix.lower() not in FORMATS:
        raise ConfigError("no such format of pictures", seen=out.name, wanted=" or ".join(FORMATS))
    predictor = checkpoint.predictor(store, device=device)
    head: Any = predictor.module
    if not hasattr(head, "attention_maps"):
        raise ConfigError(f"{checkpoint.head} has no attention maps", wanted="a head such as evl_decoder")
    features, mask = store.gather([video_id], predictor.needs)
    batch = FeatureBatch(features, mask, torch.zeros(1, dtype=torch.int64), (video_id,))
    with torch.inference_mode():
        maps = head.attention_maps(batch.to(predictor.device, torch.float32))[0].mean(dim=1).cpu()  # [M, T, 1+N]
    crops = crops_of(store, video_id)
    heat = heat_maps(maps, store.shape.grid, crops.shape[-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(overlay(crops, heat.numpy())).save(out)
    probability = torch.from_numpy(predictor.logits(batch))[0].softmax(dim=0)  # [C]
    return Looked(
        video_id=video_id,
        out=str(out),
        predicted=predictor.class_names[int(probability.argmax())],
        probability=float(probability.max()),
        frame_shares=maps.sum(dim=2).tolist(),
        class_token_shares=maps[..., 0].sum(dim=1).tolist(),
    )


def heat_maps(attention: Tensor, grid: tuple[int, int], size_px: int) -> Tensor:
    """Attention to the tokens of frames [..., 1+N], class token first, on their pixels: [..., S, S].

    A pixel has the attention of its patch, smoothed between the centres of patches; the class token's is left out.
    """
    patches = rearrange(attention[..., 1:], "... (gh gw) -> (...) 1 gh gw", gh=grid[0], gw=grid[1])
    smooth = interpolate(patches, size=(size_px, size_px), mode="bilinear")
    return smooth.reshape(*attention.shape[:-1], size_px, size_px)


def overlay(crops: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Frames [T, 3, S, S], and below them M rows of the same under their heat [M, T, S, S]: RGB [(1+M)·S, T·S, 3]."""
    hottest = heat.max(axis=(1, 2, 3), keepdims=True)
    heat = (heat / np.maximum(hottest, np.finfo(np.float32).tiny))[:, :, None]  # [M, T, 1, S, S]
    colour = 255 * np.concatenate([np.minimum(2 * heat, 1), np.maximum(2 * heat - 1, 0), 0 * heat], axis=2)
    rows = crops * (1 - HIDDEN * heat) + colour * (HIDDEN * heat)
    whole = np.concatenate([crops[None], np.rint(rows).astype(np.uint8)])
    return rearrange(whole, "m t c h w -> (m h) (t w) c")


def crops_of(store: FeatureStore, video_id: str) -> NDArray[np.uint8]:
    """The crops [T, 3, S, S] that the tower saw of a video's first view: stored, or decoded again.

    Raises:
        StoreError: the store lacks the video.
        ConfigError: its features were imported, so that nothing says which frames they are of.
        SpecMismatch: the file is not the one that was extracted.
        DecodeError: it cannot be decoded any more.
    """
    row = store.row(video_id)
    if store.holds("pixels", video_id):
        return store.read("pixels", video_id)
    frames, record = store.spec.frames, store.manifest.by_id.get(video_id)
    if IMPORTED in (frames.sampling, store.spec.tower.model) or record is None:
        raise ConfigError(
            f"nothing says which frames the features of {video_id!r} are of", fix="Extract its video to draw on it."
        )
    sink, times = Crops(), {"start_s": record.start_s, "end_s": record.end_s}
    options = DecodeOptions(salvage=row.kept - 1e-6 if row.kept < 1 else None)
    transform, path = store.spec.tower.transform, store.manifest.path_of(record)
    found = decode(path, frames, transform, sink, key=video_id, **times, views=(0,), options=options)
    if found.content_sha256 != row.content_hash or len(found.rows[0]) != row.n_frames:
        raise SpecMismatch(f"{path} has changed since it was extracted", fix="Extract it again.")
    return np.stack([sink[i] for i in found.rows[0]])
