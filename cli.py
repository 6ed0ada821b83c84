"""The program: `coldframe COMMAND`, or `python cli.py COMMAND`. Parse, call one pipeline, print.

Exit codes: 0 done · 2 a mistake that the user can mend (one line says how) · 3 done, but some videos or runs failed, or checks
of doctor · 130 interrupted, and the same command goes on.
"""

from __future__ import annotations

import errno
import inspect as inspection
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from coldframe.data_manifests import datasets
from coldframe.data_manifests.errors import ColdframeError, ConfigError, UnknownName
from coldframe.data_manifests.locations import is_local, is_url, location, refuse_url
from coldframe.data_manifests.splits import captions_as_classes

if TYPE_CHECKING:
    from coldframe.data_manifests import Manifest
    from coldframe.extract import ExtractOptions, FeatureStore, FrameSpec
    from coldframe.train_heads import Predictor

HELP = """Freeze CLIP features of your videos once; train light temporal heads on them in minutes; evaluate.

\b
  coldframe demo                                              see it work: no data, no GPU, no network
  coldframe plan videos/ --for evl_decoder                    what that would take: disk, time, memory
  coldframe extract videos/ --store store --for evl_decoder   one pass over the videos
  coldframe train-head evl_decoder --store store --out runs/evl
  coldframe eval closed_set --store store --checkpoint runs/evl
"""

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}  # may come without a name
PLAIN: dict[str, Any] = {"no_args_is_help": True, "pretty_exceptions_enable": False, "rich_markup_mode": None}

app = typer.Typer(help=HELP, add_completion=False, **PLAIN)
MANIFESTS = """Which videos, which classes, which splits.

A manifest is a CSV or Parquet table. Columns: path (the only one that must be there; relative to the file's folder),
video_id (default: the path), label (class name), split (train, val, test), group (kept in one split), start_s, end_s,
captions (joined by |). Classes are in the order of NAME.classes.txt beside it, or else of the alphabet.
"""
manifests = typer.Typer(help=MANIFESTS, short_help="Which videos, which classes, which splits.", **PLAIN)
app.add_typer(manifests, name="manifest")

Captions = Annotated[
    bool, typer.Option("--captions", help="Retrieval: every caption is a class of its own; top-1 is then recall at 1.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def path(text: str) -> Path:
    """A path or a URL, of whose slashes pathlib would keep one."""
    refuse_no_name(text)
    try:
        return location(text)
    except ConfigError as error:
        raise ColdframeError(str(error)) from None  # of a ValueError typer shows no text


def refuse_no_name(text: str | Path) -> None:
    """Refuse an empty path, as a variable that was never set leaves it: it would be the current folder."""
    if not str(text):
        raise ColdframeError("a path is empty", fix="Name a folder or a file; the current folder is a dot.")


def local_path(text: str | Path) -> Path:
    """A path of this machine; a default is a path already."""
    refuse_no_name(text)
    if is_url(str(text)):  # pathlib would make a folder named `s3:` of it
        raise ColdframeError("runs and results are local", seen=text, wanted="a folder or file of this machine")
    return Path(text)


PLACE: dict[str, Any] = {"parser": path}
LOCAL: dict[str, Any] = {"parser": local_path}
Store = Annotated[Path, typer.Option("--store", "-s", help="The feature store, a folder or a URL.", **PLACE)]
ManifestFile = Annotated[
    Path | None,
    typer.Option(
        "--manifest", "-m", help="Other labels or splits for the same videos (default: the store's own).", **PLACE
    ),
]
Device = Annotated[str, typer.Option(help="auto (cuda where there is one), cpu, cuda, cuda:1, mps.")]
Templates = Annotated[
    str | None,
    typer.Option(help="Prompts around class names: plain, photo, image, video, or a text with {}. (default: video)"),
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


def about(summary: str, example: str) -> dict[str, Any]:
    """A command's line in the list of commands, and the example that closes its help."""
    return {"short_help": summary, "epilog": f"Example: coldframe {example}"}


@dataclass(frozen=True)
class Extraction:
    """What is to be extracted, and how: the options that `extract` and `plan` share."""

    videos: Annotated[
        Path,
        typer.Argument(
            help="A folder with one sub-folder a class, or a manifest (.csv, .parquet); or the URL of either.", **PLACE
        ),
    ]
    model: Annotated[str, typer.Option(help="An open_clip model, or coldframe-tiny.")] = "ViT-B-16-quickgelu"
    pretrained: Annotated[
        str | None, typer.Option(help="A pretrained tag, a weights file, or `random`. (default: openai)")
    ] = None
    frames: Annotated[
        int | None, typer.Option(help="Frames a video, for sampling uniform, random and dense. (default: 8)", min=1)
    ] = None
    heads: Annotated[str, typer.Option("--for", help="Store what these heads need: HEAD,HEAD.")] = ""
    features: Annotated[
        str,
        typer.Option(
            help="Store these: embedding, pixels, cls.K, summary.K, tokens.K (K counts blocks; -1 is the last). "
            "(default: embedding,cls.-1)"
        ),
    ] = ""
    sampling: Annotated[
        str,
        typer.Option(
            help="uniform: centres of equal segments; random: one frame of each segment; dense: --stride apart; "
            "fps: --fps a second over the whole video; all."
        ),
    ] = "uniform"
    stride: Annotated[int | None, typer.Option(help="dense: frames from one to the next. (default: 4)")] = None
    clips: Annotated[int | None, typer.Option(help="dense: clips, evenly spread over the video.")] = None
    fps: Annotated[float | None, typer.Option(help="fps: frames a second. (default: 1)")] = None
    crops: Annotated[
        str, typer.Option(help="centre; three along the longer side; random: resized, one a draw, same in all frames.")
    ] = "centre"
    flip: Annotated[bool, typer.Option("--flip", help="Mirror every second random crop or so.")] = False
    draws: Annotated[int, typer.Option(help="Draws of what is random, each a view; more can be added later.")] = 1
    seed: Annotated[int | None, typer.Option(help="Of random frames and crops. (default: 0)")] = None
    dtype: Annotated[
        str, typer.Option(help="float16, bfloat16, float32, or int8: tokens at half the size of float16.")
    ] = "float16"
    token_grid: Annotated[
        int | None, typer.Option(help="Average patch tokens to a grid of G x G; 7 of 14 is a quarter of the size.")
    ] = None
    precision: Annotated[
        str | None, typer.Option(help="Arithmetic of the tower. (default: fp16 on cuda, else fp32)")
    ] = None
    device: Annotated[
        str, typer.Option(help="auto (cuda where there is one), cpu, cuda:1; or several, cuda:0,cuda:1, or all.")
    ] = "auto"
    batch: Annotated[
        int | None,
        typer.Option(help="Frames to one pass of the tower; halved where memory is short. (default: 64; on a CPU 8)"),
    ] = None
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the tower: minutes to begin, then faster.")] = (
        False
    )
    decoder: Annotated[
        str, typer.Option(help="auto (decord where it is exact, else PyAV), decord, pyav, torchcodec.")
    ] = "auto"
    workers: Annotated[int | None, typer.Option(help="Decode processes. (default: one a core)", min=1)] = None
    worker_memory: Annotated[float, typer.Option(help="GiB that a decode process may take for one video.")] = 4.0
    timeout: Annotated[
        float, typer.Option(help="Seconds without progress after which the decoding of one video is killed.")
    ] = 60.0
    on_damage: Annotated[
        str, typer.Option(help="A video that is cut off or has holes: skip it, salvage what is there, or fail the run.")
    ] = "skip"
    min_fraction: Annotated[
        float, typer.Option(help="salvage: the smallest share of a video's frames that will do.")
    ] = 0.5
    max_frames: Annotated[int, typer.Option(help="A video that gives more frames is refused.", min=1)] = 36_000
    shard_videos: Annotated[
        int | None, typer.Option(help="Videos to a shard: what a killed run loses. (default: by their size)", min=1)
    ] = None
    shard: Annotated[
        str, typer.Option(help="I/N: only the I-th of N parts of the videos (0/4 … 3/4), beside runs of the others.")
    ] = "0/1"
    ignore_space: Annotated[bool, typer.Option("--ignore-space", help="Begin although the disk looks too small.")] = (
        False
    )
    retry: Annotated[bool, typer.Option("--retry", help="Try again also what failed for good in an earlier run.")] = (
        False
    )

    def tower_options(self) -> tuple[str, str | None, str, str]:
        """Model, weights, precision and device."""
        weights = self.pretrained or default_weights(self.model)
        return self.model, weights, self.precision or default_precision(self.device), self.device

    def frame_spec(self) -> FrameSpec:
        """Which frames are kept, and how they are cropped."""
        from coldframe.extract import FrameSpec

        is_random = self.sampling == "random" or self.crops == "random"
        return FrameSpec(
            n_frames=8 if self.frames is None and self.sampling in ("uniform", "random", "dense") else self.frames,
            sampling=self.sampling,
            decoder=self.decoder,
            stride=4 if self.stride is None and self.sampling == "dense" else self.stride,
            clips=self.clips,
            rate_fps=1.0 if self.fps is None and self.sampling == "fps" else self.fps,
            crops=None if self.crops == "centre" else self.crops,
            flip=self.flip or None,
            seed=self.seed if self.seed is not None or not is_random else 0,
            draws=self.draws,
        )

    def options(self, quiet: bool) -> ExtractOptions:
        """How the run works."""
        from coldframe.extract import ExtractOptions
        from coldframe.extract.leases import Part
        from coldframe.extract.workers import cores

        if self.on_damage not in ("skip", "salvage", "fail"):
            raise UnknownName("way to treat damage", self.on_damage, ("skip", "salvage", "fail"))
        memory_gib = self.worker_memory if 0 < self.worker_memory < 1e6 else 0  # NaN, too: refused as too little
        return ExtractOptions(
            workers=self.workers or cores(),
            timeout_s=self.timeout,
            worker_bytes=round(memory_gib * 2**30),
            batch_frames=self.batch,
            shard_videos=self.shard_videos,
            ignore_space=self.ignore_space,
            retry=self.retry,
            salvage=self.min_fraction if self.on_damage == "salvage" else None,
            stop_at_damage=self.on_damage == "fail",
            max_frames=self.max_frames,
            part=Part.parse(self.shard),
            quiet=quiet,
        )


def takes_extraction(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all options of an `Extraction`, which becomes its first argument."""
    shared = inspection.signature(Extraction, eval_str=True).parameters
    _, *own = inspection.signature(command, eval_str=True).parameters.values()
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*shared.values(), *own)]

    def run(**given: Any) -> None:
        asked = Extraction(**{name: given.pop(name) for name in shared})
        command(asked, **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspection.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@app.command(
    **about(
        "Cache the features of every video.",
        "extract videos/ --store store --for evl_decoder",
    )
)
@takes_extraction
def extract(asked: Extraction, store: Store, as_json: Json = False, quiet: Quiet = False) -> None:
    """Decode every video once, run the frozen CLIP tower over it, and cache its features. Resumes by itself.

    A broken video is counted and explained, and the run goes on; the exit code is then 3. Ctrl-C and SIGTERM keep what
    is done.
    """
    from coldframe.extract import FeatureSpec, load_tower
    from coldframe.extract import extract as extract_features

    if "," in asked.device or asked.device == "all":
        raise typer.Exit(extract_on_devices(asked, store, as_json, quiet))
    frames, options = frames_for(store, asked), asked.options(quiet)
    wanted = wanted_features(asked.features, asked.heads)  # before the tower, whose weights may have to be fetched
    manifest = open_manifest(asked.videos)
    tower = load_tower(*asked.tower_options())
    if asked.compiled:
        tower.compile()
    spec = FeatureSpec(frames, tower.spec, asked.dtype, asked.token_grid)
    with stopped_by_sigterm():
        report = extract_features(manifest, store, tower, spec, wanted, options)
    show(report.to_json(), f"{manifest.describe()}\n{report.describe()}", as_json)
    if report.interrupted or report.n_failed:
        raise typer.Exit(130 if report.interrupted else 3)


@app.command(**about("What an extraction will cost, before it starts.", "plan videos/ --for evl_decoder --sample 32"))
@takes_extraction
def plan(
    asked: Extraction,
    store: Annotated[
        Path, typer.Option("--store", "-s", help="Where it would go; what is there is not counted.", **PLACE)
    ] = Path("store"),
    sample: Annotated[
        int | None, typer.Option(help="Videos to decode and time. (default: 16, or two a worker)", min=1)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What an extraction will cost on this machine: disk, time, memory, and what the time goes into. Nothing is written.

    Takes the options of `extract`, decodes a random sample of the videos with them, and runs the tower over some frames.
    """
    from coldframe.extract import FeatureSpec
    from coldframe.extract.forecast import forecast, spec_of_stand_in, tower_of_the_same_cost

    frames, options = frames_for(store, asked), asked.options(quiet)
    wanted = wanted_features(asked.features, asked.heads)
    manifest = open_manifest(asked.videos)
    tower, note = tower_of_the_same_cost(*asked.tower_options())
    if asked.compiled:
        tower.compile()
    spec = FeatureSpec(frames, tower.spec, asked.dtype, asked.token_grid)
    if note:
        spec = spec_of_stand_in(spec, store)
    costs = forecast(manifest, store, tower, spec, wanted, options, n_sample=sample)
    show(costs.to_json() | {"note": note}, costs.describe() + (f"\n{'note':<10}  {note}" if note else ""), as_json)


@app.command(**about("What is in a store.", "inspect store --json"))
def inspect(
    store: Annotated[Path, typer.Argument(help="The feature store.", **PLACE)],
    as_json: Json = False,
) -> None:
    """What is in a store: tower, sampling, features and their size, videos, and what failed and why."""
    opened = open_store(store)
    show(opened.stats(), opened.describe(), as_json)


@app.command(**about("Hold a store to what was written, and mend it.", "verify store --deep --sample 0.01"))
def verify(
    store: Annotated[Path, typer.Argument(help="The feature store.", **PLACE)],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also decode videos again, by another decoder, encode them again, compare.")
    ] = False,
    sample: Annotated[float, typer.Option(help="deep: share of the videos.", min=0.0, max=1.0)] = 1.0,
    repair: Annotated[bool, typer.Option("--repair", help="Extract again exactly what is bad.")] = False,
    device: Device = "auto",
    workers: Annotated[int | None, typer.Option(help="Decode processes. (default: one a core)", min=1)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold every byte of a store to its checksum; exit code 3 if any is bad and was not mended."""
    from coldframe.extract import ExtractOptions, load_tower, upkeep
    from coldframe.extract.catalogue import Header
    from coldframe.extract.workers import cores

    if repair:
        refuse_url(store, "repair")
    report = upkeep.verify(store, quiet=quiet)
    if deep or (repair and report.damage):
        made_by = Header.read(store).spec.tower
        tower = load_tower(made_by.model, made_by.pretrained, made_by.precision, device)
        options = ExtractOptions(workers=workers or cores(), quiet=quiet)
        if deep:
            upkeep.verify_deep(store, tower, report, sample, options)
        if repair and (report.damage or report.unlike):
            with stopped_by_sigterm():
                upkeep.repair(store, tower, report, options)
    show(report.to_json(), report.describe(), as_json)
    if not report.is_sound:
        raise typer.Exit(3)


@app.command(**about("Fold small and half-dead shards into full ones.", "compact store"))
def compact(
    store: Annotated[Path, typer.Argument(help="The feature store.", **PLACE)],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what is alive in small and half-dead shards into full ones. Close what reads the store first."""
    from coldframe.extract import upkeep

    before, after = upkeep.compact(store, quiet=quiet)
    show({"n_shards_before": before, "n_shards": after}, f"{store}: {before:,} shards before, {after:,} now", as_json)


@app.command(**about("Add other stores to a store.", "merge store node1/store node2/store"))
def merge(
    store: Annotated[Path, typer.Argument(help="The store that grows.", **PLACE)],
    others: Annotated[list[Path], typer.Argument(help="Stores of the same settings; they stay as they are.", **PLACE)],
    as_json: Json = False,
) -> None:
    """Add the videos and features of other stores; files are linked, not copied, where the file system can."""
    from coldframe.extract import upkeep

    n_added = upkeep.merge(store, others)
    opened = open_store(store)
    show(opened.stats() | {"n_shards_added": n_added}, f"{n_added:,} shards added\n{opened.describe()}", as_json)


@app.command(**about("Write a store as HDF5, webdataset or npy files.", "export store --to features.h5"))
def export(
    store: Annotated[Path, typer.Argument(help="The feature store.", **PLACE)],
    to: Annotated[
        Path, typer.Option(help="FILE.h5, FILE.tar (webdataset), or a folder (an .npy a video and feature).", **PLACE)
    ],
    features: Annotated[str, typer.Option(help="Only these. (default: all that every video has)")] = "",
    split: Annotated[str | None, typer.Option(help="Only train, val or test. (default: every video)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write features for other programs. A .h5 holds all that is known, and imports as the same store."""
    from coldframe.extract.exchange import export_store

    names = split_list(features)
    report = export_store(open_store(store), to, features=names, split=split, overwrite=overwrite, quiet=quiet)
    show(report.to_json(), report.describe(), as_json)


@app.command("import", **about("Make a store of features you already have.", "import features.h5 --store store"))
def import_(
    source: Annotated[Path, typer.Argument(help="FILE.h5, FILE.npz, or a folder of .npy or .npz files.", **PLACE)],
    store: Store,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", "-m", help="Labels and splits, by id or by name of file.", **PLACE)
    ] = None,
    feature: Annotated[
        str | None, typer.Option("--as", help="What the numbers are: embedding, cls.K, tokens.K. (default: embedding)")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="The array, where there are several; . if each array is a video.")
    ] = None,
    ids: Annotated[str | None, typer.Option(help="The array of ids, beside one array of all videos.")] = None,
    labels: Annotated[str | None, typer.Option(help="The array of labels.")] = None,
    classes: Annotated[str | None, typer.Option(help="The array of class names, in the order of labels.")] = None,
    group: Annotated[str | None, typer.Option(help="The array of groups: persons, scenes or sources.")] = None,
    model: Annotated[str | None, typer.Option(help="The open_clip model that made the features, for text.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="Its weights. (default: openai)")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32. (default: as they are)")] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Share of each class drawn for testing; groups stay whole.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a store of cached features: how the arrays lie is found by looking. Resumes by itself."""
    from coldframe.extract.exchange import Reading, import_features

    weights = pretrained or (default_weights(model) if model else None)
    reading = Reading(feature, dataset, ids, labels, classes, group, model, weights, dtype, test_fraction)
    given = None if manifest is None else open_manifest(manifest)
    report = import_features(source, store, reading=reading, manifest=given, quiet=quiet)
    show(report.to_json(), report.describe(), as_json)
    if report.interrupted:
        raise typer.Exit(130)


@app.command(
    "train-head",
    **about("Train a head on cached features.", "train-head evl_decoder --store store --out runs/evl --set epochs=20"),
)
def train_head(
    head: Annotated[str, typer.Argument(help="A head's name; `coldframe heads` lists them.")],
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder: checkpoint, settings, history.", **LOCAL)],
    manifest: ManifestFile = None,
    config: Annotated[
        str | None, typer.Option("--config", help="A recipe: a TOML file, or a name of `coldframe recipes`.")
    ] = None,
    is_short: Annotated[bool, typer.Option("--short", help="The recipe's short form, for the demo's clips.")] = False,
    sets: Annotated[list[str] | None, typer.Option("--set", help="One setting, key=value; may be repeated.")] = None,
    captions: Captions = False,
    templates: Templates = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one head on cached features; the best epoch by validation is kept. Resumes by itself."""
    from coldframe.train_heads import settings, train

    opened = open_store(store)
    asked = settings(head, *recipe_file(config, is_short, sets or []))
    labels = open_manifest(manifest, opened)
    if captions:
        labels = captions_as_classes(labels, ("train", "val"), asked.train.val_fraction, asked.train.seed)
    checkpoint = train(
        opened,
        labels,
        head,
        asked.head,
        asked.train,
        out,
        episodes=asked.episodes,
        templates=templates or "video",
        device=device,
        quiet=quiet,
    )
    show(checkpoint.to_json(), f"{checkpoint.describe()}\nwritten to {out}", as_json)


@app.command(
    "import-checkpoint",
    **about(
        "Make a run of a published checkpoint.",
        "import-checkpoint evl_decoder evl_b16.pth --store store --out runs/evl",
    ),
)
def import_checkpoint(
    system: Annotated[str, typer.Argument(help="The head: evl_decoder, continuous_prompts, ez_clip, m2_clip.")],
    file: Annotated[Path, typer.Argument(help="The authors' file, or safetensors of the same tensors.", **LOCAL)],
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.", **LOCAL)],
    manifest: ManifestFile = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class names in the order of the published labels, one a line.", **LOCAL)
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A setting no tensor tells, key=value.")] = None,
    as_json: Json = False,
) -> None:
    """Take the trained part of a file of the authors' code, compare its CLIP with the store's, write a run.

    Nothing in the file is run as code. Class names come from --classes, or else from the manifest.
    """
    from coldframe.train_heads import import_checkpoint as convert
    from coldframe.train_heads import settings

    opened = open_store(store)
    labels = None if classes else open_manifest(manifest, opened)
    class_names = labels.class_names if labels else read_lines(classes)
    config = settings(system, None, of_the_head(sets or [])).head
    made_for = labels.fingerprint if labels else ""
    checkpoint = convert(system, file, opened, class_names, config, out, made_for)
    show(checkpoint.to_json(), f"{checkpoint.describe()}\nwritten to {out}", as_json)


@app.command(
    "export-checkpoint",
    **about("Write a run as its authors' code reads it.", "export-checkpoint runs/evl --out evl.pth"),
)
def export_checkpoint(
    run: Annotated[Path, typer.Argument(help="A run of train-head.", **LOCAL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file: .safetensors, or of torch.save.", **LOCAL)],
    as_json: Json = False,
) -> None:
    """Write a run under the names of the published system's own checkpoints."""
    from coldframe.train_heads import export_checkpoint as convert
    from coldframe.train_heads import load_checkpoint

    checkpoint = load_checkpoint(run)
    written = convert(checkpoint, out)
    facts = {"head": checkpoint.head, "file": str(out), "tensors": written}
    show(facts, f"{len(written)} tensors of {checkpoint.head} written to {out}", as_json)


@app.command(
    **about(
        "Train many heads and settings side by side.",
        "sweep linear_probe,attentive_pool --store store --out runs/sweep --set lr=1e-2,1e-3,1e-4",
    )
)
def sweep(
    heads: Annotated[str, typer.Argument(help="HEAD, or HEAD,HEAD.")],
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder of runs, one for each combination.", **LOCAL)],
    manifest: ManifestFile = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", help="A recipe: a file, or a name of `coldframe recipes`; a list stands for each item."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Values of one setting, key=value,value; may be repeated.")
    ] = None,
    templates: Templates = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train every combination of the values that are listed, on one pass over the cache: a batch is read once for all.

    Each run ends with the same bits as `train-head` would give it, and resumes by itself. Runs of another seed, batch
    size or episodes have a pass of their own. Memory: the runs lie on the device together, each with its weights, the best
    of them so far, and two moments as large; the activations and gradients are of one run at a time.

    The best is chosen by validation; a run that diverges is reported, and the exit code is then 3.
    """
    from coldframe.train_heads import sweep as train_all
    from coldframe.train_heads import variants

    opened = open_store(store)
    labels, asked = (
        open_manifest(manifest, opened),
        variants(split_list(heads), *recipe_file(config, False, sets or [])),
    )
    report = train_all(opened, labels, asked, out, templates=templates or "video", device=device, quiet=quiet)
    show(report.to_json(), report.describe(), as_json)
    if report.n_diverged:
        raise typer.Exit(3)


@app.command(
    "eval",
    **about("Score a head under a protocol.", "eval few_shot --store store --head prototypes --shot 5"),
)
def evaluate(
    protocol: Annotated[str, typer.Argument(help="closed_set, zero_shot or few_shot.")],
    store: Store,
    manifest: ManifestFile = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A run of train-head.", **LOCAL)] = None,
    head: Annotated[
        str | None, typer.Option(help="A head that needs no training: mean_pool, prototypes, tip_adapter.")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A setting of the untrained head, key=value.")] = None,
    split: Annotated[str, typer.Option(help="The split that is scored.")] = "test",
    captions: Captions = False,
    templates: Templates = None,
    way: Annotated[int | None, typer.Option(help="few_shot: classes an episode. (default: 5)")] = None,
    shot: Annotated[int | None, typer.Option(help="few_shot: support videos a class. (default: 1)")] = None,
    episodes: Annotated[int | None, typer.Option(help="few_shot: episodes. (default: 10000)")] = None,
    query: Annotated[int | None, typer.Option(help="few_shot: queries a class. (default: 1)")] = None,
    episode_list: Annotated[
        Path | None, typer.Option(help="few_shot: episodes drawn before, from the folder episodes/ beside the results.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="few_shot: mean_cosine, otam, bi_mhm. (default: otam)")] = None,
    seed: Annotated[int | None, typer.Option(help="few_shot: of the episodes. (default: 0)")] = None,
    results: Annotated[
        Path,
        typer.Option(
            help="Results are appended here, one JSON line each; episodes/ and details/ go beside it.", **LOCAL
        ),
    ] = Path("results.jsonl"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a head under a protocol; the number comes with n, a 95 % interval and everything that made it."""
    from coldframe.evaluate import evaluate as score

    opened = open_store(store)
    labels = open_manifest(manifest, opened)
    labels = captions_as_classes(labels, (split,)) if captions else labels
    overrides = [*(sets or []), *([f"metric={metric}"] if metric else [])]
    predictor = open_predictor(opened, labels, checkpoint, head, overrides, templates, device)
    given: dict[str, object] = {"n_way": way, "n_shot": shot, "n_query": query, "n_episodes": episodes, "seed": seed}
    given["episodes"] = str(episode_list) if episode_list else None
    settings = {name: value for name, value in given.items() if value is not None}
    result = score(opened, labels, predictor, protocol, settings, results, split=split)
    show(result.to_json(), result.describe(), as_json)


@app.command(**about("Draw where a head looks.", "attention runs/evl --store store --video run/a.mp4 --out looks.png"))
def attention(
    run: Annotated[Path, typer.Argument(help="A run of train-head, of a head with attention: evl_decoder.", **LOCAL)],
    store: Store,
    video: Annotated[str, typer.Option(help="The id of a video of the store.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture: .png, .jpg or .webp.", **LOCAL)],
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw the frames of a video, and below them where each layer of the head looks, in red and yellow."""
    from coldframe.train_heads import load_checkpoint
    from coldframe.train_heads.pictures import draw_attention

    looked = draw_attention(load_checkpoint(run), open_store(store), video, out, device)
    show(looked.to_json(), f"{looked.describe()}\nwritten to {out}", as_json)


@app.command(**about("List the heads and what they need.", "heads"))
def heads(as_json: Json = False) -> None:
    """Every head: what it needs from a store, and where it comes from."""
    from coldframe.train_heads.heads import find, names

    rows = {}
    for name in names():
        spec = find(name)
        rows[name] = {"needs": list(spec.needs(spec.config())), "trained": spec.is_trained, "source": spec.source}
    width = max(map(len, rows))
    lines = [
        f"{name:<{width}}  {', '.join(row['needs'])}\n{'':<{width}}  {row['source']}" for name, row in rows.items()
    ]
    show(rows, "\n".join(lines), as_json)


@app.command(**about("Published results and how to get them.", "recipes evl_k400_b16_8f"))
def recipes(
    name: Annotated[str | None, typer.Argument(help="One of them: its source, its settings, what to type.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes; of one, say what was published where, and the commands from videos to the number."""
    from dataclasses import asdict

    from coldframe.train_heads.recipes import find, names

    if name is None:
        found = [find(each) for each in names()]
        width = max(len(recipe.name) for recipe in found)
        lines = [f"{recipe.name:{width}}  {recipe.title}" for recipe in found]
        show([asdict(recipe) for recipe in found], "\n".join(lines), as_json)
        return
    recipe = find(name)
    published = f"{recipe.hardware}{f', {recipe.minutes:g} minutes' if recipe.minutes else ''}"
    facts = f"{recipe.title}\n  source    {recipe.source}\n  hardware  {published}\n"
    note = f"  differs   {recipe.note}\n" if recipe.note else ""
    show(
        asdict(recipe) | {"commands": recipe.commands()},
        "\n".join([f"{facts}{note}  settings  {recipe.path}", *recipe.commands()]),
        as_json,
    )


@app.command(**about("Print the table of results.", "results results.jsonl"))
def results(
    file: Annotated[Path, typer.Argument(help="The JSON lines that `eval` appended to.")] = Path("results.jsonl"),
    as_json: Json = False,
) -> None:
    """Print the table of every result in a file."""
    from coldframe.evaluate import read_results, table

    found, n_torn = read_results(file)
    if n_torn:
        typer.secho(f"{n_torn} torn lines left out", err=True)
    show([result.to_json() for result in found], table(found), as_json)


@manifests.command("folder", **about("From a folder of videos.", "manifest folder videos/ --out videos.csv"))
def manifest_folder(
    root: Annotated[Path, typer.Argument(help="One sub-folder a class; or train/, val/, test/ above those.", **PLACE)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The manifest to write: .csv or .parquet.", **PLACE)],
    test_fraction: Annotated[float, typer.Option(help="Share of each class for testing, where no test/ exists.")] = 0.2,
    val_fraction: Annotated[float, typer.Option(help="Share of each class for validation.")] = 0.1,
    group_by: Annotated[
        str | None, typer.Option(help="Regular expression over the path; videos of one match stay in one split.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """A manifest of a folder of videos, with seeded, stratified splits."""
    from coldframe.data_manifests import from_folder

    made = from_folder(root, test_fraction=test_fraction, val_fraction=val_fraction, seed=seed, group_by=group_by)
    write_manifest(made, out, as_json)


def add_official(name: str) -> None:
    """Give a data set its command: `coldframe manifest NAME`."""

    def command(
        root: Annotated[Path, typer.Argument(help="The folder of class folders.", **PLACE)],
        lists: Annotated[Path, typer.Option(help="The folder of official lists.")],
        out: Annotated[Path, typer.Option("--out", "-o", help="The manifest to write: .csv or .parquet.", **PLACE)],
        fold: Annotated[int, typer.Option(help="Official fold.")] = 1,
        partial: Annotated[bool, typer.Option("--partial", help="Accept lists that are not complete.")] = False,
        as_json: Json = False,
    ) -> None:
        write_manifest(datasets.find(name).build(root, lists, fold, strict=not partial), out, as_json)

    command.__doc__ = f"A manifest of {name} from its official lists."
    example = f"manifest {name} videos/ --lists lists/ --out {name}.csv"
    manifests.command(name, **about(f"From the official lists of {name}.", example))(command)


for dataset in datasets.names():
    add_official(dataset)


@manifests.command("check", **about("Read a manifest and look for its files.", "manifest check videos.csv"))
def manifest_check(
    file: Annotated[Path, typer.Argument(help="A manifest, or a folder of videos.", **PLACE)], as_json: Json = False
) -> None:
    """Read a manifest as `extract` would, and look for every file it names."""
    made = open_manifest(file)
    missing = made.missing_files()
    facts = {"name": made.name, "videos": len(made.records), "classes": len(made.class_names),
             "fingerprint": made.fingerprint, "missing_files": list(missing)}  # fmt: skip
    listed = "".join(f"\nmissing: {video_id}" for video_id in missing) or "\nevery file is there"
    show(facts, made.describe() + listed, as_json)
    raise typer.Exit(3 if missing else 0)


@app.command(**about("Check this machine and this installation.", "doctor --store store"))
def doctor(
    store: Annotated[
        Path | None, typer.Option("--store", "-s", help="Also check locks and disk of this folder; nothing is kept.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Versions, decoders, GPUs, limits, and a self-test against open_clip: what to paste into a report of a bug.

    The exit code is 3 if anything failed that extraction needs.
    """
    from coldframe.extract.doctor import examine

    found = examine(store)
    show(found.to_json(), found.describe(), as_json)
    if not found.is_fit:
        raise typer.Exit(3)


@app.command(**about("See it work: no data, GPU or network.", "demo --out demo"))
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Everything goes here.", **LOCAL)] = Path("demo"),
    clips: Annotated[int, typer.Option(help="Clips of each motion class.", min=40)] = 60,
    systems: Annotated[
        bool, typer.Option("--systems", help="Also train the published systems, for unseen classes and few shots too.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Draw a small video set, extract it, train heads, evaluate: the whole program on one screen.

    The clips are real H.264 files of moving shapes. The motion classes show the same places in another order, so that a
    head that averages frames cannot tell them apart.
    """
    lists = draw_demo(out, clips, quiet)
    store, table, flag = out / "store", out / "results.jsonl", " --quiet" if quiet else ""
    table.unlink(missing_ok=True)
    trained = ("linear_probe", "temporal_transformer", "evl_decoder")
    needed = f"--for mean_pool,{','.join(trained)}"
    needed += " --features tokens.2,summary.-2" if systems else ""
    run_line(f"extract {lists['motion']} --store {store} --model coldframe-tiny {needed}{flag}")

    def score(protocol: str, data: str, what: str) -> None:
        run_line(f"eval {protocol} --store {store} --manifest {lists[data]} {what} --results {table}")

    def train(head: str, data: str, sets: str) -> str:
        run = out / "runs" / f"{head}-{data}"
        options = "".join(f" --set {each}" for each in sets.split())
        run_line(f"train-head {head} --store {store} --manifest {lists[data]} --out {run}{options}{flag}")
        return f"--checkpoint {run}"

    score("closed_set", "motion", "--head mean_pool")
    for head in trained:
        score("closed_set", "motion", train(head, "motion", f"epochs={12 if head == 'evl_decoder' else 30}"))
    score("zero_shot", "shape", "--head mean_pool --templates photo")
    for shot in (1, 5):
        score("few_shot", "shape", f"--head prototypes --shot {shot}")
    if systems:
        for head, sets in DEMO_SYSTEMS.items():
            score("closed_set", "motion", train(head, "motion", sets))
        score("zero_shot", "novel", "--head mean_pool")
        for head, sets in DEMO_SYSTEMS.items():
            score("zero_shot", "novel", train(head, "base", sets))
        score("few_shot", "held", "--head prototypes --metric mean_cosine --way 4")
        score("few_shot", "held", "--head prototypes --way 4")
        for head, sets in DEMO_FEW_SHOT.items():
            score("few_shot", "held", f"{train(head, 'held', sets)} --way 4")
    run_line(f"results {table}")


# What the published systems are trained with on the demo's clips: the two upper blocks of four, from their tokens.
DEMO_SYSTEMS = {
    "continuous_prompts": "prefix=4 postfix=4 lr=1e-3 epochs=30 batch_size=16",
    "ez_clip": "reach=-2 compact=true lr=5e-3 epochs=150 batch_size=16 drop_path=0 prompt_dropout=0",
    "m2_clip": "reach=2 width=64 lr=1e-3 epochs=20 batch_size=16",
}
DEMO_FEW_SHOT = {
    "trx": "n_way=4 n_query=1 epochs=2",
    "clip_fsar": "n_way=4 n_query=1 epochs=2",
    "ma_clip": "reach=-1 alpha=0.1 n_way=4 n_query=1 epochs=5",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; a user's mistake ends in one line and exit code 2."""
    # torch's threads would spin while they wait for each other, on cores that the decode workers need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        sys.exit(app(args=words, prog_name="coldframe", standalone_mode=False) or 0)
    except ColdframeError as error:
        fail(str(error), words)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno not in DISK):
            raise  # nothing that names a file of the user's: a bug of ours
        fail(f"{error.strerror}: {error.filename or 'while writing'}", words)
    except Exception as error:  # what typer says of words that it does not know; releases differ in where its class is
        if not hasattr(error, "format_message"):
            raise
        said: Any = error
        if not words:
            typer.echo(said.format_message())
            sys.exit(2)
        fail(
            f"{said.format_message().rstrip('.')}. See: {said.ctx.command_path if said.ctx else 'coldframe'} --help",
            words,
        )


def draw_demo(out: Path, clips: int, quiet: bool) -> dict[str, Path]:
    """Write the demo's clips, and manifests of them: labelled by motion or by shape, all or a part of the classes."""
    from coldframe.data_manifests import Manifest, VideoRecord
    from coldframe.data_manifests.drawn import BASE_EVENTS, HELD_MOTIONS, MOTIONS, NOVEL_EVENTS, SHAPES, plan_clips
    from coldframe.extract.frames import write_video
    from coldframe.extract.progress import Progress

    plan = plan_clips(clips)
    with Progress(len(plan), "clips drawn", quiet=quiet) as progress:
        for clip in plan:
            if not (out / "videos" / clip.path).exists():
                write_video(out / "videos" / clip.path, clip.draw(), fps=12)
            progress.update()

    def write(name: str, classes: Sequence[str], label: str, split: Callable[[Any], str]) -> Path:
        records = [
            VideoRecord(clip.path, clip.path, classes.index(getattr(clip, label)), split(clip))
            for clip in plan
            if getattr(clip, label) in classes
        ]
        path = out / f"{name}.csv"
        Manifest(name, str((out / "videos").resolve()), tuple(classes), tuple(records)).write(path)
        return path

    return {
        "motion": write("motion", MOTIONS, "motion", lambda clip: clip.split),
        "shape": write("shape", SHAPES, "shape", lambda clip: clip.split),
        "base": write("base", BASE_EVENTS, "event", lambda clip: "train" if clip.split == "test" else clip.split),
        "novel": write("novel", NOVEL_EVENTS, "event", lambda clip: "test"),
        "held": write("held", MOTIONS, "motion", lambda clip: "test" if clip.motion in HELD_MOTIONS else "train"),
    }


def run_line(line: str) -> None:
    """Show a command as a user would type it, and run it in this process."""
    typer.secho(f"\n$ coldframe {line}", bold=True)
    code = app(shlex.split(line), standalone_mode=False)
    if code:
        raise typer.Exit(code)


def show(facts: object, text: str, as_json: bool) -> None:
    """Print one JSON object for programs, or text for people."""
    typer.echo(json.dumps(facts, indent=2, default=str) if as_json else text)


def fail(line: str, words: Sequence[str]) -> NoReturn:
    """One line on standard error, and where JSON was asked for an object that says the same; then exit code 2."""
    if "--json" in words:
        typer.echo(json.dumps({"error": line}))
    typer.secho(f"error: {line}", fg="red", err=True)
    sys.exit(2)


def extract_on_devices(asked: Extraction, store: Path, as_json: bool, quiet: bool) -> int:
    """Run this very command once for each device, on parts of the videos; gives the exit code."""
    from coldframe.extract.fleet import run_fleet, split_devices
    from coldframe.extract.leases import Part
    from coldframe.extract.workers import cores

    names = split_devices(asked.device)
    share = [] if asked.workers else ["--workers", str(max(1, cores() // len(names)))]
    command = [sys.executable, "-m", "coldframe.cli", *sys.argv[1:], *share]
    report, code = run_fleet(command, names, store, Part.parse(asked.shard), quiet=quiet)
    show(report.to_json(), report.describe(), as_json)
    return code


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which is what schedulers send, end a run as Ctrl-C does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def wanted_features(features: str, heads: str) -> list[str]:
    """The union of the features named and of what the named heads need."""
    from coldframe.train_heads.heads import find

    wanted = split_list(features)
    for head in split_list(heads):
        spec = find(head)
        wanted += spec.features(spec.config())
    return wanted or ["embedding", "cls.-1"]


def recipe_file(config: str | None, is_short: bool, sets: list[str]) -> tuple[Path | None, list[str]]:
    """The file that --config means, a recipe's where no such file is there, and the settings that go over it."""
    from coldframe.train_heads.recipes import find

    if config is None and is_short:
        raise ConfigError(
            "--short is the short form of a recipe", fix="Name the recipe: --config, of `coldframe recipes`."
        )
    if config is None:
        return None, sets
    is_file = Path(config).exists() or Path(config).name != config or config.endswith(".toml")
    if is_file and not is_short:
        return Path(config), sets
    recipe = find(config)
    return recipe.path, [*(recipe.short_sets if is_short else []), *sets]


def read_lines(file: Path | None) -> tuple[str, ...]:
    """The lines of a text file that are not blank."""
    assert file is not None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text") from error
    return tuple(line.strip() for line in lines if line.strip())


def split_list(text: str) -> list[str]:
    """The comma-separated parts of an option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def open_manifest(path: Path | None, store: FeatureStore | None = None) -> Manifest:
    """A manifest from its file or from a folder of videos; without either, the one inside the store."""
    from coldframe.data_manifests import Manifest, from_folder

    if path is None and store is not None:
        return store.manifest
    if path is not None and not is_local(path):
        return Manifest.read(path) if path.suffix in (".csv", ".parquet") else from_folder(path)
    if path is None or not (path.is_dir() or path.is_file()):
        raise ConfigError("no such folder or manifest", seen=path, fix="Name a folder of videos, a .csv or a .parquet.")
    return from_folder(path) if path.is_dir() else Manifest.read(path)


def frames_for(store: Path, asked: Extraction) -> FrameSpec:
    """The frames asked for; what contradicts itself is refused with the settings of the store, if it is there."""
    try:
        return asked.frame_spec()
    except ConfigError as error:
        from coldframe.extract.specs import IMPORTED

        try:
            opened = open_store(store)
        except ColdframeError:
            raise error from None
        if opened.spec.frames.sampling == IMPORTED:
            raise
        command = opened.extract_command(opened.features, draws=max(asked.draws, opened.spec.frames.draws))
        raise ConfigError(str(error), fix=f"To go on with {store}: {command}") from None


def open_store(path: Path) -> FeatureStore:
    """The feature store at `path`."""
    from coldframe.extract import FeatureStore

    return FeatureStore.open(path)


def open_predictor(
    store: FeatureStore, labels: Manifest, checkpoint: Path | None, head: str | None,
    sets: Sequence[str], templates: str | None, device: str,
) -> Predictor:  # fmt: skip
    """A trained head from its checkpoint, or one that needs no training."""
    from coldframe.train_heads import load_checkpoint, settings, untrained

    if checkpoint is not None and not (head or sets or templates):
        return load_checkpoint(checkpoint).predictor(store, labels.class_names, device)
    if checkpoint is None and head is not None:
        config = settings(head, None, of_the_head(sets)).head
        return untrained(store, labels.class_names, head, config, templates=templates or "video", device=device)
    if checkpoint is not None and head is None:
        raise ConfigError(
            "a run knows its settings", fix="--metric, --set and --templates are for --head NAME; leave them away here."
        )
    raise ConfigError(
        "eval scores one head",
        fix="Give either --checkpoint RUN, which knows its settings, or --head NAME with --metric, --set, --templates.",
    )


def of_the_head(sets: Sequence[str]) -> list[str]:
    """Assignments where only settings of the head have a meaning."""
    return [f"head.{assignment.removeprefix('head.')}" for assignment in sets]


def default_weights(model: str) -> str | None:
    """OpenAI's, unless the model ships its own."""
    return None if model == "coldframe-tiny" else "openai"


def default_precision(device: str) -> str:
    """Half precision where it is faster; the processor has no use for it."""
    import torch

    return "fp16" if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()) else "fp32"


def write_manifest(manifest: Manifest, out: Path, as_json: bool) -> None:
    """Write a manifest and say what is in it."""
    manifest.write(out)
    facts = {"out": str(out), "videos": len(manifest.records), "classes": len(manifest.class_names),
             "fingerprint": manifest.fingerprint}  # fmt: skip
    show(facts, f"{manifest.describe()}\nwritten to {out}", as_json)


if __name__ == "__main__":
    main()
