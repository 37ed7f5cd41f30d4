"""The configuration: a frozen schema, loading it from YAML, and telling what is wrong with it by its path."""

from recsys.config.dialect import read_yaml
from recsys.config.faults import ConfigError, validate
from recsys.config.load import DEFAULT_CONFIG, load_config
from recsys.config.schema import (
    BucketizeIdsConfig,
    Config,
    DataConfig,
    DataParallelOptimizerConfig,
    DatetimeIdsConfig,
    DenseFeatureConfig,
    DomainConfig,
    FeaturesConfig,
    HashIdsConfig,
    HiLoMoEConfig,
    IdsConfig,
    ListTextConfig,
    ModelConfig,
    Salt,
    SparseFeatureConfig,
    SparseOptimizerConfig,
    StageConfig,
    StandardizeConfig,
    SyntheticConfig,
    TableConfig,
    TowerConfig,
    VocabularyIdsConfig,
)
from recsys.config.section import Name, Section
from recsys.config.towers import TowerSettings

__all__ = [
    "DEFAULT_CONFIG",
    "BucketizeIdsConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataParallelOptimizerConfig",
    "DatetimeIdsConfig",
    "DenseFeatureConfig",
    "DomainConfig",
    "FeaturesConfig",
    "HashIdsConfig",
    "HiLoMoEConfig",
    "IdsConfig",
    "ListTextConfig",
    "ModelConfig",
    "Name",
    "Salt",
    "Section",
    "SparseFeatureConfig",
    "SparseOptimizerConfig",
    "StageConfig",
    "StandardizeConfig",
    "SyntheticConfig",
    "TableConfig",
    "TowerConfig",
    "TowerSettings",
    "VocabularyIdsConfig",
    "load_config",
    "read_yaml",
    "validate",
]
