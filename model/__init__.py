"""CLIP, its named architectures, and trained models from weights of any layout."""

from model.clip import CLIP
from model.config import CLIPConfig, load_model_config
from model.pretrained.files import read_checkpoint
from model.pretrained.inference import TrainedCLIP
from model.pretrained.weights import load_clip, load_weights

__all__ = ["CLIP", "CLIPConfig", "TrainedCLIP", "load_clip", "load_model_config", "load_weights", "read_checkpoint"]
