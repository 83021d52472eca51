"""Every way of spreading one loss over processes, replicas and chunks gives the gradients of the plain one."""

import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from dataloader.sampler import Batch
from dataloader.token_table import tokenize
from model import CLIP
from tests.conftest import TINY, make_captions
from tests.runs import Captions, ForkedRun, free_port, join, read_rows, start_forks, tiny_flags, torchrun, wait_for_rows
from trainer.config import load_train_config
from trainer.loss import LOSSES, Objective
from trainer.optional.accumulation import backward_in_chunks
from trainer.optional.word_loss import LOGIT_SCALE, WordLoss
from trainer.parallel import Runtime, init_runtime, wrap
from trainer.run.checkpoint import list_checkpoints

VIT = {"vision_layers": 2, "vision_patch_size": 16, "vision_width": 64, "image_resolution": 32, "transformer_layers": 2}
RESNET = {"vision_layers": (1, 1, 1, 1), "vision_patch_size": None, "vision_width": 8}
NUM_PAIRS = 16
CAPTIONS = [[f"a photo of number {number % 5}", f"number {number % 3} in a photo"] for number in range(NUM_PAIRS)]
WORD_LOSS_WEIGHT = 0.7
ALL_LOSSES = [*LOSSES, "softmax and words"]
CPU = Runtime(torch.device("cpu"), 1)
SCALER = torch.amp.GradScaler("cpu", enabled=False)
Gradients = dict[str, torch.Tensor]


def make_model(loss: str, **changes: object) -> CLIP:
    torch.manual_seed(5)
    return CLIP(dataclasses.replace(TINY, logit_bias=loss == "sigmoid", **{**VIT, **changes}))


def make_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(1, 49_000, (NUM_PAIRS, 12), generator=generator)
    tokens[:, 0], tokens[:, -1] = 49_406, 49_407
    return torch.randn(NUM_PAIRS, 3, 32, 32, generator=generator), tokens


def make_batches(indices: torch.Tensor, num_batches: int) -> list[Batch]:
    images, tokens = make_pairs()
    return [Batch(images[part], tokens[part], part, None, []) for part in indices.chunk(num_batches)]


def make_objective(model: CLIP, loss: str) -> Objective:
    """Return a run's objective with the `loss`, which may be "softmax and words"."""
    name, _, words = loss.partition(" and ")
    config = load_train_config({"loss": name, "word_loss_weight": WORD_LOSS_WEIGHT if words else 0.0})
    return Objective(model, config, WordLoss(tokenize(CAPTIONS, 77), torch.device("cpu")) if words else None)


def gradients_of(model: CLIP) -> Gradients:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def plain_gradients(loss: str) -> Gradients:
    """Compute the gradients by the definition, without the trainer."""
    model = make_model(loss)
    images, texts = model(*make_pairs())
    logits, targets = model.logit_scale.exp() * images @ texts.t(), torch.arange(NUM_PAIRS)
    if loss.startswith("softmax"):
        value = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2
    else:
        value = F.softplus(-(2 * torch.eye(NUM_PAIRS) - 1) * (logits + model.logit_bias)).sum() / NUM_PAIRS
    if loss.endswith("words"):
        value = value + WORD_LOSS_WEIGHT * plain_word_loss(model, images, texts)
    value.backward()
    return gradients_of(model)


def plain_word_loss(model: CLIP, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Compute the word loss by the definition, with a dense matrix of labels."""
    counts = torch.zeros(NUM_PAIRS, model.config.vocab_size)
    for row, captions in enumerate(CAPTIONS):
        for ids in model.tokenize(captions):
            for token in ids[1 : int(ids.argmax())]:
                counts[row, token] += 1
    document_frequency = (counts > 0).sum(dim=0)
    words = (document_frequency > 1) & (document_frequency < NUM_PAIRS)
    labels = counts[:, words] * torch.log(NUM_PAIRS / document_frequency[words])
    labels = labels / labels.sum(dim=1, keepdim=True)
    losses = []
    for features in (images, texts):
        logits = LOGIT_SCALE * features @ model.text_projection.t() @ model.token_embedding.weight[words].t()
        losses.append(F.cross_entropy(logits + labels.mean(dim=0).log(), labels))
    return sum(losses) / 2


def spread_gradients(num_batches: int, runtime: Runtime, losses: Sequence[str]) -> dict[str, Gradients]:
    """Compute the gradients with the trainer's own parts, from this process's share of the pairs."""
    share = NUM_PAIRS // runtime.world_size
    indices = torch.arange(runtime.rank * share, (runtime.rank + 1) * share)
    gradients = {}
    for loss in losses:
        model = make_model(loss)
        parallel_model, objective = wrap(model, runtime, load_train_config()), make_objective(model, loss)
        batches = make_batches(indices, num_batches)
        if num_batches > 1:
            backward_in_chunks(parallel_model, batches, objective, SCALER)
        else:
            objective(*parallel_model(batches[0].images, batches[0].tokens), indices)[0].backward()
        gradients[loss] = gradients_of(model)
    return gradients


def save_spread_gradients(rank: int, world_size: int, port: int, num_batches: int, folder: Path) -> None:
    """Run as one of `world_size` processes; the last one saves."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    runtime = init_runtime(load_train_config({"n_gpu": 0}))
    gradients = spread_gradients(num_batches, runtime, ALL_LOSSES)
    if rank == world_size - 1:
        torch.save(gradients, folder / "gradients.pt")
    runtime.close()


def assert_plain(gradients: Gradients, loss: str) -> None:
    for name, expected in plain_gradients(loss).items():
        torch.testing.assert_close(gradients[name], expected, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("num_batches", [1, 4])
def test_chunks_have_the_gradients_of_one_batch(loss, num_batches):
    assert_plain(spread_gradients(num_batches, CPU, [loss])[loss], loss)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "num_batches"), [(2, 1), (2, 2), (4, 1)])
def test_processes_have_the_gradients_of_one_batch_in_one_process(tmp_path: Path, world_size, num_batches):
    shared = (world_size, free_port(), num_batches, tmp_path)
    processes = start_forks(save_spread_gradients, [(rank, *shared) for rank in range(world_size)])
    assert join(processes) == [0] * world_size
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for loss in ALL_LOSSES:
        assert_plain(gradients[loss], loss)


def test_dataparallel_has_the_same_gradients():
    model = make_model("softmax")
    parallel_model = nn.DataParallel(wrap(model, CPU, load_train_config()))  # without GPUs it passes everything on
    LOSSES["softmax"](*parallel_model(*make_pairs()), model.logit_scale.exp())[0].backward()
    assert_plain(gradients_of(model), "softmax")


def test_chunks_update_batchnorm_once_and_use_their_own_statistics():
    models = [make_model("softmax", **RESNET).train() for _ in range(2)]
    batches = make_batches(torch.arange(NUM_PAIRS), 4)
    backward_in_chunks(models[0], batches, make_objective(models[0], "softmax"), SCALER)
    parts = [models[1](batch.images, batch.tokens) for batch in batches]
    features = [torch.cat(part) for part in zip(*parts, strict=True)]
    LOSSES["softmax"](*features, models[1].logit_scale.exp())[0].backward()
    for (name, buffer), expected in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=lambda text, n=name: n + text)
    for name, parameter in models[0].named_parameters():
        expected = models[1].get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, RESNET], ids=["vit", "resnet"])
def test_recomputed_activations_change_neither_gradients_nor_batchnorm(changes):
    models = [make_model("softmax", **changes).train() for _ in range(2)]
    models[1].recompute_activations()
    for model in models:
        LOSSES["softmax"](*model(*make_pairs()), model.logit_scale.exp())[0].backward()
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name).grad, parameter.grad, atol=1e-6, rtol=1e-5)
    for buffer, expected in zip(models[1].buffers(), models[0].buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


def vit_flags(data: Captions, output: Path, *, batch_size: int, **changes: object) -> list[str]:
    """Return the flags of a run without BatchNorm, which has other statistics in each process."""
    settings = {**{f"model.{key}": value for key, value in VIT.items()}, "trainer.n_gpu": 0, **changes}
    return [*tiny_flags(data, output, batch_size=batch_size, **settings), "--model", "ViT-B-32"]


@pytest.mark.slow
def test_two_processes_and_two_nodes_train_as_one(tmp_path: Path):
    data = make_captions(tmp_path / "data")
    train.main(vit_flags(data, tmp_path / "one", batch_size=8))
    rendezvous = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=1")
    two, nodes = (vit_flags(data, tmp_path / name, batch_size=4) for name in ("two", "nodes"))
    processes = [torchrun(nodes, 1, *rendezvous) for _ in range(2)]
    run = ForkedRun(two, tmp_path / "log.txt", 2)
    assert run.wait() == [0, 0], run.printed()
    for process in processes:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    expected = read_rows(tmp_path / "one")
    weights = saved_weights(tmp_path / "one")
    for name in ("two", "nodes"):
        rows = read_rows(tmp_path / name)
        assert [row["step"] for row in rows] == [2, 4, 6]
        for row, wanted in zip(rows, expected, strict=True):
            for key in ("loss", "image_to_text_accuracy", "grad_norm", "lr", "logit_scale"):
                assert row[key] == pytest.approx(wanted[key], rel=2e-3), key
        found = saved_weights(tmp_path / name)
        assert found.keys() == weights.keys()
        for key, value in found.items():
            if not key.endswith("in_proj_bias"):  # the gradient of the keys' part is rounding, which Adam scales up
                assert (value - weights[key]).abs().mean() < 1e-5, key


def saved_weights(output: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = list_checkpoints(output / "saved_checkpoints")
    assert checkpoint.name == "checkpoint_1_6.pt"
    return torch.load(checkpoint, weights_only=True)["model_state_dict"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of torchrun in /proc")
def test_a_killed_process_ends_the_run(tmp_path: Path):
    data = make_captions(tmp_path / "data")
    flags = vit_flags(data, tmp_path / "out", batch_size=4, **{"trainer.save_steps": 1_000_000})
    process = torchrun([*flags, "--epochs", "100000"], 2)
    wait_for_rows(tmp_path / "out", 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    start = time.monotonic()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - start < 30
    assert "SIGKILL" in printed or "Signal 9" in printed
