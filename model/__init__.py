"""CLIP, its named architectures, and the one loader for weights of any layout."""

from model.clip import CLIP
from model.config import CLIPConfig, load_model_config
from model.trained import TrainedCLIP
from model.weights import load_clip, load_weights, read_checkpoint

__all__ = ["CLIP", "CLIPConfig", "TrainedCLIP", "load_clip", "load_model_config", "load_weights", "read_checkpoint"]
