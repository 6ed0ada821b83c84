"""The program: `coldframe COMMAND`, or `python cli.py COMMAND`. Parse, call one pipeline, print.

Exit codes: 0 done · 2 a mistake that the user can mend (one line says how) · 3 done, but some videos failed ·
130 interrupted, and the same command goes on.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from coldframe.data_manifests import datasets
from coldframe.data_manifests.errors import ColdframeError, ConfigError
from coldframe.data_manifests.locations import is_local, is_url, location

if TYPE_CHECKING:
    from coldframe.data_manifests import Manifest
    from coldframe.extract import FeatureStore
    from coldframe.train_heads import Predictor

HELP = """Freeze CLIP features of your videos once; train light temporal heads on them in minutes; evaluate.

\b
  coldframe demo                                              see it work: no data, no GPU, no network
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

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def path(text: str) -> Path:
    """A path or a URL, of whose slashes pathlib would keep one."""
    try:
        return location(text)
    except ConfigError as error:
        fail(str(error))  # of a ValueError typer shows no text


def local_path(text: str | Path) -> Path:
    """A path of this machine; a default is a path already."""
    if is_url(str(text)):  # pathlib would make a folder named `s3:` of it
        fail(f"runs and results are local: found {text}, expected a folder or file of this machine")
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


@app.command(
    **about(
        "Cache the features of every video.",
        "extract videos/ --store store --for evl_decoder",
    )
)
def extract(
    videos: Annotated[
        Path,
        typer.Argument(
            help="A folder with one sub-folder a class, or a manifest (.csv, .parquet); or the URL of either.", **PLACE
        ),
    ],
    store: Store,
    model: Annotated[str, typer.Option(help="An open_clip model, or coldframe-tiny.")] = "ViT-B-16-quickgelu",
    pretrained: Annotated[
        str | None, typer.Option(help="A pretrained tag, a weights file, or `random`. (default: openai)")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames a video, at the centres of equal segments.")] = 8,
    heads: Annotated[str, typer.Option("--for", help="Store what these heads need: HEAD,HEAD.")] = "",
    features: Annotated[
        str,
        typer.Option(
            help="Store these: embedding, pixels, cls.K, tokens.K (K counts blocks; -1 is the last). "
            "(default: embedding,cls.-1)"
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    precision: Annotated[
        str | None, typer.Option(help="Arithmetic of the tower. (default: fp16 on cuda, else fp32)")
    ] = None,
    device: Device = "auto",
    decoder: Annotated[str, typer.Option(help="auto, decord or pyav.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Decode processes. (default: one a core)", min=1)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which one video's decoding is killed.")] = 60.0,
    shard_videos: Annotated[
        int | None, typer.Option(help="Videos to a shard: what a killed run loses. (default: by their size)", min=1)
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed in an earlier run.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decode every video once, run the frozen CLIP tower over it, and cache its features. Resumes by itself.

    A broken video is counted and explained, and the run goes on; the exit code is then 3.
    """
    from coldframe.extract import FeatureSpec, FrameSpec, load_tower
    from coldframe.extract import extract as extract_features

    wanted = wanted_features(features, heads)  # before the tower, whose weights may have to be fetched
    manifest = open_manifest(videos)
    tower = load_tower(model, pretrained or default_weights(model), precision or default_precision(device), device)
    spec = FeatureSpec(FrameSpec(frames, decoder=decoder), tower.spec, dtype)
    report = extract_features(
        manifest,
        store,
        tower=tower,
        spec=spec,
        features=wanted,
        workers=workers or cores(),
        timeout_s=timeout,
        shard_videos=shard_videos,
        retry_failed=retry_failed,
        quiet=quiet,
    )
    show(report.to_json(), report.describe(), as_json)
    if report.interrupted or report.n_failed:
        raise typer.Exit(130 if report.interrupted else 3)


@app.command(**about("What is in a store.", "inspect store --json"))
def inspect(
    store: Annotated[Path, typer.Argument(help="The feature store.", **PLACE)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Hold every byte to its checksum; exit code 3 if any is bad.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What is in a store: tower, sampling, features and their size, videos, and what failed and why."""
    opened = open_store(store)
    facts, text = opened.stats(), opened.describe()
    if verify:
        facts["damaged"] = opened.bad_videos()
        text += "".join(
            f"\n  damaged  {video_id}: {', '.join(arrays)}" for video_id, arrays in facts["damaged"].items()
        )
        n_bad = len(facts["damaged"])
        text += f"\n  checksums of {len(opened.ids) - n_bad:,} videos agree, of {n_bad:,} do not"
    show(facts, text, as_json)
    if facts.get("damaged"):
        raise typer.Exit(3)


@app.command(
    "train-head",
    **about("Train a head on cached features.", "train-head evl_decoder --store store --out runs/evl --set epochs=20"),
)
def train_head(
    head: Annotated[str, typer.Argument(help="A head's name; `coldframe heads` lists them.")],
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder: checkpoint, settings, history.", **LOCAL)],
    manifest: ManifestFile = None,
    config: Annotated[Path | None, typer.Option("--config", help="A recipe: TOML with [head] and [train].")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="One setting, key=value; may be repeated.")] = None,
    templates: Templates = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one head on cached features; the best epoch by validation is kept. Resumes by itself."""
    from coldframe.train_heads import settings, train

    opened = open_store(store)
    head_config, train_spec = settings(head, config, sets or [])
    checkpoint = train(
        opened,
        open_manifest(manifest, opened),
        head,
        head_config,
        train_spec,
        out,
        templates=templates or "video",
        device=device,
        quiet=quiet,
    )
    show(checkpoint.to_json(), f"{checkpoint.describe()}\nwritten to {out}", as_json)


@app.command(
    "eval",
    **about("Score a head under a protocol.", "eval few_shot --store store --head prototypes --shot 5"),
)
def evaluate(
    protocol: Annotated[str, typer.Argument(help="closed_set, zero_shot or few_shot.")],
    store: Store,
    manifest: ManifestFile = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A run of train-head.", **LOCAL)] = None,
    head: Annotated[str | None, typer.Option(help="A head that needs no training: mean_pool, prototypes.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A setting of the untrained head, key=value.")] = None,
    split: Annotated[str, typer.Option(help="The split that is scored.")] = "test",
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
    overrides = [*(sets or []), *([f"metric={metric}"] if metric else [])]
    predictor = open_predictor(opened, labels, checkpoint, head, overrides, templates, device)
    given: dict[str, object] = {"n_way": way, "n_shot": shot, "n_query": query, "n_episodes": episodes, "seed": seed}
    given["episodes"] = str(episode_list) if episode_list else None
    settings = {name: value for name, value in given.items() if value is not None}
    result = score(opened, labels, predictor, protocol, settings, results, split=split)
    show(result.to_json(), result.describe(), as_json)


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


@app.command(**about("See it work: no data, GPU or network.", "demo --out demo"))
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Everything goes here.", **LOCAL)] = Path("demo"),
    clips: Annotated[int, typer.Option(help="Clips of each motion class.", min=40)] = 60,
    quiet: Quiet = False,
) -> None:
    """Draw a small video set, extract it, train heads, evaluate: the whole program on one screen.

    The clips are real H.264 files of moving shapes. The motion classes show the same places in another order, so that a
    head that averages frames cannot tell them apart.
    """
    motion, shape = draw_demo(out, clips, quiet)
    store, table = out / "store", out / "results.jsonl"
    table.unlink(missing_ok=True)
    trained = ("linear_probe", "temporal_transformer", "evl_decoder")
    flag = " --quiet" if quiet else ""
    run_line(f"extract {motion} --store {store} --model coldframe-tiny --for mean_pool,{','.join(trained)}{flag}")
    run_line(f"eval closed_set --store {store} --manifest {motion} --head mean_pool --results {table}")
    for head in trained:
        epochs = 12 if head == "evl_decoder" else 30
        options = f"--manifest {motion} --out {out / 'runs' / head} --set epochs={epochs}{flag}"
        run_line(f"train-head {head} --store {store} {options}")
        run_line(
            f"eval closed_set --store {store} --manifest {motion} --checkpoint {out / 'runs' / head} --results {table}"
        )
    run_line(f"eval zero_shot --store {store} --manifest {shape} --head mean_pool --templates photo --results {table}")
    for shot in (1, 5):
        run_line(f"eval few_shot --store {store} --manifest {shape} --head prototypes --shot {shot} --results {table}")
    run_line(f"results {table}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; a user's mistake ends in one line and exit code 2."""
    # torch's threads would spin while they wait for each other, on cores that the decode workers need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=arguments, prog_name="coldframe")
    except ColdframeError as error:
        fail(str(error))
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno not in DISK):
            raise  # nothing that names a file of the user's: a bug of ours
        fail(f"{error.strerror}: {error.filename or 'while writing'}")


def draw_demo(out: Path, clips: int, quiet: bool) -> tuple[Path, Path]:
    """Write the demo's clips, and two manifests of them: one labels by motion, the other by shape."""
    from coldframe.data_manifests import Manifest, VideoRecord
    from coldframe.data_manifests.drawn import MOTIONS, SHAPES, plan_clips
    from coldframe.extract.frames import write_video
    from coldframe.extract.progress import Progress

    plan = plan_clips(clips)
    with Progress(len(plan), "clips drawn", quiet=quiet) as progress:
        for clip in plan:
            if not (out / "videos" / clip.path).exists():
                write_video(out / "videos" / clip.path, clip.draw(), fps=12)
            progress.update()
    for name, classes, label in (("motion", MOTIONS, lambda c: c.motion), ("shape", SHAPES, lambda c: c.shape)):
        records = tuple(VideoRecord(clip.path, clip.path, classes.index(label(clip)), clip.split) for clip in plan)
        Manifest(name, str((out / "videos").resolve()), tuple(classes), records).write(out / f"{name}.csv")
    return out / "motion.csv", out / "shape.csv"


def run_line(line: str) -> None:
    """Show a command as a user would type it, and run it in this process."""
    typer.secho(f"\n$ coldframe {line}", bold=True)
    code = app(shlex.split(line), standalone_mode=False)
    if code:
        raise typer.Exit(code)


def show(facts: object, text: str, as_json: bool) -> None:
    """Print one JSON object for programs, or text for people."""
    typer.echo(json.dumps(facts, indent=2, default=str) if as_json else text)


def fail(line: str) -> NoReturn:
    """One line on standard error, then exit code 2."""
    typer.secho(f"error: {line}", fg="red", err=True)
    sys.exit(2)


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wanted_features(features: str, heads: str) -> list[str]:
    """The union of the features named and of what the named heads need."""
    from coldframe.train_heads.heads import find

    wanted = split_list(features)
    for head in split_list(heads):
        spec = find(head)
        wanted += spec.features(spec.config())
    return wanted or ["embedding", "cls.-1"]


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
        config, _ = settings(head, None, [f"head.{assignment.removeprefix('head.')}" for assignment in sets])
        return untrained(store, labels.class_names, head, config, templates=templates or "video", device=device)
    raise ConfigError(
        "eval scores one head",
        fix="Give either --checkpoint RUN, which knows its settings, or --head NAME with --metric, --set, --templates.",
    )


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
