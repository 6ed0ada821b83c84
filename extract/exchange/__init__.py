"""A store as files that other programs read, and features of others as a store.

    exports.py        a store → .h5, .tar or .npy files     imports.py        .h5, .npz or .npy → a store
    parcels.py        features on the way between the two   hdf5.py           both ways; the only user of h5py
    foreign.py        what somebody's arrays hold           numpy_files.py    .npy and .npz
    foreign_labels.py  and what they say of the videos

Names below are loaded when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exports import export_store
    from .foreign_labels import Reading
    from .imports import import_features
    from .parcels import ExchangeReport

_WHERE = {
    "ExchangeReport": "parcels",
    "Reading": "foreign_labels",
    "export_store": "exports",
    "import_features": "imports",
}

__all__ = ["ExchangeReport", "Reading", "export_store", "import_features"]


def __getattr__(name: str) -> Any:
    """Load a public name from its file on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
