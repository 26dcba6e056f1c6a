"""How good are the pictures? Figures and reports that compare contenders on the same prompts and seeds.

`evaluate` takes callables and arrays and never asks where they come from: a contender is anything that turns prompts
and seeds into pictures, a feature network anything that turns pictures into vectors.
"""

from __future__ import annotations

from onestill.evaluate.alignment import clip_scores, feature_diversity, pixel_diversity, retrieval_hits, style_hits
from onestill.evaluate.colour import ColourTest, ColourVerdict, colour_accuracy, named_colour
from onestill.evaluate.measure import Figure, Result
from onestill.evaluate.networks import load_network
from onestill.evaluate.pipelines import name_at, pipeline_contender
from onestill.evaluate.protocol import Contender, Network, Protocol
from onestill.evaluate.run import Evaluation, evaluate, frechet_ratio
from onestill.evaluate.statistics import FeatureStatistics, density_and_coverage, frechet_distance, kernel_distance
from onestill.evaluate.weights import fingerprint

__all__ = [
    "ColourTest",
    "ColourVerdict",
    "Contender",
    "Evaluation",
    "FeatureStatistics",
    "Figure",
    "Network",
    "Protocol",
    "Result",
    "clip_scores",
    "colour_accuracy",
    "density_and_coverage",
    "evaluate",
    "feature_diversity",
    "fingerprint",
    "frechet_distance",
    "frechet_ratio",
    "kernel_distance",
    "load_network",
    "name_at",
    "named_colour",
    "pipeline_contender",
    "pixel_diversity",
    "retrieval_hits",
    "style_hits",
]
