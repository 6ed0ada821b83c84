"""Whatever is done to a file's bytes, each frame that comes is the frame asked for, or the video is reported."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
import pytest

from coldframe.extract.crops import resize_and_crop
from coldframe.extract.frames import Crops, DecodedVideo, DecodeOptions, decode, write_video
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.workers import Chunk, DecodePool, Failure, Job

pytestmark = pytest.mark.slow

N, EACH, EACH_REAL = 60, 92, 20  # frames of a drawn video; mutations of each video
TINY = TransformSpec(96, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", "squash")
TEXTURE = np.random.default_rng(0).integers(-20, 21, (16, 24, 1)).repeat(8, 0).repeat(8, 1)
GOPS = "keyint=12:min-keyint=12:scenecut=0:bframes=2:log-level=none"
DRAWN: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {"x264-params": GOPS}),
    "hevc.mkv": ("libx265", {"x265-params": f"{GOPS}:pools=1:frame-threads=1"}),
    "vp9.webm": ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime", "g": "12"}),
    "mpeg4.avi": ("mpeg4", {"g": "12", "bf": "0", "b": "1M"}),
    "mpeg2.ts": ("mpeg2video", {"g": "12", "bf": "2"}),
}
REAL = ("hard/unlabelled/decord_video_90.mov", "hard/unlabelled/torchcodec_av1_video.mkv")


def drawn(number: int) -> np.ndarray:
    """A picture whose 4 × 3 blocks spell a number below 64 and its complement, so that a garbled one is none."""
    code = number | (~number & 63) << 6
    bits = np.array([code >> bit & 1 for bit in range(12)]).reshape(3, 4)
    picture = bits.repeat(43, 0)[:128].repeat(48, 1)[:, :192, None] * 172 + 36
    return np.clip(np.repeat(picture, 3, axis=2) + np.roll(TEXTURE, 3 * number, 1), 0, 255).astype(np.uint8)


def number_in(crop: np.ndarray) -> int:
    """The number that a crop [3, 96, 96] spells; -1 where it is garbled."""
    bits = [crop[:, 16 + 32 * row, 12 + 24 * column].mean() > 128 for row in range(3) for column in range(4)]
    code = sum(int(bit) << place for place, bit in enumerate(bits))
    return code & 63 if code & 63 ^ code >> 6 == 63 else -1


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with some bits flipped, a run of zeros or noise, or bytes that are gone, come in or doubled."""
    found, begin, length = bytearray(data), int(rng.integers(len(data))), int(rng.integers(1, len(data) // 20))
    end = min(begin + length, len(data))
    match rng.integers(7):
        case 0 | 1:
            for place in rng.integers(len(data), size=int(rng.integers(1, 5))):
                found[place] ^= 1 << int(rng.integers(8))
        case 2:
            found[begin:end] = bytes(end - begin)
        case 3:
            found[begin:end] = rng.bytes(end - begin)
        case 4:
            del found[begin:end]
        case 5:
            found[begin:begin] = rng.bytes(end - begin)
        case _:
            found[begin:begin] = found[begin:end]
    return bytes(found)


def decoded(paths: list[Path], spec: FrameSpec, salvage: float | None) -> dict[str, tuple[Any, np.ndarray | None]]:
    """What a pool of two workers makes of the files: answer, and the crops of its one view."""
    found: dict[str, tuple[Any, np.ndarray | None]] = {}
    crops: dict[str, list[np.ndarray]] = defaultdict(list)
    with DecodePool(spec, TINY, workers=2, timeout_s=20.0, options=DecodeOptions(salvage=salvage)) as pool:
        for key, part in pool.decode(Job(path.name, str(path)) for path in paths):
            if isinstance(part, Chunk):
                crops[key] = [*crops[key][: 0 if part.first == 0 else None], *part.crops]
            else:
                found[key] = part, None if isinstance(part, Failure) else np.stack(crops[key])[part.rows[0]]
    return found


def as_it_says(path: Path) -> tuple[list[np.ndarray], bool]:
    """The crops of all pictures that FFmpeg gives from end to end, and whether anything tells of damage."""
    crops: list[np.ndarray] = []
    is_damaged = False
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture() as log, av.open(str(path)) as container:
            stream = container.streams.best("video")
            assert isinstance(stream, av.VideoStream)
            stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
            with suppress(av.FFmpegError):
                for packet in container.demux(stream):
                    frames: list[av.VideoFrame] = []
                    try:
                        frames = packet.decode()
                    except av.FFmpegError:
                        is_damaged = True
                    is_damaged |= any(frame.is_corrupt for frame in frames)
                    for frame in frames:
                        rgb = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                        crops.append(resize_and_crop(rgb, TINY))
            is_damaged |= any(level <= av.logging.ERROR or "concealing" in text for level, _, text in log)
    finally:
        av.logging.set_level(None)
    return crops, is_damaged


@pytest.mark.parametrize(("decoder", "salvage"), [("auto", None), ("pyav", 0.1)])
def test_no_mutation_passes_for_another_frame(
    tmp_path: Path, shared: Path, decoder: str, salvage: float | None, record_property: Any
) -> None:
    paths: list[Path] = []
    sound: dict[str, list[np.ndarray]] = {}
    for name, (codec, options) in DRAWN.items():
        write_video(tmp_path / name, (drawn(i) for i in range(N)), 25, codec=codec, options=options)
    whole = [*(tmp_path / name for name in DRAWN), *(shared / "data" / "videos" / name for name in REAL)]
    for path in (path for path in whole if path.is_file()):
        sound[path.name] = Crops()
        decode(path, FrameSpec(None, "all", decoder="pyav"), TINY, sound[path.name])  # type: ignore[arg-type]
        for seed in range(EACH if path.name in DRAWN else EACH_REAL):
            paths.append(tmp_path / f"{seed}.{path.name}")
            paths[-1].write_bytes(mutated(path.read_bytes(), np.random.default_rng([seed, path.stat().st_size])))

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for key, (answer, crops) in decoded(paths, FrameSpec(8, decoder=decoder), salvage).items():
        name = key.partition(".")[2]
        if crops is None:
            assert "\n" not in answer.reason
            counts[name]["crash" if "crash" in answer.reason else "reported"] += 1
            continue
        assert isinstance(answer, DecodedVideo)
        places = answer.indices[0] if salvage is None else np.rint(answer.timestamps_s[0] * 25).astype(int)
        kinds = {kind(name, int(place), crop, sound[name]) for place, crop in zip(places, crops, strict=True)}
        if kinds == {"right"}:
            counts[name]["right"] += 1
            continue
        said, is_damaged = as_it_says(tmp_path / key)
        counts[name]["another, and nothing tells" if "another" in kinds else "garbled, and nothing tells"] += 1
        print(key, kinds, is_damaged, answer.kept, len(said), places.tolist(), [number_in(c) for c in crops])
    for name, count in counts.items():
        print(name, dict(count))
    assert False


def kind(name: str, place: int, crop: np.ndarray, sound: list[np.ndarray]) -> str:
    """Whether a crop is the frame of its place, another frame, or none."""
    if name in DRAWN:
        number = number_in(crop)
        return "right" if number == place else "garbled" if number < 0 else "another"
    apart = [np.abs(crop.astype(int) - other).mean() for other in sound]
    nearest = int(np.argmin(apart))
    if place < len(apart) and apart[place] <= apart[nearest] + 0.5:
        return "right" if apart[place] < 1 else "garbled"
    return "another" if apart[nearest] < 1 else "garbled"
