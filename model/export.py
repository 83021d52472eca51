"""Write a trained CLIP for other programs: for open_clip, or as two ONNX graphs.

python -m model.export --checkpoint_path F --output DIR                   then open_clip.create_model("local-dir:DIR")
python -m model.export --checkpoint_path F --output DIR --format onnx     image_encoder.onnx, text_encoder.onnx
"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import CLIP, CLIPConfig, TrainedCLIP, load_clip
from utils.errors import UserError, run_script
from utils.flags import Parser, add_model_flags, model_settings
from utils.packages import quiet
from utils.text import one_line

OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_pytorch_model.bin")
ONNX_FILES = ("image_encoder.onnx", "text_encoder.onnx", "preprocessing.json")


class Encoder(nn.Module):
    """One encoder of a CLIP as an ONNX graph: L2-normalized features, float32 [batch, embed_dim]."""

    def __init__(self, model: CLIP, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(getattr(self.model, self.method)(inputs), dim=-1)


def export_open_clip(clip: TrainedCLIP, folder: Path) -> None:
    """Write the weights and the `open_clip_config.json` from which open_clip 3 builds the same model."""
    preprocessing = {"mean": clip.image_mean, "std": clip.image_std}
    preprocessing |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    content = {"model_cfg": open_clip_config(clip.model.config), "preprocess_cfg": preprocessing}
    (folder / OPEN_CLIP_FILES[0]).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    torch.save(clip.model.state_dict(), folder / OPEN_CLIP_FILES[1])


def open_clip_config(config: CLIPConfig) -> dict:
    """Return the architecture with open_clip's keys."""
    vision = {"image_size": config.image_resolution, "patch_size": config.vision_patch_size}
    vision |= {"layers": config.vision_layers, "width": config.vision_width, "head_width": config.vision_head_width}
    text = {"context_length": config.context_length, "vocab_size": config.vocab_size}
    text |= {"layers": config.transformer_layers, "width": config.transformer_width, "heads": config.transformer_heads}
    bias = {"init_logit_bias": 0.0} if config.logit_bias else {}  # creates the parameter; the weights set its value
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": text,
        **bias,
    }


def export_onnx(clip: TrainedCLIP, folder: Path) -> None:
    """Write both encoders, for any batch size, and the preprocessing that their inputs need.

    `image_encoder.onnx` maps normalized pixels, float32 [batch, 3, size, size], to features; `text_encoder.onnx` maps
    tokens, int64 [batch, context_length]. Raises UserError if a package is missing.
    """
    if missing := [package for package in ("onnx", "onnxscript") if find_spec(package) is None]:
        raise UserError(f"--format onnx needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    config = clip.model.config
    size, length = config.image_resolution, config.context_length
    tokens = F.pad(clip.model.tokenize(["a dog", "two cats"]), (0, length))[:, :length]
    inputs = {"image": ("pixels", torch.zeros(2, 3, size, size)), "text": ("tokens", tokens)}
    for (kind, (name, example)), file in zip(inputs.items(), ONNX_FILES, strict=False):
        with quiet():
            torch.onnx.export(
                Encoder(clip.model, f"encode_{kind}").eval(),
                (example,),
                folder / file,
                input_names=[name],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
            )
    preprocessing = {"image_size": size, "mean": clip.image_mean, "std": clip.image_std, "context_length": length}
    preprocessing["logit_scale"] = clip.model.logit_scale.exp().item()
    (folder / ONNX_FILES[2]).write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    checkpoint_help = "a checkpoint, or a directory (its newest checkpoint)"
    parser.add_argument("--checkpoint_path", required=True, metavar="PATH", help=checkpoint_help)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the directory for the files")
    parser.add_argument("--format", choices=["open_clip", "onnx"], default="open_clip", help="default: %(default)s")
    add_model_flags(parser)
    args = parser.parse_args(argv)

    files = OPEN_CLIP_FILES if args.format == "open_clip" else ONNX_FILES
    for file in files:
        if (args.output / file).exists():
            raise UserError(f"{args.output / file} already exists; move it away, or give another --output")
    clip = load_clip(args.checkpoint_path, **model_settings(args))
    if not isinstance(clip.model, CLIP):
        raise UserError(f"--checkpoint_path {args.checkpoint_path} is a model of open_clip; give a checkpoint of ours")
    if args.format == "open_clip" and clip.model.config.vision_variant != "clip":
        raise UserError(f"{args.checkpoint_path}: open_clip has no image encoder like SLIP's; add --format onnx")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (export_open_clip if args.format == "open_clip" else export_onnx)(clip, args.output)
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written ({error.strerror}); give another one") from None
    print(f"wrote {', '.join(files)} to {one_line(args.output)}")


if __name__ == "__main__":
    run_script(main)
