"""ImageNet's classes and prompts: names and templates from `open_clip`, WordNet ids from `timm`."""

import runpy
from functools import lru_cache

from utils.packages import package_file

SUBSETS = {"A": "imagenet_a_synsets.txt", "R": "imagenet_r_synsets.txt"}  # 200 classes each


@lru_cache(maxsize=1)
def classnames() -> dict[str, str]:
    """Return OpenAI's names of the 1,000 classes by WordNet id, in the order of the class indices."""
    return dict(zip(_lines("imagenet_synsets.txt"), _open_clip()["IMAGENET_CLASSNAMES"], strict=True))


def subset_ids(subset: str) -> list[str]:
    """Return the WordNet ids of the classes of ImageNet-A or ImageNet-R, in the order of their indices."""
    return _lines(SUBSETS[subset])


def templates(name: str) -> list[str]:
    """Return OpenAI's 80 prompts for ImageNet (`openai`) or the best 7 of them (`simple`), with {} for the class."""
    prompts = _open_clip()[{"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}[name]]
    return [prompt("{}") for prompt in prompts]


@lru_cache(maxsize=1)
def _open_clip() -> dict:
    return runpy.run_path(str(package_file("open_clip", "zero_shot_metadata.py")))


def _lines(table: str) -> list[str]:
    return package_file("timm", f"data/_info/{table}").read_text(encoding="utf-8").split()
