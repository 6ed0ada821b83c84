"""Stage 1: videos → frozen features; and the store that the other stages read.

    pipeline.py   the stage, top-down             specs.py       what can change a value
    sampling.py   which frames, which views       towers.py      frozen CLIP towers
    crops.py      a picture → square crops        pretrained.py  which weights; the only user of open_clip
    frames.py     video → frames                  weights.py     files of weights, read safely
    workers.py    killable decode processes;      text.py        class names × templates → text features
    worker.py     what runs in one of them        tiny/          coldframe-tiny, the CLIP that ships with the package
    blocks.py     the towers' blocks, opened      summary.py     a block without its patches
    progress.py   what a long run shows           forecast.py    what a run will cost; space.py, how much disk

    writer.py     the store as extract writes it  compress.py    pooled tokens, int8
    store.py      the store as others read it     batches.py     features of many videos as one batch
    catalogue.py  which row of a video counts     leases.py      who may write what, at the same time
    shards.py     one shard, both directions      fleet.py       one command, several devices
    arrays.py     one array of it: raw zarr v3    journal.py     what happened, event by event
    upkeep.py     verify, repair, compact, merge  url_leases.py  leases, behind a URL

    doctor.py     whether this machine is fit     machine.py     what it is
    decoders/     the back ends that frames.py asks: PyAV, decord, torchcodec
    exchange/     a store as other files, and others' files as a store

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
    from .pipeline import ExtractOptions, ExtractReport, extract
    from .specs import FeatureSpec, FrameSpec, SpecMismatch, TowerShape, TowerSpec, TransformSpec
    from .store import FeatureStore
    from .text import TextFeatures
    from .towers import Tower, load_tower
    from .writer import FeatureWriter

_WHERE = {
    "FeatureBatch": "batches",
    "FeatureDataset": "batches",
    "ExtractOptions": "pipeline",
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
    "ExtractOptions",
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
