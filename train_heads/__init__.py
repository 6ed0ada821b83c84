"""Stage 2: frozen features → light heads.

    pipeline.py   the stage, top-down              heads/         one head, one file
    settings.py   TOML and --set → settings        layers.py      pieces that two or more heads share
    build.py      store + head's name → head       alignment.py   temporal metrics of few-shot recognition
    loop.py       fit(): one plain loop            specs.py       what heads declare and return; TrainSpec
    optim.py      AdamW, learning rate             checkpoint.py  a trained head in a folder
    predictor.py  a head at work                   episodic.py    few-shot episodes to train on

Evaluation is a stranger to this stage: `Predictor` fits what it asks for, and cli.py joins the two.
"""

from __future__ import annotations

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint
from .loop import DivergedError, fit
from .pipeline import train, untrained
from .predictor import Predictor
from .settings import settings
from .specs import ClassifierHead, EpisodeHead, Episodes, EpisodeTraining, HeadContext, HeadOutput, HeadSpec, TrainSpec

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
    "Predictor",
    "TrainSpec",
    "fit",
    "load_checkpoint",
    "settings",
    "train",
    "untrained",
]
