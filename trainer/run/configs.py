"""The configuration of a run: the packages' YAML files, overridden by a recipe, `--config FILE` and flags."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from dataloader.config import DataConfig, load_data_config
from model.config import CLIPConfig, load_model_config
from trainer.config import CONFIG_FILE, TrainConfig, load_train_config
from utils.config import Setting, flatten, nearest, parse_override, read_yaml, short_name
from utils.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PATH_FLAGS = ("train_img_dir", "train_annotation_file", "val_img_dir", "val_annotation_file")
KEY_OF_FLAG = {
    "model": "model.name",
    "recipe": "trainer.recipe",
    "epochs": "trainer.num_train_epochs",
    "batch_size": "trainer.per_gpu_train_batch_size",
    "allow_missing": "dataloader.allow_missing",
    **{flag: f"dataloader.{flag}" for flag in PATH_FLAGS},
}


class Configs(NamedTuple):
    """One configuration per package."""

    model: CLIPConfig
    trainer: TrainConfig
    dataloader: DataConfig


def load_configs(args: argparse.Namespace) -> Configs:
    """Merge, each over the one before: the packages' YAML files, the sample, the recipe, --config, --set, the flags.

    Raises UserError that names the file or flag and the key.
    """
    chosen = flatten(read_yaml(args.config), f"--config {args.config}") if args.config else {}
    chosen |= {key: Setting(value, "--set") for key, value in map(parse_override, args.set)}
    for flag, key in KEY_OF_FLAG.items():
        if (value := getattr(args, flag)) is not None:
            chosen[key] = Setting(value, f"--{flag}")
    default = Setting(read_yaml(CONFIG_FILE).get("recipe"), short_name(CONFIG_FILE))
    sample = _read_recipe(Setting("sample", "--sample")) if args.sample else {}
    settings = sample | _read_recipe(chosen.get("trainer.recipe", default)) | chosen
    sections: dict[str, dict[str, Any]] = {name: {} for name in Configs._fields}
    for dotted_key, setting in settings.items():
        section, _, key = dotted_key.partition(".")
        if section not in sections or not key:
            raise UserError(f"{setting.origin}: {dotted_key} should begin with {'., '.join(sections)}.")
        sections[section][key] = setting
    trainer = load_train_config(sections["trainer"])
    data = load_data_config(sections["dataloader"])
    if trainer.word_loss_weight and data.format == "stream":
        raise UserError("word_loss_weight needs all captions at the start, which a stream does not have; set it to 0")
    sections["model"]["logit_bias"] = trainer.loss == "sigmoid"
    return Configs(load_model_config(sections["model"]), trainer, data)


def _read_recipe(name: Setting) -> dict[str, Setting]:
    """Return the settings of a file in trainer/recipes. Raises UserError if there is none of this name."""
    recipes = {file.stem: file for file in RECIPES.glob("*.yaml")}
    if name.value not in recipes:
        choices = nearest(str(name.value), sorted(recipes))
        raise UserError(f"{name.origin}: trainer/recipes has no recipe {name.value!r}; {choices}")
    return flatten(read_yaml(recipes[name.value]), short_name(recipes[name.value]))
