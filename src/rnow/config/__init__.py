"""config.yml -> Config: strict types, overrides, suggestions, each fault at its line. No torch."""

from rnow.config.load import (
    Config,
    LoadedConfig,
    config_for,
    find_config_file,
    has_config,
    load_config,
)
from rnow.config.names import fill_name
from rnow.config.normalise import full_address
from rnow.config.output import config_hash, dump_yaml, split_by_default, to_dict, to_yaml
from rnow.config.overrides import SHORTHANDS
from rnow.config.schema import (
    AlgorithmSection,
    DataSection,
    DatasetSource,
    EvalEntry,
    EvaluationSection,
    ModelSection,
    RolloutSection,
    SamplerSection,
    TeacherSection,
    TrainerSection,
    is_key,
)

__all__ = [
    "SHORTHANDS",
    "AlgorithmSection",
    "Config",
    "DataSection",
    "DatasetSource",
    "EvalEntry",
    "EvaluationSection",
    "LoadedConfig",
    "ModelSection",
    "RolloutSection",
    "SamplerSection",
    "TeacherSection",
    "TrainerSection",
    "config_for",
    "config_hash",
    "dump_yaml",
    "fill_name",
    "find_config_file",
    "full_address",
    "has_config",
    "is_key",
    "load_config",
    "split_by_default",
    "to_dict",
    "to_yaml",
]
