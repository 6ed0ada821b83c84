"""Zero-shot: the classes are given by their names alone, none of their videos was trained on.

The predictor was built for the manifest's classes: names × templates through the text tower.

Source: CLIP, Radford et al. 2021, arXiv:2103.00020, §3.1; for videos, ActionCLIP, Wang et al. 2021, arXiv:2109.08472.
Differs: nothing is refused for having seen a class in training, but the result says how many were.
"""

from __future__ import annotations

from dataclasses import replace

from ...data_manifests.errors import ConfigError
from ..predictors import Classifier
from . import Outcome, ProtocolSpec, Videos, closed_set, n_seen


def run(predictor: Classifier, videos: Videos, config: closed_set.Config) -> Outcome:
    """Score every video against the names of the manifest's classes.

    Raises:
        ConfigError: the head does not read class names.
        SpecMismatch: it was built for other classes.
    """
    if not predictor.uses_class_names:
        raise ConfigError(
            f"zero_shot tells classes by their names, which {predictor.head} does not read",
            fix="Use a head that needs text, such as mean_pool, or the protocol closed_set.",
        )
    outcome = closed_set.run(predictor, videos, config)
    class_names = videos.manifest.class_names
    seen = n_seen(predictor.seen_classes, class_names)
    notes = (f"not zero-shot: videos of {seen} of the {len(class_names)} classes were trained on",) if seen else ()
    setting = f"{seen} of {len(class_names)} classes seen in training" if seen else "no class seen in training"
    return replace(outcome, setting=setting, notes=outcome.notes + notes)


PROTOCOL = ProtocolSpec(
    config=closed_set.Config,
    run=run,
    task="classify",
    headline="top_1",
    source="Radford et al. 2021, arXiv:2103.00020, §3.1",
)
