"""The run's configuration: one typed definition (`schema`), read from YAML and `key=value` overrides (`load`), held against the model
and the world size before anything starts (`rules`)."""

from megatron_antisd.config.load import build_config, dump_config, known_keys, load_config
from megatron_antisd.config.reliability import CheckpointConfig, HealthConfig, SupervisionConfig
from megatron_antisd.config.schema import (
    DEFAULT_PRIVILEGED_TEMPLATE,
    AlgorithmConfig,
    BenchmarkConfig,
    DataConfig,
    DebugConfig,
    EvaluationConfig,
    GateConfig,
    GradingConfig,
    LoggingConfig,
    PrivilegedConfig,
    ProfileConfig,
    RolloutConfig,
    RunConfig,
    RunSection,
)
from megatron_antisd.config.training import (
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Section,
    TrainerConfig,
)

__all__ = [
    "DEFAULT_PRIVILEGED_TEMPLATE",
    "AlgorithmConfig",
    "BenchmarkConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DebugConfig",
    "EvaluationConfig",
    "GateConfig",
    "GradingConfig",
    "HealthConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrivilegedConfig",
    "ProfileConfig",
    "RolloutConfig",
    "RunConfig",
    "RunSection",
    "Section",
    "SupervisionConfig",
    "TrainerConfig",
    "build_config",
    "dump_config",
    "known_keys",
    "load_config",
]
