import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from pydantic import PositiveInt

from dataloader.config import load_data_config
from model import CLIPConfig, load_model_config
from model.config import CONFIG_FILE as MODEL_FILE
from trainer.config import load_train_config
from trainer.run.configs import RECIPES, Configs, load_configs
from trainer.run.flags import parse_args
from utils.config import Config, Setting, build_config, flatten, parse_override, read_yaml, to_plain
from utils.errors import UserError


@dataclass(frozen=True)
class Inner(Config):
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Outer(Config):
    count: int
    kind: Literal["a", "b"]
    inner: Inner
    flag: bool = False
    layers: int | tuple[int, int] = 3
    path: str | None = None
    size: PositiveInt | None = None

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count should be at least 1, found {self.count}")


GOOD = {"count": 2, "kind": "a", "inner": {"lr": 5e-4}}


def test_values_become_their_types():
    config = build_config(Outer, GOOD | {"layers": [1, 2]}, "f.yaml", [("inner.betas", [0, 1]), ("flag", True)])
    assert config == Outer(2, "a", Inner(5e-4, (0.0, 1.0)), True, (1, 2))
    assert dataclasses.asdict(config)["inner"] == {"lr": 5e-4, "betas": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"cuont": 1}, ("cuont", "did you mean count?")),
        ({"count": "many"}, ("count", "integer", "'many'")),
        ({"count": True}, ("count", "integer", "True")),
        ({"count": 0}, ("count", "at least 1", "0")),
        ({"size": 0}, ("size", "greater than 0", "0")),
        ({"kind": "c"}, ("kind", "'a' or 'b'", "'c'")),
        ({"inner": {"lr": "fast"}}, ("inner.lr", "number", "'fast'")),
        ({"inner": {"rl": 1.0}}, ("inner.rl", "did you mean inner.lr?")),
        ({"inner": None}, ("inner", "None")),
        ({"layers": [1, 2, 3]}, ("layers", "[1, 2, 3]")),
        ({"path": 3}, ("path", "string", "3")),
    ],
)
def test_a_bad_value_is_one_sentence_with_file_and_key(change, parts):
    with pytest.raises(UserError) as error:
        build_config(Outer, GOOD | change, "f.yaml")
    message = str(error.value)
    assert message.startswith("f.yaml: ") and "\n" not in message
    assert all(part in message for part in parts), message


def test_a_bad_override_names_its_flag():
    with pytest.raises(UserError, match="^--set: inner.lr "):
        build_config(Outer, GOOD, "f.yaml", [("inner.lr", "x")])
    with pytest.raises(UserError, match="^--count: count "):
        build_config(Outer, GOOD, "f.yaml", {"count": Setting(0, "--count")})
    with pytest.raises(UserError, match="^--set: count.lr "):
        build_config(Outer, GOOD, "f.yaml", [("count.lr", 1)])
    with pytest.raises(UserError, match="section.key=value"):
        parse_override("trainer.lr")


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="f.yaml: count is missing"):
        build_config(Outer, {"kind": "a", "inner": {"lr": 1}}, "f.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "'a' appears twice"),
        ("a: [1\n", "is not valid YAML"),
        ("- 1\n", "'key: value' lines"),
        ("", "found None"),
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
    load_data_config()
    trainer, model = load_train_config(), load_model_config()
    assert (trainer.per_gpu_train_batch_size, trainer.per_gpu_eval_batch_size, trainer.n_gpu) == (64, 128, 4)
    assert (trainer.num_train_epochs, trainer.logging_steps, trainer.save_steps, trainer.seed) == (35, 50, 1000, 11)
    assert (trainer.optimizer.params.lr, trainer.optimizer.params.eps, trainer.optimizer.params.weight_decay) == (
        5e-4, 1e-8, 0.1,
    )  # fmt: skip
    assert trainer.warmup_share == 0.2 and trainer.optimizer.decay_timescale is None
    assert model.image_mean == (0.4225, 0.4012, 0.3659) and model.image_std == (0.2681, 0.2635, 0.2763)
    assert (model.name, model.embed_dim, model.vision_layers, model.transformer_layers) == (
        "RN50",
        1024,
        (3, 4, 6, 3),
        6,
    )


def configs(*flags: object) -> Configs:
    return load_configs(parse_args(list(map(str, flags)), ""))


def test_the_recipe_lies_between_the_files_and_the_flags():
    reference, best = configs(), configs("--recipe", "best")
    assert reference.trainer.recipe == "reference" and configs("--set", "trainer.recipe=reference") == reference
    assert configs("--set", "trainer.recipe=best") == best != reference
    plain = flatten(to_plain(best), "")
    for key, setting in flatten(read_yaml(RECIPES / "best.yaml"), "").items():
        assert plain[key].value == setting.value, key
    changed = configs("--set", "dataloader.flip=false", "--recipe", "best")
    assert not changed.dataloader.flip and changed.dataloader.augmentation == "standard"
    with pytest.raises(UserError, match="^--recipe: .*'bset'; did you mean best?"):
        configs("--recipe", "bset")


@pytest.mark.parametrize("recipe", [file.stem for file in RECIPES.glob("*.yaml")])
def test_every_recipe_fits_the_schema(recipe):
    assert configs("--recipe", recipe).trainer.recipe == recipe


def test_a_config_file_lies_between_the_recipe_and_the_flags(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("trainer:\n  recipe: best\n  seed: 5\n  num_train_epochs: 7\ndataloader:\n  flip: false\n")
    merged = configs("--config", file, "--epochs", 3)
    assert (merged.trainer.recipe, merged.trainer.seed, merged.trainer.num_train_epochs) == ("best", 5, 3)
    assert not merged.dataloader.flip and merged.dataloader.color_jitter == 0.3
    file.write_text("trainer:\n  sed: 5\n")
    with pytest.raises(UserError, match=r"^--config .*mine.yaml: sed .*did you mean seed\?"):
        configs("--config", file)
    file.write_text("seed: 5\n")
    with pytest.raises(UserError, match="^--config .*mine.yaml: seed should begin with model., trainer., dataloader."):
        configs("--config", file)
    with pytest.raises(UserError, match="absent.yaml"):
        configs("--config", tmp_path / "absent.yaml")


def test_a_message_names_the_flag_that_was_given():
    with pytest.raises(UserError, match="^--epochs: num_train_epochs "):
        configs("--epochs", 0)
    with pytest.raises(UserError, match="^--batch_size: per_gpu_train_batch_size "):
        configs("--batch_size", 1)


def test_every_named_architecture_is_possible():
    names = [name for name in read_yaml(MODEL_FILE) if name != "name"]
    assert {"RN50", "RN50-OpenAI", "RN101", "ViT-B-32", "ViT-B-16", "RN-small"} <= set(names)
    for name in names:
        assert load_model_config([("name", name)]).name == name


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(UserError, match="'RN5O'; did you mean RN50?"):
        load_model_config([("name", "RN5O")])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_resolution", 100, "image_resolution should be a multiple of 32"),
        ("vision_patch_size", 32, "vision_patch_size should be null"),
        ("vision_layers", 12, "vision_patch_size should be"),
        ("transformer_heads", 7, "transformer_width should be a multiple of"),
        ("embed_dim", 0, "embed_dim should be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        load_model_config([(key, value)])


def test_configs_survive_a_round_trip_as_plain_values():
    config = load_model_config()
    assert build_config(CLIPConfig, dataclasses.asdict(config), "a checkpoint") == config
