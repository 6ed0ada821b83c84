"""Is this machine fit for extraction? Versions, limits, and self-tests that end in a value known beforehand.

Every check is a function that returns one line of detail, and raises if it fails. What may crash or hang when it is
imported, the decoders, is first loaded by a child process with a time limit; so nothing heavy is imported up here.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data_manifests.errors import ConfigError, UnknownName
from .machine import gib, limits, line_of, release, space, versions
from .specs import FrameSpec

DECODERS = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec"}  # name in a FrameSpec → module

_GPUS = Path("/proc/driver/nvidia/gpus")
_LIMIT_S = 8.0  # for a decoder to be imported, or to decode the drawn video
_N_DRAWN, _N_ASKED, _SIDE = 48, 8, 64
_LOADING = """
import importlib, sys
sys.path[:] = sys.argv[2:]
try:
    print("loaded", getattr(importlib.import_module(sys.argv[1]), "__version__", ""))
except Exception as error:
    print("absent" if isinstance(error, ImportError) else "broken", type(error).__name__ + ":", *str(error).split())
"""
# The embedding of `_drawn_picture` by coldframe-tiny on a CPU in float32, scaled to length 1, in units of 1e-5.
_EMBEDDING = """
-1271 6951 -1404 1117 665 7634 19252 3886 18170 2802 17036 -4493 -5224 -4485 14767 -24226 -648 -19554 -2001 2926 844
8371 -3671 10162 -9873 -10355 32682 -14762 -17480 -5109 -4662 -14886 -14341 13330 21431 -23337 20941 2460 8949 -18851
4744 -3384 -16017 -5873 -7007 -1256 10443 14960 28773 18407 13712 -6120 -1033 -4708 2593 13806 -14856 2681 -7334 10364
-254 -17915 7125 1881
"""


class _CheckFailed(Exception):
    """Its text is the reason."""


class _Skipped(Exception):
    """There is nothing to check; its text is the reason."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    state: str  # ok | failed | skipped
    detail: str  # one line
    needed: bool = True  # by extraction

    @property
    def is_ok(self) -> bool:
        """Whether it was tried and found good."""
        return self.state == "ok"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found."""

    versions: dict[str, str]
    machine: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def is_fit(self) -> bool:
        """Whether nothing failed that extraction needs."""
        return not any(check.state == "failed" and check.needed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the verdict."""
        return {"fit": self.is_fit, **dataclasses.asdict(self)}

    def describe(self) -> str:
        """The report for people."""
        facts = self.versions | self.machine
        width = max(map(len, [*facts, *(check.name for check in self.checks)]))
        lines = [f"         {name:<{width}}  {value}" for name, value in facts.items()]
        for check in self.checks:
            state = check.state.upper() if check.state == "failed" else check.state
            optional = " (extraction can do without)" if check.state == "failed" and not check.needed else ""
            lines.append(f"{state:<7}  {check.name:<{width}}  {check.detail}{optional}")
        n_failed = sum(check.state == "failed" for check in self.checks)
        verdict = "fit for extraction" if self.is_fit else "NOT fit for extraction"
        return "\n".join([*lines, f"{verdict}: {len(self.checks)} checks, {n_failed} failed"])


def examine(store: Path | None = None, *, limit_s: float = _LIMIT_S) -> Report:
    """Look at everything that extraction rests on.

    Args:
        store: a folder, there or not, whose disk and locks are tried as well; nothing is left in it.
        limit_s: time for each decoder to be imported, and for each to decode.

    Raises:
        ConfigError: `store` is no folder of this machine.
    """
    folder = _existing_folder(store)
    decoders = _load_decoders(limit_s)
    checks = [
        *decoders.values(),
        *_check_frames(decoders, limit_s),
        _attempt("pre-processing", lambda: _with(decoders["pyav"], _check_transforms)),
        _attempt("tower on cpu", lambda: _with(decoders["pyav"], partial(_check_tower, "cpu", ("fp32",)))),
        *_check_gpus(decoders["pyav"]),
        _attempt("store folder", partial(_check_folder, folder)),
    ]
    ffmpeg = _attempt("FFmpeg of av", lambda: _with(decoders["pyav"], _ffmpeg))
    return Report(versions() | {ffmpeg.name: ffmpeg.detail}, limits(), tuple(checks))


def _attempt(name: str, check: Callable[[], str], needed: bool = True) -> Check:
    """Run one check; whatever goes wrong becomes its detail."""
    try:
        return Check(name, "ok", check(), needed)
    except _Skipped as reason:
        return Check(name, "skipped", str(reason), needed)
    except Exception as error:  # a broken installation can fail anywhere, and the other checks still tell something
        return Check(name, "failed", _line(error), needed)


def _with(decoder: Check, check: Callable[[], str]) -> str:
    """Run a check that imports frames.py, and so av, in this process; skip it where that does not load."""
    if not decoder.is_ok:
        raise _Skipped("av does not load")
    return check()


def _line(error: Exception) -> str:
    return str(error) if isinstance(error, _CheckFailed) else line_of(error)


# Decoders


def _load_decoders(limit_s: float) -> dict[str, Check]:
    """Import every decoder, each in a process of its own, at the same time."""
    with ThreadPoolExecutor(len(DECODERS)) as pool:
        checks = pool.map(lambda name: _load_decoder(name, DECODERS[name], limit_s), DECODERS)
        return dict(zip(DECODERS, checks, strict=True))


def _load_decoder(name: str, module: str, limit_s: float) -> Check:
    """Import a decoder in a child: it may raise, crash or hang."""
    title, required = f"load {name}", name == "pyav"
    if importlib.util.find_spec(module) is None:
        return Check(title, "failed" if required else "skipped", "not installed", required)
    command = [sys.executable, "-P", "-c", _LOADING, module, *sys.path]
    # What cannot be found is gone round; what breaks otherwise, breaks every video that `auto` gives it.
    harmful = name in ("pyav", "decord")
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return Check(title, "failed", f"import {module}: no end after {limit_s:g} s", harmful)
    said, noise = (text.decode(errors="replace").strip() for text in (done.stdout, done.stderr))
    word, _, detail = said.rpartition("\n")[2].partition(" ")
    if word == "loaded":
        return Check(title, "ok", f"{module} {detail}, published as {_published(module)}", required)
    if word in ("absent", "broken"):
        return Check(title, "failed", detail[:300], required or (harmful and word == "broken"))
    cause = f"crashed (signal {-done.returncode})" if done.returncode < 0 else f"ended (code {done.returncode})"
    last_words = noise.rpartition("\n")[2][:200]
    return Check(title, "failed", f"import {module} {cause}" + (f": {last_words}" if last_words else ""), harmful)


def _published(module: str) -> str:
    """Which packages on this machine may have brought a decoder: decord and decord2 share their import name."""
    installed = [f"{package} {release(package)}" for package in (module, f"{module}2") if release(package)]
    return " and ".join(installed) or "no package"


def _ffmpeg() -> str:
    from .frames import decoder_versions

    return ", ".join(f"{library} {number}" for library, number in decoder_versions().items())


def _check_frames(decoders: dict[str, Check], limit_s: float) -> Iterator[Check]:
    """Hold what each decoder gives of a video drawn here to the numbers in its pictures, and to the other decoders."""
    if not decoders["pyav"].is_ok:
        yield Check("frames", "skipped", "av does not load")
        return
    seen: dict[str, NDArray[np.uint8]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            video = Path(folder) / "numbered.mp4"
            drawing = _attempt("frames", partial(_draw_video, video))
            if not drawing.is_ok:
                # An FFmpeg that cannot encode H.264 may decode it all the same.
                state = "skipped" if drawing.detail.startswith("UnknownCodecError") else "failed"
                detail = f"no video could be drawn: {drawing.detail}"
                yield dataclasses.replace(drawing, state=state, detail=detail)
                return
            is_broken = decoders["decord"].state == "failed" and decoders["decord"].needed
            for name in ("auto", *DECODERS):
                is_loaded = not is_broken if name == "auto" else decoders[name].is_ok
                check = partial(_check_decoder, name, is_loaded, video, limit_s, seen)
                yield _attempt(f"frames by {name}", check, name in ("auto", "pyav"))
    except OSError as error:
        yield Check("frames", "failed", _line(error))


def _check_decoder(name: str, is_loaded: bool, video: Path, limit_s: float, seen: dict[str, NDArray[np.uint8]]) -> str:
    """Decode the drawn video as `extract` would."""
    if not is_loaded:
        raise _Skipped("decord is in its way" if name == "auto" else "it does not load")
    try:
        spec = FrameSpec(_N_ASKED, decoder=name)
    except UnknownName:
        raise _Skipped("extract does not use it") from None
    from .sampling import segment_centres
    from .specs import TransformSpec
    from .workers import Chunk, DecodePool, Failure, Job

    transform = TransformSpec(_SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with DecodePool(spec, transform, workers=1, timeout_s=limit_s) as pool:
        *chunks, answer = (arrival for _, arrival in pool.decode([Job("drawn", str(video))]))
    if isinstance(answer, Failure):
        raise _CheckFailed(answer.reason)
    assert not isinstance(answer, Chunk)
    crops = np.concatenate([chunk.crops for chunk in chunks if isinstance(chunk, Chunk)])
    shown, wanted = [_read_number(crop) for crop in crops], segment_centres(_N_DRAWN, _N_ASKED).tolist()
    if shown != wanted or answer.indices[0].tolist() != wanted:
        raise _CheckFailed(f"shows frames {shown}, says {answer.indices[0].tolist()}, was asked for {wanted}")
    seen[name] = crops
    for other, pixels in seen.items():
        if not np.array_equal(pixels, crops):
            raise _CheckFailed(f"its pixels are not those of {other}")
    same = f", as {' and '.join(other for other in seen if other != name)}" if len(seen) > 1 else ""
    return f"{_N_ASKED} of {_N_DRAWN} frames of an H.264 video are those asked for{same} (by {answer.decoder})"


def _draw_video(path: Path) -> str:
    """Write a small H.264 video with B-frames, whose pictures show their number."""
    from .frames import write_video

    options = {"bf": "3", "b_strategy": "0", "g": "16", "crf": "18"}
    write_video(path, map(_numbered, range(_N_DRAWN)), fps=25, options=options)
    return ""


def _numbered(number: int) -> NDArray[np.uint8]:
    """A picture [64, 64, 3] whose 2 × 4 dark or light blocks spell `number`."""
    bits = np.array([number >> place & 1 for place in range(8)], np.uint8).reshape(2, 4)
    return np.kron(40 + 170 * bits, np.ones((_SIDE // 2, _SIDE // 4), np.uint8))[..., None].repeat(3, axis=2)


def _read_number(crop: NDArray[np.uint8]) -> int:
    """The number that a crop [3, 64, 64] of `_numbered` shows."""
    blocks = crop.mean(axis=0).reshape(2, _SIDE // 2, 4, _SIDE // 4).mean(axis=(1, 3)) > 125
    return sum(int(bit) << place for place, bit in enumerate(blocks.ravel()))


# Pre-processing and tower


def _check_transforms() -> str:
    """Hold our crops and their scaling to open_clip's own transform, bit for bit: coldframe-tiny's, and ViT-B-16's."""
    import torch
    from PIL import Image

    from .crops import resize_and_crop
    from .pretrained import TINY, expect_transform, reference_transform
    from .towers import Tower, load_tower

    pictures = _drawn_pictures()
    tiny = load_tower(TINY, device="cpu")
    for size_px in (tiny.spec.transform.size_px, 224):
        expect_transform(tiny.model, dataclasses.replace(tiny.spec.transform, size_px=size_px))
        tower, theirs = Tower(tiny.model, device="cpu"), reference_transform(tiny.model)
        for rgb in pictures:
            ours = tower.normalise(resize_and_crop(rgb, tower.spec.transform)[None])[0]  # [3, S, S]
            expected = theirs(Image.fromarray(rgb))
            if not torch.equal(ours, expected):
                n, worst = int((ours != expected).sum()), float((ours - expected).abs().max())
                height, width, _ = rgb.shape
                raise _CheckFailed(
                    f"of a {width} x {height} picture, {n} of {ours.numel()} values at {size_px} pixels are not "
                    f"open_clip's, by up to {worst:.3g}"
                )
    return f"bit-equal to open_clip on {len(pictures)} pictures, at {tiny.spec.transform.size_px} and 224 pixels"


def _check_tower(device: str, precisions: tuple[str, ...]) -> str:
    """Embed a drawn picture, and hold the embedding to the one recorded."""
    from .crops import resize_and_crop
    from .pretrained import TINY
    from .towers import load_tower

    recorded = np.array(_EMBEDDING.split(), np.float64) * 1e-5  # [E]
    found = []
    for precision in precisions:
        tower = load_tower(TINY, precision=precision, device=device)
        crop = resize_and_crop(_drawn_picture(), tower.spec.transform)
        embedding = tower.encode_frames(crop[None], ["embedding"])["embedding"][0].double().cpu().numpy()
        embedding /= np.linalg.norm(embedding)
        cosine, worst = float(embedding @ recorded / np.linalg.norm(recorded)), float(abs(embedding - recorded).max())
        exact = device == "cpu" and precision == "fp32"  # elsewhere factors are rounded
        if not cosine >= 0.9999 or (exact and worst > 1e-4):
            raise _CheckFailed(
                f"coldframe-tiny's embedding in {precision} is off by {worst:.2g}, cosine {cosine:.5f}; "
                f"expected {'1e-4 and ' if exact else ''}0.9999 at least"
            )
        found.append(f"{precision} cosine {cosine:.6f}")
    return f"coldframe-tiny's embedding is the one recorded ({', '.join(found)})"


def _drawn_picture() -> NDArray[np.uint8]:
    """A red square on a slope of colours [97, 131, 3], by whole numbers alone: the same bytes everywhere."""
    y, x = np.indices((97, 131))
    rgb = np.stack([x * 255 // 130, y * 255 // 96, (x + y) % 256], axis=2).astype(np.uint8)
    rgb[20:70, 40:95] = (215, 35, 35)
    return rgb


def _drawn_pictures() -> list[NDArray[np.uint8]]:
    """Pictures of odd sizes, some smaller than a crop: the drawn one, and noise, on which any rounding shows."""
    rng = np.random.default_rng(0)
    sizes = ((97, 131), (271, 480), (500, 33), (64, 64), (225, 239), (31, 20))
    return [_drawn_picture(), *(rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes)]


# The machine


def _check_gpus(pyav: Check) -> Iterator[Check]:
    """Use every CUDA device, and the tower on the first."""
    try:
        import torch

        with warnings.catch_warnings(action="ignore"):  # of drivers that are too old, which `_why_no_gpu` tells
            n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:  # torch is broken
        yield Check("gpu", "failed", _line(error))
        return
    if not n_gpus:
        yield _attempt("gpu", _why_no_gpu)
        return
    for name in (f"cuda:{number}" for number in range(n_gpus)):
        yield _attempt(name, partial(_check_gpu, name))
    yield _attempt("tower on cuda", lambda: _with(pyav, partial(_check_tower, "cuda", ("fp32", "fp16"))))


def _check_gpu(name: str) -> str:
    """Multiply on a GPU, in float32 and as autocast would."""
    import torch

    free, total = torch.cuda.mem_get_info(name)
    for dtype in (torch.float32, torch.float16):
        ones = torch.ones(64, 64, device=name, dtype=dtype)
        if not bool((ones @ ones == 64).all()):
            raise _CheckFailed(f"{torch.cuda.get_device_name(name)} multiplies wrongly in {dtype}")
    # torch's own `is_bf16_supported` counts emulation as support.
    bf16 = "bf16" if torch.version.hip or torch.cuda.get_device_properties(name).major >= 8 else "no bf16"
    return f"{torch.cuda.get_device_name(name)}, {gib(free)} free of {gib(total)}, {bf16}, multiplies"


def _why_no_gpu() -> str:
    """Raise the reason why torch finds no GPU: a failure where there is one and nobody has hidden it."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    reason = "" if visible is None else f"CUDA_VISIBLE_DEVICES is {visible!r}: "
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason += " ".join(str(error).split())[:200]
    if visible not in ("", "-1") and _GPUS.is_dir() and any(_GPUS.iterdir()):
        raise _CheckFailed(f"the driver has a GPU, torch has none: {reason}")
    raise _Skipped(reason)


def _check_folder(folder: Path | None) -> str:
    """Try in a folder what the writer of a store relies on: locks that exclude, renames that replace, fsync."""
    if folder is None:
        raise _Skipped("name one by --store")
    with tempfile.TemporaryDirectory(prefix=".coldframe-doctor-", dir=folder) as name:
        old, new = Path(name, "old"), Path(name, "new")
        old.write_bytes(b"old")
        new.write_bytes(b"new")
        with old.open("rb+") as mine, old.open("rb+") as other:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                raise _CheckFailed(f"{folder}: a lock does not keep a second writer out")
        new.replace(old)
        for path in (old, Path(name)):
            number = os.open(path, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
        if old.read_bytes() != b"new":
            raise _CheckFailed(f"{folder}: a renamed file is not the one that is read")
    return f"{folder}: lock, rename and fsync work; {space(folder)}"


def _existing_folder(store: Path | None) -> Path | None:
    """The folder of a store that may not have been begun: the nearest one above it that is there."""
    if store is None:
        return None
    folder = next(path for path in (store.absolute(), *store.absolute().parents) if path.exists())
    if not folder.is_dir() or store.parts[0].endswith(":"):  # of s3://, one slash is left in a path
        raise ConfigError("doctor tries a folder of this machine", seen=store)
    return folder
