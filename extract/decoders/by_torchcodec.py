"""Seek by torchcodec, which is asked by name alone, and held to the times of the packets; it imports torch."""

from __future__ import annotations

import os

import numpy as np

from ..crops import Crop
from .contract import Choose, DecodeError, DecodeOptions, Picked, Sink, Source, crops_of
from .damage import signs_on_stderr


def decode(source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions) -> Picked:
    """Seek to the frames; raise DecodeError where they might be others than those asked for."""
    if source.seek_flaw:
        raise DecodeError(f"torchcodec is not exact {source.seek_flaw}: use the decoder auto or pyav")
    views = choose(source.timestamps_s)
    wanted = crops_of(views)
    os.environ["TORCHCODEC_FFMPEG_LOG_LEVEL"] = "INFO"  # damage is told there alone
    try:
        # Here, since it imports torch.
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

        with signs_on_stderr() as signs:
            reader = VideoDecoder(
                source.path, stream_index=source.index, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
            )
        n_frames, begin_s = reader.metadata.num_frames, reader.metadata.begin_stream_seconds_from_content or 0.0
        if n_frames != len(source.timestamps_s):
            raise DecodeError(
                f"torchcodec miscounts: {n_frames} frames where the packets hold {len(source.timestamps_s)}"
            )
        for batch in source.batches(wanted):
            with signs_on_stderr() as more:
                pictures = reader.get_frames_at(batch.tolist())  # [t, H, W, 3]
            if signs := signs + more:
                raise DecodeError(f"corrupt: {signs[0]}")
            times_s = pictures.pts_seconds.numpy() - float(begin_s)
            if np.abs(times_s - source.timestamps_s[batch]).max() > 1e-6:
                raise DecodeError("torchcodec misplaces frames: its times are not those of the packets")
            for number, rgb in zip(batch.tolist(), pictures.data.numpy(), strict=True):
                for crop_number in wanted[number]:
                    sink.put(crop(rgb, crop_number))
    except ModuleNotFoundError as error:
        raise DecodeError("torchcodec is not installed: install it, or use the decoder auto") from error
    except (ImportError, RuntimeError, IndexError, ValueError) as error:
        if "Could not load libtorchcodec" in str(error):
            reason = "finds no FFmpeg that fits: install FFmpeg's shared libraries, or use the decoder auto"
        else:
            reason = f"gave up: {str(error).strip().partition(chr(10))[0][-200:]}"
        raise DecodeError(f"torchcodec {reason}") from error
    return Picked(source.timestamps_s, views, "torchcodec", source.kept)
