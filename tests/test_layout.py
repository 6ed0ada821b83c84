"""The package list is what lies on disk, imports flow one way, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("data_manifests", "extract", "train_heads", "evaluate")

# One heavy library is imported in one file only; tests and benchmarks may import anything.
OWNERS = {
    "decord": {"extract/decoders/by_decord.py"},
    "av": {
        "extract/frames.py",
        *(f"extract/decoders/{name}.py" for name in ("by_pyav", "damage", "packets", "source")),
    },
    "torchcodec": {"extract/decoders/by_torchcodec.py"},
    "open_clip": {"extract/pretrained.py", "extract/tiny/make.py"},
    "huggingface_hub": {"extract/pretrained.py"},
    "zarr": {"extract/arrays.py"},
    "pyarrow": {"data_manifests/tables.py", "extract/shards.py"},
    "h5py": {"extract/exchange/hdf5.py"},
    "safetensors": {"train_heads/checkpoint.py", "extract/text.py", "extract/weights.py", "extract/tiny/make.py"},
    "typer": {"cli.py"},
    "fsspec": {"data_manifests/locations.py"},
    "upath": {"data_manifests/locations.py"},
    "rich": {"extract/progress.py"},
}


def sources() -> list[Path]:
    """Every module of the package."""
    return [ROOT / "cli.py", *(p for stage in STAGES for p in (ROOT / stage).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports absolutely, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_package_list_is_what_lies_on_disk() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    folders = [path.parent.relative_to(ROOT) for stage in STAGES for path in (ROOT / stage).rglob("__init__.py")]
    on_disk = {"coldframe", *(".".join(("coldframe", *folder.parts)) for folder in folders)}
    assert listed == on_disk


@pytest.mark.parametrize("library", OWNERS)
def test_one_heavy_library_is_imported_in_one_file(library: str) -> None:
    users = {str(path.relative_to(ROOT)) for path in sources() if library in imports(path)}
    assert users <= OWNERS[library]


def test_no_module_imports_its_siblings_by_bare_name() -> None:
    for path in sources():
        assert not imports(path) & {*STAGES, "cli"}, path


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("coldframe.data_manifests", ("torch", "numpy.testing", "zarr", "decord", "av", "fsspec")),
        ("coldframe.extract", ("torch", "zarr", "open_clip", "decord", "av")),
        ("coldframe.extract.frames", ("torch", "zarr", "open_clip", "decord", "torchcodec")),
        ("coldframe.extract.workers", ("torch", "zarr", "open_clip", "decord", "torchcodec", "fsspec")),
        ("coldframe.train_heads", ("decord", "av")),
        ("coldframe.evaluate", ("decord", "av", "coldframe.train_heads")),
        ("coldframe.cli", ("torch", "zarr", "open_clip", "decord", "av", "pyarrow")),
    ],
)
def test_heavy_imports_stay_lazy(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_a_bare_import_of_a_stage_fails_at_once() -> None:
    for stage in ("evaluate", "extract", "train_heads"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {stage}; {stage}.does_not_matter"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
        assert done.returncode != 0, stage
