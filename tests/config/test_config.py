"""A wrong config ends in a ConfigError that names the path and what is allowed; a right one survives its own YAML."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from tiny import tiny_config

from recsys.config import Config, ConfigError, SparseFeatureConfig, VocabularyIdsConfig, load_config
from recsys.config.towers import MLPTowerConfig
from recsys.data.features import build_columns

Raw = dict[str, Any]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """Loads the tiny config with overrides, after `edit` changed the mapping that is written to the file."""

    def load(*overrides: str, edit: Callable[[Raw], object] | None = None) -> Config:
        raw = tiny_config(Path("log"), Path("out"))
        if edit is not None:
            edit(raw)
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        return load_config(path, overrides)

    return load


TYPES = (
    "autoint, dcn, dcn_v2, deepfm, dlrm, fibinet, final_mlp, gdcn, masknet, mlp, nfm, pnn, qnn, qnn_alpha, "
    "transformer, wdl, xdeepfm"
)


def load_text(tmp_path: Path, text: str | bytes) -> Config:
    path = tmp_path / "written.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path)


@pytest.mark.parametrize(
    ("override", "path", "hint"),
    [
        ("stagez={}", "stagez", "did you mean 'stages'"),
        ("data.batchsize=8", "data.batchsize", "did you mean 'batch_size'"),
        ("tables.user.poling=sum", "tables.user.poling", "did you mean 'pooling'"),
        ("model.tower.hiden=[8]", "model.tower.hiden", "did you mean 'hidden'"),
        ("stages.joint.epoch=1", "stages.joint.epoch", "did you mean 'epochs'"),
        ("features.sparse.user.tabel=user", "features.sparse.user.tabel", "did you mean 'table'"),
        ("optimizers.dense.weight_decai=0.1", "optimizers.dense.weight_decai", "did you mean 'weight_decay'"),
        ("data.zzz=1", "data.zzz", "data takes batch_size, "),
        ("zzz=1", "zzz", "the top level takes checkpoints, compute, data, "),
        (
            "model.tower.num_heads=2",
            "model.tower.num_heads",
            "model.tower takes activation, dropout, hidden, normalization, type",
        ),
    ],
)
def test_unknown_key_names_its_path_and_the_keys_that_exist(
    load: Callable[..., Config], override: str, path: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(override)
    assert f"\n  {path}: unknown key; " in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize("table", ["street", "str", "mlp", "tuple", "type"])
def test_names_of_tables_that_resemble_schema_words_stay_in_the_path(load: Callable[..., Config], table: str) -> None:
    def add(raw: Raw) -> None:
        raw["tables"][table] = {"num_embeddings": 3, "embedding_dim": "wide", "poling": "sum"}

    with pytest.raises(ConfigError) as error:
        load(edit=add)
    assert f"\n  tables.{table}.embedding_dim: Input should be a valid integer" in str(error.value)
    assert f"\n  tables.{table}.poling: unknown key; did you mean 'pooling'" in str(error.value)


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("data.batch_size=many", "data.batch_size", 'valid integer, found "many"'),
        ("data.batch_size=3.5", "data.batch_size", "valid integer, found 3.5"),
        ("data.batch_size=true", "data.batch_size", "valid integer, found true"),
        ("data.shuffle=1", "data.shuffle", "valid boolean, found 1"),
        ("data.train=3", "data.train", "valid string, found 3"),
        ("data.train=[a, 3]", "data.train.1", "valid string, found 3"),
        ("name=3", "name", "valid string, found 3"),
        ("tables=null", "tables", "object, found null"),
        ("tables=[user]", "tables", "object, found"),
        ("stages=[joint]", "stages", "object, found"),
        ("features.dense.x.fill=none_at_all", "features.dense.x.fill", "valid number"),
        ("tables.user.sharding=table_wise", "tables.user.sharding", "valid array"),
        ("optimizers.dense.betas=[0.9]", "optimizers.dense.betas.1", "missing"),
    ],
)
def test_wrong_type_names_its_path_and_the_type_wanted(
    load: Callable[..., Config], override: str, path: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(override)
    assert any(line.startswith(f"  {path}: ") and message in line for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("data.batch_size=0", "data.batch_size", "greater than 0, found 0"),
        ("seed=-1", "seed", "greater than or equal to 0, found -1"),
        ("tables.user.embedding_dim=6", "tables.user.embedding_dim", "multiple of 4, found 6"),
        ("tables.user.pooling=max", "tables.user.pooling", "'sum' or 'mean', found \"max\""),
        ("tables.user.init={type: normal, std: 1e39}", "tables.user.init.std", "less than or equal to 1000"),
        ("tables.user.init={type: normal, std: 1e-50}", "tables.user.init.std", "greater than or equal to 0.000000001"),
        ("tables.user.sharding=[sideways]", "tables.user.sharding.0", "'row_wise'"),
        ("tables.user.sharding=[]", "tables.user.sharding", "at least 1 item"),
        ("tables.user.compute_kernel=magic", "tables.user.compute_kernel", "'fused'"),
        ("tables.user.sharding=[data_parallel, row_wise]", "tables.user", "write [data_parallel] alone"),
        ("tables.user.compute_kernel=dense", "tables.user", "goes with sharding [data_parallel]"),
        ("data.domain.names=[home, search]", "data.domain", "names must be 3 different ones"),
        ("data.domain.names=[home, cart, cart]", "data.domain", "names must be 3 different ones"),
        ("stages.joint.diversity_weight=-1", "stages.joint.diversity_weight", "greater than or equal to 0"),
        ("model.tower.dropout=1.0", "model.tower.dropout", "less than 1, found 1.0"),
        ("model.tower.activation=swish", "model.tower.activation", "'prelu' or 'none', found"),
        ("model.tower.normalization=null", "model.tower.normalization", "'batch' or 'layer', found null"),
        ("model.tower.hidden=[8, 0]", "model.tower.hidden.1", "greater than 0, found 0"),
        ("model.tower={type: transformer, model_dim: 10}", "model.tower", "num_heads 4 does not divide model_dim 10"),
        ("model.hilomoe.top_k=4", "model.hilomoe", "top_k 4 exceeds num_experts 3"),
        ("optimizers.dense.betas=[0.9, 1.0]", "optimizers.dense.betas.1", "less than 1"),
        (
            "optimizers.sparse={type: sgd, weight_decay: 0.1}",
            "optimizers.sparse",
            "fused sgd ignores weight_decay; set it to 0",
        ),
        ("optimizers.sparse={type: adagrad, weight_decay: 0.1}", "optimizers.sparse", "take rowwise_adagrad or adam"),
        ("optimizers.sparse.weight_decay_mode=lazy", "optimizers.sparse.weight_decay_mode", "'decoupled' or 'coupled'"),
        ("optimizers.sparse.coupled_every=4", "optimizers.sparse", "is for weight_decay_mode coupled, and it is fused"),
        (
            "optimizers.sparse={type: adam, weight_decay: 0.1, weight_decay_mode: coupled}",
            "optimizers.sparse",
            "coupled is not for adam, whose averages are of gradients alone; take decoupled",
        ),
        (
            "optimizers.sparse={weight_decay: 10, weight_decay_mode: decoupled}",
            "optimizers.sparse.weight_decay",
            "10 at stages.backbone.sparse_learning_rate 0.1 takes 1 of each row at once",
        ),
        (
            "optimizers.sparse={type: sgd, weight_decay: 1, weight_decay_mode: coupled, coupled_every: 10}",
            "optimizers.sparse.weight_decay",
            "lower one of them, or coupled_every",
        ),
        ("tables.item.max_norm=1", "tables.item", "max_norm needs whole rows and a fused optimizer"),
        ("tables.tag.max_norm=1", "tables.tag", "which sharding data_parallel does not have; take table_wise"),
        ("tables.user.max_norm=0", "tables.user.max_norm", "greater than 0, found 0"),
        (
            "tables.user={num_embeddings: 40, embedding_dim: 8, max_norm: 1, compute_kernel: fused_uvm_caching}",
            "tables.user",
            "take fused or fused_uvm",
        ),
        ("stages.joint.learning_rate=0", "stages.joint.learning_rate", "greater than 0, found 0"),
        ("stages.joint.learning_rate=.inf", "stages.joint.learning_rate", "finite number"),
        ("stages.joint.learning_rate=.nan", "stages.joint.learning_rate", "finite number"),
        ("stages.joint.warmup_steps=-1", "stages.joint.warmup_steps", "greater than or equal to 0"),
        ("stages.joint.trains=nothing", "stages.joint.trains", "'backbone', 'experts', 'gate' or 'all'"),
        ("stages.joint.epochs=1", "stages.joint", "give either epochs or steps"),
        ("stages.joint.steps=null", "stages.joint", "give either epochs or steps"),
        ("stages.joint.patience=1", "stages.joint", "length must be given in epochs"),
        ("stages.joint.schedule=plateau", "stages.joint", "plateau goes by epochs, so the stage's length"),
        ("stages.backbone.plateau={factor: 0.5}", "stages.backbone", "and schedule is constant; leave one of them out"),
        ("stages.backbone.schedule_minimum=0.1", "stages.backbone", "set schedule to linear, cosine or plateau"),
        ("stages.joint.sparse_learning_rate=null", "stages.joint.sparse_learning_rate", "trains all needs it"),
        (
            "data.synthetic={directory: a, train_rows: 1, valid_rows: 1, test_rows: 1, conflict: 1.5}",
            "data.synthetic.conflict",
            "less than or equal to 1",
        ),
        (
            "data.synthetic={directory: a, train_rows: 1, valid_rows: 1, test_rows: 1, num_domains: 0}",
            "data.synthetic.num_domains",
            "greater than 0, found 0",
        ),
        ("metrics.num_bins=1", "metrics.num_bins", "greater than or equal to 2"),
        ("device=tpu", "device", "'auto', 'cpu' or 'cuda'"),
        ("features.sparse={}", "features.sparse", "at least 1 item"),
        ("features.sparse.item.ids={type: hash, salt: -1}", "features.sparse.item.ids.salt", "or equal to 0, found -1"),
        (f"features.sparse.item.ids={{type: hash, salt: {2**64}}}", "features.sparse.item.ids.salt", "less than"),
        ("features.sparse.item.ids={type: vocabulary}", "features.sparse.item.ids.file", "missing, and has no default"),
        ("features.sparse.item.ids={type: bucketize, boundaries: []}", "features.sparse.item.ids.boundaries", "1 item"),
        (
            "features.sparse.item.ids={type: bucketize, boundaries: [1, 3, 3]}",
            "features.sparse.item.ids.boundaries",
            "must rise from each to the next",
        ),
        (
            "features.sparse.item.ids={type: datetime, part: hour, timezone: Mars/Olympus}",
            "features.sparse.item.ids.timezone",
            "knows no time zone 'Mars/Olympus'",
        ),
        ("features.sparse.item.max_length=0", "features.sparse.item.max_length", "greater than 0, found 0"),
        (
            "features.sparse.item={table: item, ids: {type: hash}, out_of_range: hash}",
            "features.sparse.item",
            "ids of type hash are never out of range",
        ),
        ("features.dense.scale.not_finite=fill", "features.dense.scale", "not_finite is fill, but no fill is set"),
        ("features.dense.scale.clip=[1, 1]", "features.dense.scale", "clip must rise, found [1.0, 1.0]"),
        ("features.dense.scale.standardize={mean: 0, std: 0}", "features.dense.scale.standardize.std", "found 0"),
    ],
)
def test_value_out_of_range_names_its_path_and_the_range(
    load: Callable[..., Config], override: str, path: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(override)
    assert any(line.startswith(f"  {path}: ") and message in line for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("tower", "found"), [("{type: cnn}", "found 'cnn'"), ("{hidden: [4]}", "missing"), ("{}", "missing")]
)
def test_unknown_or_missing_tower_type_lists_the_towers(load: Callable[..., Config], tower: str, found: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(f"model.tower={tower}")
    assert f"model.tower.type: must be one of {TYPES}, " in str(error.value)
    assert found in str(error.value)


@pytest.mark.parametrize(("ids", "found"), [("{type: magic}", "found 'magic'"), ("{salt: 1}", "and is missing")])
def test_unknown_or_missing_kind_of_ids_lists_the_kinds(load: Callable[..., Config], ids: str, found: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(f"features.sparse.item.ids={ids}")
    expected = f"features.sparse.item.ids.type: must be one of bucketize, datetime, hash, vocabulary, {found}"
    assert expected in str(error.value)


def test_weights_need_a_table_that_sums(load: Callable[..., Config]) -> None:
    assert load("features.sparse.tags.weights=scores").features.sparse["tags"].weights == "scores"
    with pytest.raises(ConfigError, match=r"table item pools by mean, .*pooling to sum"):
        load("features.sparse.item.weights=scores")


@pytest.mark.parametrize(
    ("replaces", "message"),
    [
        ("{type: mlp, hiden: [8]}", "model.replaces.hiden: unknown key; did you mean 'hidden'?"),
        ("{type: cnn}", f"model.replaces.type: must be one of {TYPES}, found 'cnn'"),
        ("{type: final_mlp, first_context: [nobody]}", "model.replaces.first_context: no sparse feature 'nobody'"),
    ],
)
def test_the_tower_that_is_replaced_is_checked_like_the_tower(
    load: Callable[..., Config], replaces: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(f"model.replaces={replaces}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "path", ["data", "tables", "features", "model", "stages", "data.train", "tables.user.num_embeddings"]
)
def test_missing_key_names_its_path(load: Callable[..., Config], path: str) -> None:
    *sections, key = path.split(".")

    def drop(raw: Raw) -> None:
        section = raw
        for name in sections:
            section = section[name]
        del section[key]

    with pytest.raises(ConfigError, match=rf"\n  {path}: missing"):
        load(edit=drop)


def test_every_fault_is_listed(load: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError) as error:
        load("data.batch_size=0", "model.dense_dim=x", "zzz=1")
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "data.batch_size",
        "model.dense_dim",
        "zzz",
    ]


@pytest.mark.parametrize("name", ["a.b", "a b", "", "a/b"])
def test_names_that_no_path_can_hold_are_refused(load: Callable[..., Config], name: str) -> None:
    def rename(raw: Raw) -> None:
        raw["tables"][name] = raw["tables"].pop("user")

    with pytest.raises(ConfigError, match=r"String should match pattern"):
        load(edit=rename)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "duplicate key 'seed'"),
        ("data: {label: a, label: b}", "duplicate key 'label'"),
        ("", "must be a mapping of sections, found NoneType"),
        ("[1, 2]", "must be a mapping of sections, found list"),
        ("just words", "must be a mapping of sections, found str"),
        ("a: [1", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("? [a, b]\n: 1", "is not a text"),
        ("2020-01-01: 1", "is not a text"),
        ("a: &loop [*loop]", "alias"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_text(tmp_path, text)
    assert "written.yaml" in str(error.value)


def test_yaml_cannot_make_python_objects(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    text = f"name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{witness}']]"
    with pytest.raises(ConfigError, match="python/object"):
        load_text(tmp_path, text)
    assert not witness.exists()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config .*absent\.yaml: No such file or directory.*--config"):
        load_config(tmp_path / "absent.yaml")


def test_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(tmp_path)


@pytest.mark.parametrize("override", ["seed", "", "=3", "data..label=x", ".seed=1", "seed.=1"])
def test_override_that_is_no_assignment_is_refused(load: Callable[..., Config], override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(override)
    assert f"override {override!r} is not of the form path.to.key=value" in str(error.value)


@pytest.mark.parametrize("override", ["seed=[1", "model={a: 1, a: 2}", "name=!!python/name:os.system"])
def test_override_whose_value_is_no_yaml_is_refused(load: Callable[..., Config], override: str) -> None:
    with pytest.raises(ConfigError, match="the value is not valid YAML") as error:
        load(override)
    assert repr(override) in str(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("name.first=x", "name is a value, not a section"),
        (
            "model.tower.hidden.0=3",
            "model.tower.hidden is a list, which an override gives as a whole: model.tower.hidden=[...]",
        ),
    ],
)
def test_override_into_a_value_is_refused(load: Callable[..., Config], override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(override)
    assert str(error.value) == f"override {override!r}: {told}"


def test_overrides_set_scalars_lists_and_sections(load: Callable[..., Config]) -> None:
    config = load(
        "stages.joint.learning_rate=1e-4",
        "stages.joint.sparse_learning_rate=2E-3",
        "stages.joint.z_weight=5e-1",
        "tables.user.embedding_dim=32",
        "model.tower={type: dcn_v2, hidden: [7]}",
        "data.label=a=b",
        "data.valid=[x/*.parquet, y/*.parquet]",
        "optimizers.sparse.type=adagrad",
    )
    joint = config.stages["joint"]
    assert (joint.learning_rate, joint.sparse_learning_rate, joint.z_weight) == (1e-4, 2e-3, 0.5)
    assert config.tables["user"].embedding_dim == 32
    assert config.model.tower.type == "dcn_v2"
    assert config.model.tower.hidden == (7,)
    assert config.data.label == "a=b"
    assert config.data.patterns("valid") == ("x/*.parquet", "y/*.parquet")
    assert config.optimizers.sparse.type == "adagrad"


def test_later_override_wins(load: Callable[..., Config]) -> None:
    assert load("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("text", ["1e4", "1_000", "null", "on", "0x10", "1e-4x"])
def test_only_numbers_are_read_as_numbers(load: Callable[..., Config], text: str) -> None:
    found = load(f"features.dense.x.fill={text}").features.dense["x"].fill if text in ("1e4", "null") else None
    assert found == {"1e4": 1e4}.get(text)
    assert load(f"name='{text}'").name == text


def test_null_leaves_a_stage_out(load: Callable[..., Config]) -> None:
    assert list(load("stages.experts=null").stages) == ["backbone", "joint"]
    with pytest.raises(ConfigError, match=r"stages: .*at least 1 item"):
        load("stages.backbone=null", "stages.experts=null", "stages.joint=null")


def test_name_and_output_dir_follow_from_the_file(load: Callable[..., Config]) -> None:
    def drop(raw: Raw) -> None:
        del raw["name"], raw["output_dir"]

    config = load(edit=drop)
    assert (config.name, config.output_dir) == ("tiny", "outputs/tiny")
    assert load("name=other", edit=drop).output_dir == "outputs/other"


def test_merge_keys_share_settings_between_stages(tmp_path: Path) -> None:
    raw = tiny_config(Path("log"), Path("out"))
    del raw["stages"]
    stages = """
stages:
  one: &one {trains: all, epochs: 1, learning_rate: 0.1, sparse_learning_rate: 0.2}
  two: {<<: *one, learning_rate: 0.3}
"""
    config = load_text(tmp_path, yaml.safe_dump(raw) + stages)
    assert config.stages["two"] == config.stages["one"].model_copy(update={"learning_rate": 0.3})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["features.sparse.user.table=usr"], "features.sparse.user.table: no table 'usr'; there are item, tag, user"),
        (["tables.spare={num_embeddings: 2, embedding_dim: 4}"], "tables.spare: no feature in features.sparse uses"),
        (["features.dense.user={}"], "'user' is both a sparse and a dense feature"),
        (["model.hilomoe=null"], "leave the stage out with stages.experts=null"),
        (["data.valid=null", "stages.backbone.patience=1"], "stages.backbone.patience needs a valid split"),
        (["data.valid=null", "stages.backbone.schedule=plateau"], "stages.backbone.schedule needs a valid split"),
        (["data.valid=null", "logging.eval_every_steps=5"], "logging.eval_every_steps needs a valid split"),
        (["optimizers.dense.muon.momentum=0.9"], "muon is for type muon, and type is adamw"),
        (
            ["optimizers.dense={type: muon, muon: {experts: true}}", "model.hilomoe=null", "stages.experts=null"],
            "optimizers.dense.muon.experts is for experts, and model.hilomoe is null; set it to false",
        ),
        (["stages.backbone.expert_learning_rate=0.1"], "for stages that train experts, and trains is backbone"),
        (
            ["stages.joint.expert_learning_rate=0.1", "model.hilomoe=null", "stages.experts=null"],
            "stages.joint.expert_learning_rate is for experts, and model.hilomoe and model.domain_experts are null; "
            "set it to null",
        ),
    ],
)
def test_reference_to_what_is_not_there_is_refused(
    load: Callable[..., Config], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(*overrides)
    assert message in str(error.value)


def test_baseline_without_experts_needs_no_expert_stage(load: Callable[..., Config]) -> None:
    assert load("model.hilomoe=null", "stages.experts=null").model.hilomoe is None


def test_split_that_is_not_set_is_named(load: Callable[..., Config]) -> None:
    config = load("data.test=null")
    assert config.data.splits == ("train", "valid")
    with pytest.raises(ConfigError, match=r"data\.test is not set; the config has train, valid"):
        config.data.patterns("test")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["stages.experts=null", "model.hilomoe=null"],
        ["model.tower={type: transformer}", "tables.user.sharding=[row_wise, table_wise]"],
        ["data.train=[ä, b]", "stages.joint.learning_rate=1e-12", "name='1e5'", "data.label='null'"],
    ],
)
def test_resolved_yaml_reads_back_to_an_equal_config(
    load: Callable[..., Config], tmp_path: Path, overrides: list[str]
) -> None:
    config = load(*overrides)
    again = load_text(tmp_path, config.to_yaml())
    assert again == config
    assert list(again.features.sparse) == list(config.features.sparse)


@pytest.mark.parametrize("path", ["seed", "data.batch_size", "stages.joint.steps"])
def test_config_is_frozen(load: Callable[..., Config], path: str) -> None:
    *sections, key = path.split(".")
    section: Any = load()
    for name in sections:
        section = section[name] if isinstance(section, dict) else getattr(section, name)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, key, 3)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ("{type: final_mlp, num_heads: 3}", "num_heads 3 does not divide first_hidden's last width 128"),
        ("{type: final_mlp, second_context: [nobody]}", "model.tower.second_context: no sparse feature 'nobody'"),
    ],
)
def test_final_mlp_that_cannot_be_built_is_refused(load: Callable[..., Config], tower: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(f"model.tower={tower}")


@pytest.mark.parametrize("key", ["tower", "replaces"])
@pytest.mark.parametrize(
    ("tower", "widths", "message"),
    [
        (
            "wdl",
            (8, 4, 8),
            "wide: the first-order weight takes 4 numbers of each token, and tables.tag.embedding_dim is 4",
        ),
        ("deepfm", (8, 8, 4), "wide: the first-order .* model.dense_dim is 4; raise it by 4"),
        ("nfm", (8, 12, 8), "type: nfm needs one width, and tables.tag.embedding_dim is 12 where tables.user.* is 8; "),
        (
            "pnn",
            (8, 8, 4),
            "type: pnn needs one width, and model.dense_dim is 4 where tables.user.embedding_dim is 8; ",
        ),
        ("dlrm", (8, 4, 8), "type: dlrm needs one width, and tables.tag.embedding_dim is 4 where tables.user"),
    ],
)
def test_widths_that_a_tower_cannot_take_are_refused(
    load: Callable[..., Config], key: str, tower: str, widths: tuple[int, int, int], message: str
) -> None:
    user, tag, dense = widths
    paths = f"tables.user.embedding_dim={user}", f"tables.tag.embedding_dim={tag}", f"model.dense_dim={dense}"
    with pytest.raises(ConfigError, match=rf"model\.{key}\.{message}"):
        load(f"model.{key}={{type: {tower}}}", *paths)


def test_widths_that_a_tower_can_take_are_taken(load: Callable[..., Config]) -> None:
    """First-order weights are left out by choice, and DLRM's bottom takes dense features of any width."""
    equal = "tables.tag.embedding_dim=8"
    assert load("model.tower={type: deepfm, wide: false}", equal, "model.dense_dim=8").model.tower.padding == 0
    assert load("model.tower={type: deepfm}", equal, "model.dense_dim=8").model.tower.padding == 3
    assert load("model.tower={type: dlrm}", equal, "model.dense_dim=5").model.tower.padding == 0
    with pytest.raises(ConfigError, match=r"model\.tower\.wide: Input should be True"):
        load("model.tower={type: wdl, wide: false}", equal, "model.dense_dim=8")


def test_one_feature_alone_is_not_multiplied(load: Callable[..., Config]) -> None:
    def alone(raw: Raw) -> None:
        raw["tables"] = {"user": raw["tables"]["user"]}
        raw["features"] = {"sparse": {"user": raw["features"]["sparse"]["user"]}}

    with pytest.raises(
        ConfigError, match=r"model\.tower\.type: pnn multiplies features .*; give a second, or take mlp"
    ):
        load("model.tower={type: pnn}", edit=alone)


def test_without_sharded_tables_no_rate_is_asked_for_them(load: Callable[..., Config]) -> None:
    overrides = ["stages.backbone.sparse_learning_rate=null", "stages.joint.sparse_learning_rate=null"]
    for table in ("user", "item", "tag"):
        overrides += [f"tables.{table}.sharding=[data_parallel]", f"tables.{table}.min_partition=null"]
    assert load(*overrides).stages["joint"].sparse_learning_rate is None
    with pytest.raises(ConfigError, match="sparse_learning_rate"):
        load(*overrides, "tables.user.sharding=[table_wise]")


def write_configs(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_included_files_lie_beneath_the_own_keys_and_overrides_above(tmp_path: Path) -> None:
    raw = tiny_config(Path("log"), Path("out"))
    model, stages = raw.pop("model"), raw.pop("stages")
    raw["data"].pop("batch_size")
    raw["include"] = "deep.yaml"
    write_configs(
        tmp_path,
        sets__log__dataset=yaml.safe_dump(raw, sort_keys=False),
        sets__log__deep="seed: 3\nlogging: {every_steps: 2, eval_every_steps: 4}\n",
        mine__stages=yaml.safe_dump({"stages": stages}, sort_keys=False),
        mine__run=yaml.safe_dump(
            {
                "include": ["../sets/log/dataset.yaml", "stages.yaml"],
                "data": {"batch_size": 8, "domain": None},
                "model": model,
                "features": {"sparse": {"tags": None}, "dense": {"x": {"log1p": True}, "y": {}}},
                "tables": {"tag": None, "user": {"embedding_dim": 16}},
                "stages": {"experts": None},
            }
        ),
    )
    config = load_config(tmp_path / "mine/run.yaml", ["tables.item.embedding_dim=32"])
    assert (config.data.batch_size, config.data.domain, config.data.label) == (8, None, "label")
    assert {name: table.embedding_dim for name, table in config.tables.items()} == {"user": 16, "item": 32}
    assert config.tables["user"].num_embeddings == 40
    assert list(config.features.sparse) == ["user", "item"]
    assert list(config.features.dense) == ["x", "scale", "y"]
    assert config.features.dense["x"].fill == 0.0 and config.features.dense["x"].log1p
    assert list(config.stages) == ["backbone", "joint"]
    assert (config.seed, config.logging.every_steps, config.logging.eval_every_steps) == (3, 5, 4)
    assert config.name == "tiny"  # as the included file says
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert "include" not in config.to_yaml()
    assert load_config(tmp_path / "again.yaml") == config


def test_here_in_a_file_of_ids_is_the_folder_of_the_file_that_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = tiny_config(Path("log"), Path("out"))
    for name in ("user", "item"):
        ids = {"type": "vocabulary", "file": f"${{here}}/vocabularies/{name}.parquet", "applied": True}
        raw["features"]["sparse"][name]["ids"] = ids
    write_configs(
        tmp_path,
        sets__log__dataset=yaml.safe_dump(raw),
        mine__run="include: ../sets/log/dataset.yaml\n"
        "features: {sparse: {item: {ids: {file: '${here}/own.parquet', applied: false}}}}\n",
    )
    config = load_config("mine/run.yaml")
    ids = {name: feature.ids for name, feature in config.features.sparse.items()}
    assert ids == {
        "user": VocabularyIdsConfig(type="vocabulary", file="sets/log/vocabularies/user.parquet", applied=True),
        "item": VocabularyIdsConfig(type="vocabulary", file="mine/own.parquet", applied=False),
        "tags": None,
    }
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config("again.yaml") == config  # as a checkpoint says it


@pytest.mark.parametrize(
    "ids",
    [
        "{type: hash, salt: 3, buckets: 20, applied: true}",
        "{type: vocabulary, file: absent.parquet, out_of_vocabulary: empty, applied: true}",
        "{type: bucketize, boundaries: [1.0, 2.0], applied: true}",
        "{type: datetime, part: hour, applied: true}",
    ],
)
def test_ids_that_are_applied_are_read_as_rows(load: Callable[..., Config], ids: str) -> None:
    overrides = [f"features.sparse.user.ids={ids}", "features.sparse.user.minimum=0"]
    feature = load(*overrides, "features.sparse.user.max_length=3").features.sparse["user"]
    assert feature.ids is not None and feature.ids.applied
    assert feature.stored == SparseFeatureConfig(table="user", max_length=3)
    as_they_are = load(*overrides, "features.sparse.user.ids.applied=false").features.sparse["user"]
    assert as_they_are.stored == as_they_are != feature
    with pytest.raises(ConfigError, match=r"features\.sparse\.user: out_of_range is for ids as they are; ids of type"):
        load(*overrides, "features.sparse.user.out_of_range=hash")


def test_ids_need_no_more_rows_than_their_table_has(load: Callable[..., Config]) -> None:
    ids = "features.sparse.user.ids={type: hash, buckets: %s, applied: %s}"
    assert build_columns(load(ids % (40, "true"))).sparse["user"].ids.num_rows == 40
    for applied in ("true", "false"):
        with pytest.raises(ConfigError, match=r"^tables\.user\.num_embeddings: 40 rows are too few .*, which need 41$"):
            build_columns(load(ids % (41, applied)))
    with pytest.raises(ConfigError, match=r"features\.sparse\.user\.ids\.buckets: Input should be greater than 0"):
        load(ids % (0, "true"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("list_text={items: ints}", "features.sparse.user.list_text.separator: missing, and has no default"),
        ("list_text={separator: ''}", "features.sparse.user.list_text.separator: String should have at least 1 char"),
        ("list_text={separator: x, items: floats}", "features.sparse.user.list_text.items: Input should be 'strings'"),
        ("minimum=0.5", "features.sparse.user.minimum: Input should be a valid integer"),
        (f"minimum={2**63}", f"features.sparse.user.minimum: Input should be less than {2**63}"),
        ("ids={type: hash, applied: 1}", "features.sparse.user.ids.applied: Input should be a valid boolean"),
    ],
)
def test_raw_values_that_cannot_be_meant(load: Callable[..., Config], override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(f"features.sparse.user.{override}")
    assert message in str(error.value)


def test_here_is_the_folder_of_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = tiny_config(Path("log"), Path("out"))
    raw["data"] |= {"train": "${here}/train/*.parquet", "valid": ["${here}/a/*", "b/*"], "test": "${here}/test"}
    write_configs(
        tmp_path,
        sets__log__dataset=yaml.safe_dump(raw),
        mine__run="include: ../sets/log/dataset.yaml\ndata: {test: '${here}/x'}\n",
    )
    data = load_config("mine/run.yaml").data
    assert (data.train, data.valid, data.test) == ("sets/log/train/*.parquet", ("sets/log/a/*", "b/*"), "mine/x")
    elsewhere = load_config(tmp_path / "sets/log/dataset.yaml").data
    assert elsewhere.train == f"{tmp_path}/sets/log/train/*.parquet"


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ("missing.yaml", "cannot read config {folder}/missing.yaml: No such file or directory; {folder}/run.yaml incl"),
        ("run.yaml", "in a circle: {folder}/run.yaml includes {folder}/run.yaml; remove one include"),
        ("ring.yaml", "circle: {folder}/run.yaml includes {folder}/ring.yaml includes {folder}/run.yaml; remove one"),
        ("{a: 1}", 'run.yaml: include must be a path or a list of paths, found {"a": 1}'),
        ("[ring.yaml, 1]", "run.yaml: include must be a path or a list of paths, found"),
        ("null", "run.yaml: include must be a path or a list of paths, found null"),
    ],
)
def test_includes_that_lead_nowhere_are_refused(tmp_path: Path, include: str, message: str) -> None:
    write_configs(tmp_path, run=f"include: {include}\n", ring="include: [run.yaml]\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml")
    assert message.replace("{folder}", str(tmp_path)) in str(error.value)


def test_a_section_of_another_type_takes_the_place_of_the_included_one(tmp_path: Path) -> None:
    raw = tiny_config(Path("log"), Path("out"))
    tower = "{type: qnn_alpha, num_rows: 2, num_heads: 2, dropout: 0.5}"
    write_configs(
        tmp_path,
        base=yaml.safe_dump(raw),
        other=f"include: base.yaml\nmodel: {{tower: {tower}}}\n",
        mine="include: other.yaml\nmodel: {tower: {type: mlp, hidden: [8]}}\n",
        more="include: mine.yaml\nmodel: {tower: {type: mlp, dropout: 0.25}}\n",
    )
    assert load_config(str(tmp_path / "mine.yaml")).model.tower == MLPTowerConfig(type="mlp", hidden=(8,))
    assert load_config(str(tmp_path / "more.yaml")).model.tower == MLPTowerConfig(type="mlp", hidden=(8,), dropout=0.25)


def test_an_optimizer_of_another_type_keeps_what_the_included_one_says(tmp_path: Path) -> None:
    """As where the command line names the type: its keys are the same for all types, and none is lost unsaid."""
    raw = tiny_config(Path("log"), Path("out"))
    raw["optimizers"] = {
        "sparse": {"type": "rowwise_adagrad", "weight_decay": 1e-5, "weight_decay_mode": "decoupled"},
        "dense": {"type": "adamw", "max_grad_norm": 2.0},
    }
    write_configs(
        tmp_path,
        base=yaml.safe_dump(raw),
        run="include: base.yaml\noptimizers: {sparse: {type: sgd}, dense: {type: muon}}\n",
    )
    found = load_config(tmp_path / "run.yaml").optimizers
    assert (found.sparse.type, found.sparse.weight_decay, found.dense.max_grad_norm) == ("sgd", 1e-5, 2.0)
    assert (
        found
        == load_config(tmp_path / "base.yaml", ["optimizers.sparse.type=sgd", "optimizers.dense.type=muon"]).optimizers
    )


@pytest.mark.parametrize(
    ("above", "left"), [("{max_length: 4}", {"type": 4}), ("null", {})], ids=["changed", "left out"]
)
def test_a_feature_may_be_called_type_where_files_are_included(
    tmp_path: Path, above: str, left: dict[str, int]
) -> None:
    raw = tiny_config(Path("log"), Path("out"))
    raw["features"]["sparse"]["type"] = {"table": "tag"}
    write_configs(
        tmp_path,
        base=yaml.safe_dump(raw),
        run=f"include: base.yaml\nfeatures: {{sparse: {{type: {above}}}}}\n",
    )
    found = load_config(tmp_path / "run.yaml").features.sparse
    assert {name: feature.max_length for name, feature in found.items()} == {
        **dict.fromkeys(("user", "item", "tags")),
        **left,
    }


def test_one_file_may_be_included_by_two(tmp_path: Path) -> None:
    raw = tiny_config(Path("log"), Path("out"))
    write_configs(
        tmp_path,
        base=yaml.safe_dump(raw),
        left="include: base.yaml\nseed: 1\n",
        right="include: base.yaml\n",
        run="include: [left.yaml, right.yaml]\n",
    )
    assert load_config(tmp_path / "run.yaml").seed == 1


def test_the_home_directory_stands_for_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text(f"include: {Path('configs/small.yaml').resolve()}\n")
    vocabulary = "features.sparse.user_id.ids={type: vocabulary, file: ~/user.parquet}"
    paths = ["output_dir=~/run", "data.synthetic.directory=~/log", "resume=~/old", "warm_start.checkpoint=~/step-1"]
    config = load_config("~/config.yaml", [*paths, vocabulary])
    assert config.warm_start is not None
    assert (config.resume, config.warm_start.checkpoint) == (f"{tmp_path}/old", f"{tmp_path}/step-1")
    assert config.output_dir == f"{tmp_path}/run"
    assert config.data.synthetic is not None and config.data.synthetic.directory == f"{tmp_path}/log"
    ids = config.features.sparse["user_id"].ids
    assert isinstance(ids, VocabularyIdsConfig) and ids.file == f"{tmp_path}/user.parquet"
    (tmp_path / "other.yaml").write_text("include: ~/config.yaml\n")
    assert load_config(tmp_path / "other.yaml", ["output_dir=a~/b"]).output_dir == "a~/b"
