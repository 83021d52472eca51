"""Every way of spreading one loss over processes, replicas and chunks gives the gradients of the plain one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from dataloader.batch import Batch
from dataloader.tables import TokenTable
from model import CLIP, CLIPConfig
from tests.conftest import ROOT, SCRIPT_ENVIRONMENT, TINY, make_captions
from trainer.accumulation import backward_in_chunks
from trainer.config import load_train_config
from trainer.loss import LOSSES, Objective
from trainer.parallel import init_runtime, without_sync, wrap
from trainer.words import LOGIT_SCALE, WordLoss

VIT = {"vision_layers": 2, "vision_patch_size": 16, "vision_width": 64, "image_resolution": 32, "transformer_layers": 2}
NUM_PAIRS = 16
CAPTIONS = [[f"a photo of number {number % 5}", f"number {number % 3} in a photo"] for number in range(NUM_PAIRS)]
WORD_LOSS_WEIGHT = 0.7


def make_model(loss: str, **changes) -> CLIP:
    torch.manual_seed(5)
    return CLIP(CLIPConfig(**{**vars(TINY), **VIT, "logit_bias": loss == "sigmoid", **changes}))


def make_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(1, 49_000, (NUM_PAIRS, 12), generator=generator)
    tokens[:, 0], tokens[:, -1] = 49_406, 49_407
    return torch.randn(NUM_PAIRS, 3, 32, 32, generator=generator), tokens


def make_objective(model: CLIP, loss: str) -> Objective:
    """Return the objective of a run with the `loss`, which may be "softmax and words"."""
    name, _, words = loss.partition(" and ")
    config = load_train_config([("loss", name), ("word_loss_weight", WORD_LOSS_WEIGHT if words else 0.0)])
    return Objective(model, config, WordLoss(TokenTable(CAPTIONS, 77), torch.device("cpu")) if words else None)


def gradients_of(model: CLIP) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def plain_gradients(loss: str) -> dict[str, torch.Tensor]:
    """By the definition, in one process, with nothing of the trainer's."""
    model = make_model(loss)
    images, texts = model(*make_pairs())
    logits, partners = model.logit_scale.exp() * images @ texts.t(), torch.arange(NUM_PAIRS)
    if loss.startswith("softmax"):
        value = (F.cross_entropy(logits, partners) + F.cross_entropy(logits.t(), partners)) / 2
    else:
        value = F.softplus(-(2 * torch.eye(NUM_PAIRS) - 1) * (logits + model.logit_bias)).sum() / NUM_PAIRS
    if loss.endswith("words"):
        value = value + WORD_LOSS_WEIGHT * plain_word_loss(model, images, texts)
    value.backward()
    return gradients_of(model)


def plain_word_loss(model: CLIP, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """By the definition, with a matrix of all labels."""
    counts = torch.zeros(NUM_PAIRS, model.config.vocab_size)
    for row, captions in enumerate(CAPTIONS):
        for ids in model.tokenize(captions):
            for token in ids[1 : int(ids.argmax())]:
                counts[row, token] += 1
    occurs_in = (counts > 0).sum(dim=0)
    words = (occurs_in > 1) & (occurs_in < NUM_PAIRS)
    labels = counts[:, words] * torch.log(NUM_PAIRS / occurs_in[words])
    labels = labels / labels.sum(dim=1, keepdim=True)
    losses = []
    for features in (images, texts):
        logits = LOGIT_SCALE * features @ model.text_projection.t() @ model.token_embedding.weight[words].t()
        losses.append(F.cross_entropy(logits + labels.mean(dim=0).log(), labels))
    return sum(losses) / 2


def spread_gradients(rank: int, world_size: int, port: int, loss: str, chunks: int, folder: Path) -> None:
    """One process of `world_size`: its share of the pairs in `chunks`, by the trainer's own parts."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    runtime = init_runtime(load_train_config([("n_gpu", 0)]))
    model = make_model(loss)
    parallel_model = wrap(model, runtime, load_train_config())
    share = NUM_PAIRS // world_size
    indices = torch.arange(rank * share, (rank + 1) * share)
    images, tokens = (part[indices] for part in make_pairs())
    objective = make_objective(model, loss)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    if chunks > 1:
        parts = zip(images.chunk(chunks), tokens.chunk(chunks), strict=True)
        places = indices.chunk(chunks)
        batches = [Batch(part, ids, own, None, []) for (part, ids), own in zip(parts, places, strict=True)]
        backward_in_chunks(model, parallel_model, batches, objective, scaler)
    else:
        with without_sync(parallel_model, is_last=True):
            features = parallel_model(images, tokens)
            objective(*features, indices)[0].backward()
    if rank == world_size - 1:
        torch.save(gradients_of(model), folder / "gradients.pt")
    runtime.close()


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


@pytest.mark.parametrize("loss", [*LOSSES, "softmax and words"])
@pytest.mark.parametrize(("world_size", "chunks"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_gradients_equal_those_of_one_batch_in_one_process(tmp_path: Path, monkeypatch, loss, world_size, chunks):
    arguments = (world_size, free_port(), loss, chunks, tmp_path)
    if world_size == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "0")
        spread_gradients(0, *arguments)
    else:
        mp.spawn(spread_gradients, arguments, nprocs=world_size)
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, expected in plain_gradients(loss).items():
        torch.testing.assert_close(gradients[name], expected, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: n + text)


def test_dataparallel_gives_the_same_gradients():
    model = make_model("softmax")
    runtime = init_runtime(load_train_config([("n_gpu", 0)]))
    parallel_model = nn.DataParallel(wrap(model, runtime, load_train_config()))  # without GPUs it passes through
    LOSSES["softmax"](*parallel_model(*make_pairs()), model.logit_scale.exp())[0].backward()
    for name, expected in plain_gradients("softmax").items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, atol=1e-5, rtol=1e-4)


def test_chunks_count_batchnorm_once_and_see_their_own_statistics():
    resnet = {"vision_layers": (1, 1, 1, 1), "vision_patch_size": None, "vision_width": 8}
    models = [make_model("softmax", **resnet).train() for _ in range(2)]
    images, tokens = make_pairs()
    chunks = list(zip(images.chunk(4), tokens.chunk(4), strict=True))
    batches = [Batch(part, ids, torch.arange(len(ids)), None, []) for part, ids in chunks]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    backward_in_chunks(models[0], models[0], batches, make_objective(models[0], "softmax"), scaler)
    parts = [models[1](part, ids) for part, ids in chunks]
    features = [torch.cat(part) for part in zip(*parts, strict=True)]
    LOSSES["softmax"](*features, models[1].logit_scale.exp())[0].backward()
    for (name, buffer), expected in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=lambda text, n=name: n + text)
    for name, parameter in models[0].named_parameters():
        expected = models[1].get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-3)


def test_recomputed_activations_change_neither_gradients_nor_batchnorm():
    resnet = {"vision_layers": (1, 1, 1, 1), "vision_patch_size": None, "vision_width": 8}
    for changes in ({}, resnet):
        models = [make_model("softmax", **changes).train() for _ in range(2)]
        models[1].recompute_activations()
        for model in models:
            LOSSES["softmax"](*model(*make_pairs()), model.logit_scale.exp())[0].backward()
        for name, parameter in models[0].named_parameters():
            torch.testing.assert_close(models[1].get_parameter(name).grad, parameter.grad, atol=1e-6, rtol=1e-5)
        for buffer, expected in zip(models[1].buffers(), models[0].buffers(), strict=True):
            torch.testing.assert_close(buffer, expected)


def torchrun(*flags: object, output: Path, data: tuple[Path, Path], launch: tuple[str, ...], **options) -> list[str]:
    model = {"model.embed_dim": 32, "model.transformer_width": 64, "model.transformer_heads": 1}
    model |= {f"model.{key}": value for key, value in VIT.items()}
    changes = {**model, "trainer.num_workers": 0, "trainer.logging_steps": 2, "trainer.n_gpu": 0, **options}
    sets = [flag for key, value in changes.items() for flag in ("--set", f"{key}={value}")]
    command = [sys.executable, *launch, str(ROOT / "train.py"), "--model", "ViT-B-32", "--output_dir", output]
    command += ["--train_img_dir", data[0], "--train_annotation_file", data[1], *flags, *sets]
    return list(map(str, command))


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_and_two_nodes_train_as_one(tmp_path: Path):
    data = make_captions(tmp_path / "data")
    environment = {**SCRIPT_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    options = {
        "cwd": tmp_path,
        "env": environment,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }

    def start(output: str, batch_size: int, *launch: str) -> subprocess.Popen:
        flags = ("--epochs", 2, "--batch_size", batch_size)
        return subprocess.Popen(torchrun(*flags, output=tmp_path / output, data=data, launch=launch), **options)

    run = ("-m", "torch.distributed.run", "--nproc_per_node")
    rendezvous = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=1")
    launches = [
        [start("one", 8)],
        [start("two", 4, *run, "2", f"--master_port={free_port()}")],
        [start("nodes", 4, *run, "1", *rendezvous) for _ in range(2)],
    ]
    for processes in launches:
        for process in processes:
            printed, _ = process.communicate(timeout=300)
            assert process.returncode == 0, printed
    expected = rows_of(tmp_path / "one")
    weights = torch.load(tmp_path / "one" / "saved_checkpoints" / "checkpoint_1_6.pt", weights_only=True)
    for name in ("two", "nodes"):
        rows = rows_of(tmp_path / name)
        assert [row["step"] for row in rows] == [2, 4, 6]
        for row, wanted in zip(rows, expected, strict=True):
            for key in ("loss", "image_to_text_accuracy", "grad_norm", "lr", "logit_scale"):
                assert row[key] == pytest.approx(wanted[key], rel=2e-3), key
        checkpoint = torch.load(tmp_path / name / "saved_checkpoints" / "checkpoint_1_6.pt", weights_only=True)
        assert checkpoint["model_state_dict"].keys() == weights["model_state_dict"].keys()
        for key, value in checkpoint["model_state_dict"].items():
            if not key.endswith("in_proj_bias"):  # the keys' part has no gradient but rounding, which Adam scales up
                assert (value - weights["model_state_dict"][key]).abs().mean() < 1e-5, key


def test_a_killed_process_ends_the_run(tmp_path: Path):
    data = make_captions(tmp_path / "data")
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    flags = ("--epochs", 100_000, "--batch_size", 4)
    process = subprocess.Popen(
        torchrun(*flags, output=tmp_path / "out", data=data, launch=launch, **{"trainer.save_steps": 1_000_000}),
        cwd=tmp_path, env={**SCRIPT_ENVIRONMENT, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics = tmp_path / "out" / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    start = time.monotonic()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - start < 30
    assert "SIGKILL" in printed or "Signal 9" in printed
