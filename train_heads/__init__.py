"""Stage 2: frozen features → light heads.

    pipeline.py   the stage, top-down              heads/         one head, one file
    settings.py   TOML and --set → settings        specs.py       what heads declare and return; TrainSpec
    build.py      store + head's name → head       layers.py, losses.py, layouts.py: what two or more heads share
    loop.py       fit(): one plain loop            alignment.py, token_functions.py, reach.py: likewise
    run.py        one head in training             training_data.py, episodic.py: what is trained on
    optim.py      AdamW, learning rate             run_folder.py, checkpoint.py: what is on disk
    sweep.py      many settings side by side       predictor.py, pictures.py: a head at work, where it looked
    official.py   checkpoints of the authors' code recipes/       published results as settings

Evaluation is a stranger to this stage: `Predictor` fits what it asks for, and cli.py joins the two.
"""

from __future__ import annotations

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint
from .loop import fit
from .official import export_checkpoint, import_checkpoint
from .pipeline import Job, train, train_together, untrained
from .predictor import Predictor
from .run import DivergedError, Run
from .settings import Settings, settings, variants
from .specs import ClassifierHead, EpisodeHead, Episodes, EpisodeTraining, HeadContext, HeadOutput, HeadSpec, TrainSpec
from .sweep import SweepReport, sweep

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ClassifierHead",
    "DivergedError",
    "EpisodeHead",
    "EpisodeTraining",
    "Episodes",
    "HeadContext",
    "HeadOutput",
    "HeadSpec",
    "Job",
    "Predictor",
    "Run",
    "Settings",
    "SweepReport",
    "TrainSpec",
    "export_checkpoint",
    "fit",
    "import_checkpoint",
    "load_checkpoint",
    "settings",
    "sweep",
    "train",
    "train_together",
    "untrained",
    "variants",
]
