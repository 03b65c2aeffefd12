"""Evaluators: a model in, a dict of numbers out. The training loop and `pe-jax evaluate` run the same ones."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import ml_collections

from pe_jax.evals.analysis import Analysis
from pe_jax.evals.correspondence import Correspondence
from pe_jax.evals.depth import Depth
from pe_jax.evals.inference import Model
from pe_jax.evals.probes import KNN, Attention, Linear, Logistic
from pe_jax.evals.retrieval import Retrieval
from pe_jax.evals.segmentation import Segmentation
from pe_jax.evals.tracking import Tracking
from pe_jax.evals.video import VideoRetrieval, VideoZeroShot
from pe_jax.evals.vlm import Answers, Speaker
from pe_jax.evals.zero_shot import ZeroShot

__all__ = [
    "KNN",
    "Analysis",
    "Answers",
    "Attention",
    "Correspondence",
    "Depth",
    "Evaluator",
    "Linear",
    "Logistic",
    "Retrieval",
    "Segmentation",
    "Tracking",
    "VideoRetrieval",
    "VideoZeroShot",
    "ZeroShot",
    "check",
    "create",
    "fields",
]

_EVALUATORS: dict[str, type[Any]] = {
    "zero_shot": ZeroShot,
    "knn": KNN,
    "linear": Linear,
    "logistic": Logistic,
    "attention": Attention,
    "retrieval": Retrieval,
    "video_zero_shot": VideoZeroShot,
    "video_retrieval": VideoRetrieval,
    "segmentation": Segmentation,
    "depth": Depth,
    "tracking": Tracking,
    "correspondence": Correspondence,
    "analysis": Analysis,
    "vlm": Answers,
}
_OF_THE_LOOP = ("name", "every_steps")  # when to run it is the training loop's business


@runtime_checkable
class Evaluator(Protocol):
    """Scores a model, whose parameters may lie on any mesh; every process calls it and gets the same numbers.

    "vlm" wants a model that answers (`pe_jax.assistant`), all others a tower, alone or with its text tower.
    """

    def __call__(self, model: Model | Speaker) -> dict[str, float]: ...


def fields(name: str) -> tuple[str, ...]:
    """The fields that an evaluator's config may have, besides `name`.

    Raises:
      ValueError: for an unknown evaluator, naming its nearest neighbour.
    """
    if name not in _EVALUATORS:
        near = difflib.get_close_matches(name, _EVALUATORS, 1, 0.3)
        raise ValueError(f"evaluator name={name!r} is unknown; did you mean {' or '.join(near or _EVALUATORS)}?")
    return tuple(field.name for field in dataclasses.fields(_EVALUATORS[name]))


def check(config: Mapping[str, Any]) -> None:
    """Raises a ValueError for an unknown evaluator or field, naming its nearest neighbour; one may lack."""
    name = str(config.get("name"))
    known = fields(name)
    for field in config:
        if field not in known and field not in _OF_THE_LOOP:
            near = difflib.get_close_matches(field, known, 1, 0.3)
            raise ValueError(f"evaluator {name!r} has no field {field!r}; did you mean {' or '.join(near or known)}?")


def create(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Evaluator:
    """The evaluator that `{"name": "zero_shot", "data": ..., ...}` asks for; `every_steps` is allowed and not read.

    Raises:
      ValueError: for an unknown evaluator or field, naming its nearest neighbour, or a wrong value.
    """
    given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    check(given)
    evaluator = _EVALUATORS[given["name"]]
    for field in dataclasses.fields(evaluator):
        defaults = (field.default, field.default_factory)
        if all(default is dataclasses.MISSING for default in defaults) and field.name not in given:
            raise ValueError(f"evaluator {given['name']!r} lacks {field.name!r}; add it to its config.")
    return evaluator(**{name: value for name, value in given.items() if name not in _OF_THE_LOOP})
