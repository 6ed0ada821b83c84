"""Stage 1: videos → frozen features; and the store that the other stages read.

    pipeline.py   the stage, top-down             specs.py       what can change a value
    frames.py     video → frames                  towers.py      frozen CLIP towers
    workers.py    killable decode processes       pretrained.py  which weights; the only user of open_clip
    progress.py   what a long run shows           weights.py     files of weights, read safely
    writer.py     the store as extract writes it  text.py        class names × templates → text features
    store.py      the store as others read it     batches.py     features of many videos as one batch
    catalogue.py  which row of a video counts     tiny/          coldframe-tiny, the CLIP that ships with the package
    shards.py     one shard, both directions
    arrays.py     one array of it: raw zarr v3    journal.py     what happened, event by event
    url_leases.py who may write, behind a URL

House letters, in every shape and einops pattern of the project:
`B` videos in the batch · `T` frames of a video · `F` frames of a shard · `L` tower blocks · `N` patch tokens of a frame ·
`D` tower width · `E` joint image-text width · `C` classes · `W` ways · `K` shots · `Q` queries · `V` videos of a bank ·
`S` side of a crop in pixels.

Decode processes import this package without torch: names below are loaded when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arrays import StoreError
    from .batches import FeatureBatch, FeatureDataset
    from .pipeline import ExtractReport, extract
    from .specs import FeatureSpec, FrameSpec, SpecMismatch, TowerShape, TowerSpec, TransformSpec
    from .store import FeatureStore
    from .text import TextFeatures
    from .towers import Tower, load_tower
    from .writer import FeatureWriter

_WHERE = {
    "FeatureBatch": "batches",
    "FeatureDataset": "batches",
    "ExtractReport": "pipeline",
    "extract": "pipeline",
    "FeatureSpec": "specs",
    "FrameSpec": "specs",
    "SpecMismatch": "specs",
    "TowerShape": "specs",
    "TowerSpec": "specs",
    "TransformSpec": "specs",
    "FeatureStore": "store",
    "FeatureWriter": "writer",
    "StoreError": "arrays",
    "TextFeatures": "text",
    "Tower": "towers",
    "load_tower": "towers",
}

__all__ = [
    "ExtractReport",
    "FeatureBatch",
    "FeatureDataset",
    "FeatureSpec",
    "FeatureStore",
    "FeatureWriter",
    "FrameSpec",
    "SpecMismatch",
    "StoreError",
    "TextFeatures",
    "Tower",
    "TowerShape",
    "TowerSpec",
    "TransformSpec",
    "extract",
    "load_tower",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its file on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
