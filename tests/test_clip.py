import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import CLIP, load_model_config, load_weights
from model.resnet import AttentionPool2d
from tests.conftest import TINY
from utils.tokenizer import get_tokenizer

PEERS = {"RN50-OpenAI": "RN50-quickgelu", "ViT-B-32": "ViT-B-32-quickgelu"}


@pytest.fixture(scope="module", params=PEERS)
def peers(request):
    """Return our model and open_clip's of the same sizes, each with its own random weights."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(1)
    ours = CLIP(load_model_config([("name", request.param)])).eval()
    return ours, open_clip.create_model(PEERS[request.param]).eval()


@pytest.mark.slow
@torch.inference_mode()
def test_features_equal_open_clips_both_ways(peers):
    ours, theirs = peers
    images, tokens = torch.randn(2, 3, 224, 224), get_tokenizer()(["a dog", "a long caption of a small brown dog"])
    padded = F.pad(tokens, (0, 77 - tokens.shape[1]))  # open_clip's text encoder takes 77 tokens only
    for source, target in ((theirs, ours), (ours, theirs)):
        if target is ours:
            load_weights(ours, source.state_dict(), "open_clip")
        else:
            torch.manual_seed(2)
            fresh = CLIP(ours.config).eval()
            theirs.load_state_dict(fresh.state_dict(), strict=True)
            ours.load_state_dict(fresh.state_dict())
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(padded), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_reference_model_has_its_number_of_parameters_and_names():
    model = CLIP(load_model_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_092_833
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes["visual.layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["visual.attnpool.positional_embedding"] == (50, 2048)
    assert shapes["transformer.resblocks.5.attn.in_proj_weight"] == (1536, 512)
    assert shapes["text_projection"] == (512, 1024)
    assert shapes["logit_scale"] == ()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


@torch.inference_mode()
def test_trimming_a_text_does_not_change_its_feature(tiny_model):
    texts = ["a cat", "two small dogs on the green grass by the sea", ""]
    trimmed = [get_tokenizer()([text], multiple=1) for text in texts]
    assert [tokens.shape[1] for tokens in trimmed] == [4, 12, 2]
    padded = torch.cat([F.pad(tokens, (0, 77 - tokens.shape[1])) for tokens in trimmed])
    expected = tiny_model.encode_text(padded)
    for tokens, feature in zip(trimmed, expected, strict=True):
        torch.testing.assert_close(tiny_model.encode_text(tokens)[0], feature, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_tokens_before_the_end_marker_matter_and_later_ones_do_not(tiny_model):
    tokens = get_tokenizer()(["a red bus"], multiple=8)
    after, before = tokens.clone(), tokens.clone()
    after[0, -1], before[0, 1] = 123, 123
    feature = tiny_model.encode_text(tokens)
    torch.testing.assert_close(tiny_model.encode_text(after), feature)
    assert not torch.allclose(tiny_model.encode_text(before), feature)


@torch.inference_mode()
def test_attention_pool_equals_full_multi_head_attention():
    torch.manual_seed(0)
    pool = AttentionPool2d(spatial_dim=3, channels=64, heads=4, output_dim=16)
    x = torch.randn(2, 64, 3, 3)
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
    heads = lambda y: y.unflatten(-1, (4, 16)).permute(1, 2, 0, 3)  # noqa: E731  [batch, heads, length, 16]
    q, k, v = (heads(projection(tokens)) for projection in (pool.q_proj, pool.k_proj, pool.v_proj))
    weights = (q @ k.transpose(-1, -2) / 4).softmax(-1)  # 4 = sqrt(16)
    expected = pool.c_proj((weights @ v).permute(2, 0, 1, 3).flatten(2))[0]
    torch.testing.assert_close(pool(x), expected)


def test_residual_branches_start_as_the_identity(tiny_model):
    gains = [module.bn3.weight for module in tiny_model.visual.layer1]
    assert all((gain == 0).all() for gain in gains)


def test_features_are_normalized_and_images_reach_the_convolutions_channels_last(tiny_model):
    layouts = []
    hook = lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))  # noqa: E731
    tiny_model.visual.conv1.register_forward_pre_hook(hook)
    image_features, text_features = tiny_model(torch.randn(3, 3, 32, 32), get_tokenizer()(["a", "b", "c"]))
    assert layouts == [True]
    for features in (image_features, text_features):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))


def test_images_of_another_size_are_refused(tiny_model):
    with pytest.raises(ValueError, match="\\[batch, 3, 32, 32\\], found \\[1, 3, 64, 64\\]"):
        tiny_model.encode_image(torch.randn(1, 3, 64, 64))


def test_every_parameter_gets_a_gradient():
    model = CLIP(TINY)
    nn.init.ones_(model.visual.layer1[0].bn3.weight)
    image_features, text_features = model(torch.randn(4, 3, 32, 32), get_tokenizer()(["a", "b", "c", "d"]))
    (model.logit_scale.exp() * image_features @ text_features.t()).diag().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
