from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import train
from dataloader.config import load_data_config
from model import CLIPConfig, load_model_config
from model.config import CONFIG_FILE as MODEL_FILE
from trainer.config import load_train_config
from utils.config import build_config, parse_override, read_yaml, to_plain
from utils.errors import UserError


@dataclass(frozen=True)
class Inner:
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Outer:
    count: int
    kind: Literal["a", "b"]
    inner: Inner
    flag: bool = False
    layers: int | tuple[int, int] = 3
    path: str | None = None

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count should be at least 1, found {self.count}")


GOOD = {"count": 2, "kind": "a", "inner": {"lr": "5e-4"}}


def test_values_become_their_types():
    config = build_config(Outer, GOOD | {"layers": [1, 2]}, "f.yaml", [("inner.betas", [0, 1]), ("flag", True)])
    assert config == Outer(2, "a", Inner(5e-4, (0.0, 1.0)), True, (1, 2))
    assert to_plain(config)["inner"] == {"lr": 5e-4, "betas": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuont": 1}, "f.yaml: cuont is not a known key; did you mean count?"),
        ({"count": "many"}, "f.yaml: count should be integer, found 'many'"),
        ({"count": True}, "f.yaml: count should be integer, found True"),
        ({"count": 0}, "f.yaml: count should be at least 1, found 0"),
        ({"kind": "c"}, "f.yaml: kind should be one of a, b, found 'c'"),
        ({"inner": {"lr": "fast"}}, "f.yaml: inner.lr should be number, found 'fast'"),
        ({"inner": {"rl": 1.0}}, "f.yaml: inner.rl is not a known key; did you mean lr?"),
        ({"inner": None}, "f.yaml: inner should be a group of keys, found nothing"),
        ({"layers": [1, 2, 3]}, "f.yaml: layers should be integer or a list of 2 integers, found [1, 2, 3]"),
        ({"path": 3}, "f.yaml: path should be text or null, found 3"),
    ],
)
def test_a_bad_value_is_one_sentence_with_file_and_key(change, message):
    with pytest.raises(UserError) as error:
        build_config(Outer, GOOD | change, "f.yaml")
    assert str(error.value) == message


def test_a_bad_override_is_told_as_such():
    with pytest.raises(UserError, match="--set: inner.lr should be number"):
        build_config(Outer, GOOD, "f.yaml", [("inner.lr", "x")])
    with pytest.raises(UserError, match="'count' in f.yaml is a value"):
        build_config(Outer, GOOD, "f.yaml", [("count.lr", 1)])
    with pytest.raises(UserError, match="should read section.key=value"):
        parse_override("trainer.lr")


def test_missing_key_is_told():
    with pytest.raises(UserError, match="f.yaml: count is missing"):
        build_config(Outer, {"kind": "a", "inner": {"lr": 1}}, "f.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "written twice, the second time on line 2"),
        ("a: [1\n", "is not valid YAML"),
        ("- 1\n", "should hold 'key: value' lines"),
        ("", "found nothing"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path: Path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_yaml_file_loads_and_holds_the_reference_values():
    trainer, data, model = load_train_config(), load_data_config(), load_model_config()
    assert (trainer.per_gpu_train_batch_size, trainer.per_gpu_eval_batch_size, trainer.n_gpu) == (64, 128, 4)
    assert (trainer.num_train_epochs, trainer.logging_steps, trainer.save_steps, trainer.seed) == (35, 50, 1000, 11)
    assert (trainer.optimizer.params.lr, trainer.optimizer.params.eps, trainer.optimizer.params.weight_decay) == (
        5e-4, 1e-8, 0.1,
    )  # fmt: skip
    assert trainer.warmup_share == 0.2 and trainer.optimizer.decay_timescale is None
    assert data.image_mean == (0.4225, 0.4012, 0.3659) and data.image_std == (0.2681, 0.2635, 0.2763)
    assert (model.name, model.embed_dim, model.vision_layers, model.transformer_layers) == (
        "RN50",
        1024,
        (3, 4, 6, 3),
        6,
    )


def test_the_best_recipe_changes_the_references_and_what_is_set_changes_the_recipe():
    def configs(*flags: str) -> train.Configs:
        return train.load_configs(train.parse_args(list(flags)))

    reference, best = configs(), configs("--set", "trainer.recipe=best")
    assert reference.trainer.recipe == "reference" and configs("--set", "trainer.recipe=reference") == reference
    assert best.trainer.recipe == "best"
    for dotted_key, value in train.BEST_RECIPE.items():
        section, *keys = dotted_key.split(".")
        values = [to_plain(config._asdict()[section]) for config in (reference, best)]
        for key in keys:
            values = [part[key] for part in values]
        assert values[1] == value != values[0]
    changed = configs("--set", "dataloader.flip=false", "--set", "trainer.recipe=best")
    assert not changed.dataloader.flip and changed.dataloader.augmentation == "standard"
    with pytest.raises(UserError, match="recipe should be one of reference, best, found 'bset'"):
        configs("--set", "trainer.recipe=bset")


def test_every_named_architecture_is_possible():
    names = [name for name in read_yaml(MODEL_FILE) if name != "name"]
    assert {"RN50", "RN50-OpenAI", "RN101", "ViT-B-32", "ViT-B-16", "RN-small"} <= set(names)
    for name in names:
        assert load_model_config([("name", name)]).name == name


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(UserError, match="no architecture is called 'RN5O'; did you mean RN50?"):
        load_model_config([("name", "RN5O")])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_resolution", 100, "image_resolution must be a multiple of 32"),
        ("vision_patch_size", 32, "vision_patch_size must be null"),
        ("vision_layers", 12, "vision_patch_size must be a number"),
        ("transformer_heads", 7, "does not divide into 7 heads"),
        ("embed_dim", 0, "embed_dim must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        load_model_config([(key, value)])


def test_configs_survive_a_round_trip_as_plain_values():
    config = load_model_config()
    assert build_config(CLIPConfig, to_plain(config), "a checkpoint") == config
