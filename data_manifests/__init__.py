"""What is processed: which videos, which classes, which splits, which episodes. Standard library and NumPy; no torch.

records.py    VideoRecord, Manifest: checked, fingerprinted     splits.py    seeded, stratified, whole groups
tables.py     manifests as CSV and Parquet files                episodes.py  few-shot episode lists
folder.py     a folder of videos → Manifest                     datasets/    official lists → Manifest, one file each
drawn.py      drawn clips, where there are no data              errors.py    every error a user can cause
locations.py  folders of this machine, and URLs
"""

from __future__ import annotations

from .episodes import EpisodeList, EpisodeSpec, draw_episodes
from .errors import ColdframeError, ConfigError, UnknownName
from .folder import from_folder
from .records import Manifest, ManifestError, VideoRecord
from .splits import carve_validation, draw_splits

__all__ = [
    "ColdframeError",
    "ConfigError",
    "EpisodeList",
    "EpisodeSpec",
    "Manifest",
    "ManifestError",
    "UnknownName",
    "VideoRecord",
    "carve_validation",
    "draw_episodes",
    "draw_splits",
    "from_folder",
]
