"""The schema of a recipe, and the one way from YAML and dotted overrides to a checked value."""

from deit_kd.config.distill import Distill, TermSection, as_schedule, in_words
from deit_kd.config.effects import ANSWERS, FIT, NOTHING, VIEWS
from deit_kd.config.keys import differences, effects, flat, in_keys_of, keys_of, keys_that_change, known_keys
from deit_kd.config.parser import (
    as_options,
    build_parser,
    in_todays_values,
    parse_config,
    read_options,
    read_recipe,
    recorded_recipe,
)
from deit_kd.config.peers import PeerSection, described, names_of_peers, recipe_of_peer
from deit_kd.config.recipe import Config
from deit_kd.config.sections import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Data,
    Fit,
    Guide,
    GuideAsTeacher,
    SoleTeacher,
    StudentSection,
    TeacherNetwork,
    TeacherSection,
)

__all__ = [
    "ANSWERS",
    "FIT",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NOTHING",
    "VIEWS",
    "Config",
    "Data",
    "Distill",
    "Fit",
    "Guide",
    "GuideAsTeacher",
    "PeerSection",
    "SoleTeacher",
    "StudentSection",
    "TeacherNetwork",
    "TeacherSection",
    "TermSection",
    "as_options",
    "as_schedule",
    "build_parser",
    "described",
    "differences",
    "effects",
    "flat",
    "in_keys_of",
    "in_todays_values",
    "in_words",
    "keys_of",
    "keys_that_change",
    "known_keys",
    "names_of_peers",
    "parse_config",
    "read_options",
    "read_recipe",
    "recipe_of_peer",
    "recorded_recipe",
]
