"""One head, one file: the file's name is the head's name, and its constant `HEAD` is all that others read of it."""

from __future__ import annotations

import importlib
import pkgutil

from ...data_manifests.errors import UnknownName
from ..specs import HeadSpec


def names() -> list[str]:
    """Names of all heads that ship with the package, sorted; no head is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> HeadSpec:
    """Import one head and return its HEAD; a name with a dot is a module of your own, `package.module`.

    Raises:
        UnknownName: no such head, or a module that cannot be found or has no HEAD.
    """
    if "." in name and all(part.isidentifier() for part in name.split(".")):
        return _find_elsewhere(name)
    if name not in names():
        raise UnknownName("head", name, names())
    return importlib.import_module(f"{__name__}.{name}").HEAD


def _find_elsewhere(name: str) -> HeadSpec:
    try:
        head = getattr(importlib.import_module(name), "HEAD", None)
    except ModuleNotFoundError as error:
        # Only the head itself may be missing: what it imports in vain is its author's bug and shows its traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        head = None
    if not isinstance(head, HeadSpec):
        raise UnknownName("head", name, names())
    return head
