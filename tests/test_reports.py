"""The output of zero_shot_eval.py and zero_shot_demo.py, for any data and any names."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zero_shot_demo
import zero_shot_eval
from dataloader.captions import read_captions
from model import CLIP, TrainedCLIP, load_clip
from tests.conftest import ROOT, TINY, make_captions
from tests.test_classification import write_cifar100
from tests.test_imagenet import make_set
from utils import imagenet
from utils.device import choose_device
from utils.errors import UserError
from utils.reports import write_retrieval
from utils.retrieval import retrieval_metrics

HOSTILE = [
    "../../escape",
    "$x_1$ & <b>",
    "two\nlines",
    "\u202egnp.exe",
    "שלום עולם",
    "\x1b[31mred",
    "a" * 300,
    "%s {} \\",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Return the working directory, with two checkpoints."""
    monkeypatch.chdir(tmp_path)
    for seed, run in enumerate(("first", "second")):
        torch.manual_seed(seed)
        (tmp_path / run).mkdir()
        torch.save({"model_state_dict": CLIP(TINY).state_dict()}, tmp_path / run / "checkpoint_0_1.pt")
    return tmp_path


def evaluate(*flags: object, checkpoint: str = "first") -> None:
    zero_shot_eval.main(["--checkpoint_path", checkpoint, *map(str, flags)])


def result(name: str) -> dict:
    return json.loads(Path("zero_shot_eval_output", f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_imagenet_a_has_its_own_classes_as_candidates(folder: Path, capsys):
    ids = imagenet.subset_ids("A")
    data_dir = make_set(folder / "imagenet-a", [ids[0], ids[7], ids[199]])
    evaluate("--dataset_type", "imagenet", "--data_dir", data_dir, "--templates", "simple")
    content = result("imagenet-a")
    assert (content["dataset"], content["num_images"], content["num_classes"]) == ("ImageNet-A", 3, 200)
    assert content["num_templates"] == 7 and content["chance_top1"] == 0.5
    assert [row["id"] for row in content["classes"]] == ids
    assert [row["num_images"] for row in content["classes"] if row["num_images"]] == [1, 1, 1]
    table = Path("zero_shot_eval_output/imagenet-a.txt").read_text().splitlines()
    header = table.index("")
    assert (
        len(table) - header == 205
        and table[header + 5].split(maxsplit=2)[2] == f"{imagenet.classnames()[ids[0]]}  {ids[0]}"
    )
    for picture in ("confusion", "classes"):
        assert Image.open(f"zero_shot_eval_output/imagenet-a_{picture}.png").size[0] > 500
    assert "ImageNet-A: 3 images of 200 classes" in capsys.readouterr().out


def test_imagenets_default_are_the_80_templates_and_others_have_one(folder: Path, monkeypatch):
    asked = []

    class StopError(Exception):
        pass

    def build_classifier(self, classnames, templates):
        asked.append((len(classnames), len(templates)))
        raise StopError

    monkeypatch.setattr(TrainedCLIP, "build_classifier", build_classifier)
    make_set(folder / "val", ["n01440764"])
    for kind in ("imagenet", "folder"):
        names = ["--class_names", "fish"] if kind == "folder" else []
        with pytest.raises(StopError):
            evaluate("--dataset_type", kind, "--data_dir", "val", *names)
    assert asked == [(1000, 80), (1, 1)]


@pytest.mark.slow
def test_retrieval_writes_the_metrics_of_the_python_api(folder: Path, capsys):
    img_dir, annotation_file = make_captions(folder / "data")
    (img_dir / "000000000003.png").write_bytes(b"x")
    evaluate(
        "--dataset_type", "retrieval", "--data_dir", img_dir, "--annotation_file", annotation_file, "--allow_missing"
    )
    content = result("captions")
    caption_set = read_captions(img_dir, annotation_file)
    captions = [image.captions for image in caption_set.images]
    features, _ = load_clip("first").encode_captioned(caption_set.files, captions, batch_size=7, num_workers=0)
    recalls = retrieval_metrics(*features)
    assert {key: content[key] for key in recalls} == pytest.approx(recalls)
    assert (content["num_images"], content["num_captions"], content["skipped_images"]) == (23, 46, 1)
    assert 1 <= content["image_to_text_median_rank"] <= 46 and "folds" not in content
    text = Path("zero_shot_eval_output/captions.txt").read_text()
    assert "\n23 images, 46 captions\n" in text and text.count("median rank") == 2
    assert "skipped" in capsys.readouterr().out
    assert Image.open("zero_shot_eval_output/captions.png").size[0] > 500


def test_retrieval_uses_karpathys_test_split(folder: Path):
    img_dir, _ = make_captions(folder / "data", num_images=6)
    images = [
        {"filename": file.name, "split": split, "sentences": [{"raw": f"picture {number}"}]}
        for number, (file, split) in enumerate(
            zip(sorted(img_dir.iterdir()), ["train", "test", "val", "test", "test", "restval"], strict=True)
        )
    ]
    (folder / "dataset_tiny.json").write_text(json.dumps({"images": images}))
    evaluate("--dataset_type", "retrieval", "--data_dir", img_dir, "--annotation_file", "dataset_tiny.json")
    assert result("dataset_tiny")["num_images"] == 3


def test_more_than_a_thousand_images_are_measured_in_folds_too(folder: Path):
    files = sorted(make_captions(folder / "data", num_images=4)[0].iterdir()) * 501
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2004, 8, generator=generator)
    image_of_text = torch.arange(2004).repeat_interleave(2)
    texts = images[image_of_text] + torch.randn(4008, 8, generator=generator)
    Path("out").mkdir()
    write_retrieval(Path("out/many"), (images, texts, image_of_text), files, [["a", "b"]] * 2004, {})
    content = json.loads(Path("out/many.json").read_text())
    assert content["folds"]["num_folds"] == 2
    assert content["folds"]["text_to_image_R@1"] > content["text_to_image_R@1"]
    assert "mean over 2 folds of 1,000 images" in Path("out/many.txt").read_text()


@pytest.mark.slow
def test_compared_models_share_a_table_and_overwrite_nothing(folder: Path, capsys):
    for name in ("apple", "bus"):
        (folder / "set" / name).mkdir(parents=True)
        Image.effect_noise((40, 40), 50).save(folder / "set" / name / "1.png")
    flags = ["--dataset_type", "folder", "--data_dir", "set"]
    evaluate(*flags)
    before = Path("zero_shot_eval_output/set.txt").read_bytes()
    zero_shot_eval.main(["--compare", "first/checkpoint_0_1.pt", "second", *flags])
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split() == ["top-1", "%", "top-5", "%"]
    assert [row.split()[0] for row in table[1:]] == ["checkpoint_0_1", "second"]
    assert result("set-checkpoint_0_1")["checkpoint"] == "first/checkpoint_0_1.pt"
    assert result("set-second")["checkpoint"] == "second/checkpoint_0_1.pt"
    assert Path("zero_shot_eval_output/set.txt").read_bytes() == before


@pytest.mark.slow
def test_results_of_another_model_folder_or_prompt_are_kept(folder: Path, capsys):
    """The weights count, not their file's name."""
    data_dir = make_set(folder / "set", ["apple", "bus"])
    flags = ["--dataset_type", "folder", "--output", "out/results", "--templates", "a {}"]
    evaluate(*flags, "--data_dir", data_dir)
    names = {path.name for path in Path("out/results").iterdir()}
    assert names == {"set.txt", "set.json", "set_confusion.png", "set_classes.png"}
    first = Path("out/results/set.json").read_bytes()
    evaluate(*flags, "--data_dir", make_set(folder / "other" / "set", ["apple", "bus"]))
    evaluate(*flags, "a photo of {}", "--data_dir", data_dir)
    shutil.copy("second/checkpoint_0_1.pt", "first/checkpoint_0_1.pt")
    evaluate(*flags, "--data_dir", data_dir)
    assert {path.name for path in Path("out/results").glob("*.json")} == {
        "set.json", "set-2.json", "set-3.json", "set-4.json"
    }  # fmt: skip
    assert (
        Path("out/results/set.json").read_bytes() == first and "wrote out/results/set-4.txt" in capsys.readouterr().out
    )
    evaluate(*flags, "--data_dir", data_dir)
    assert len(list(Path("out/results").iterdir())) == 16


@pytest.mark.slow
def test_text_json_and_pictures_name_model_data_and_date(folder: Path):
    img_dir, annotation_file = make_captions(folder / "data", num_images=3)
    evaluate("--dataset_type", "retrieval", "--data_dir", img_dir, "--annotation_file", annotation_file)
    evaluate("--dataset_type", "folder", "--data_dir", make_set(folder / "set", ["apple", "bus"]))
    for name, data, suffixes in (("captions", img_dir, (".png",)), ("set", "set", ("_confusion.png", "_classes.png"))):
        content = result(name)
        assert content["checkpoint"] == "first/checkpoint_0_1.pt" and content["digest"] == load_clip("first").digest
        assert content["data"] == str(Path(data).resolve()) and content["date"].startswith("20")
        text = Path(f"zero_shot_eval_output/{name}.txt").read_text(encoding="utf-8")
        for suffix in suffixes:
            described = Image.open(f"zero_shot_eval_output/{name}{suffix}").info["Description"]
            assert text.startswith(described + "\n")
            assert all(content[key] in described for key in ("checkpoint", "digest", "data", "date"))


def test_a_file_of_the_same_name_is_kept(folder: Path):
    Path("zero_shot_eval_output").mkdir()
    Path("zero_shot_eval_output/set.txt").write_text("my notes")
    evaluate("--dataset_type", "folder", "--data_dir", make_set(folder / "set", ["apple", "bus"]))
    assert Path("zero_shot_eval_output/set.txt").read_text() == "my notes" and result("set-2")["num_images"] == 2


def test_the_demo_keeps_the_figure_of_another_model(folder: Path, capsys):
    data_dir = make_set(folder / "set", ["apple"]) / "apple"
    flags = ["--img_dir", str(data_dir), "--class_names", "a", "b", "--show_predictions"]
    (data_dir / "a.heic").touch()
    for checkpoint in ("first", "second", "first"):
        zero_shot_demo.main(["--checkpoint_path", checkpoint, *flags])
    assert sorted(path.name for path in Path("demo_output").iterdir()) == ["demo-2.png", "demo.png"]
    assert "left out: 1 files that are not images by their suffix (e.g. a.heic)" in capsys.readouterr().out
    for name, checkpoint in (("demo", "first"), ("demo-2", "second")):
        assert f"{checkpoint}/checkpoint_0_1.pt" in Image.open(f"demo_output/{name}.png").info["Description"]


def test_predictions_have_a_row_for_each_image(folder: Path):
    data_dir = make_set(folder / "set", ["0_apple", "1_apple", "2_a, b"])
    (data_dir / "2_a, b" / "2.png").write_bytes(b"x")
    flags = ["--dataset_type", "folder", "--data_dir", data_dir, "--class_names", "apple", "apple", "a, b"]
    with pytest.raises(UserError, match="1 of the 4 held-out images"):
        evaluate(*flags)
    flags.append("--allow_missing")
    evaluate(*flags, "--predictions", "new/p.csv")
    with Path("new/p.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "label", *(f"{name}_{k}" for k in (1, 2, 3) for name in ("class", "probability"))]
    files = [row[0] for row in rows]
    assert files == [str(file) for file in sorted(data_dir.glob("*/*"))] and rows[-1][2:] == [""] * 6
    assert [row[1] for row in rows] == ["apple (0_apple)", "apple (1_apple)", "a, b", "a, b"]
    expected = load_clip("first").classify(files[:3], ["apple", "apple", "a, b"])
    for row, probabilities in zip(rows[:3], expected, strict=True):
        assert [float(value) for value in row[3::2]] == pytest.approx(probabilities.sort(descending=True)[0], abs=1e-4)
    with pytest.raises(UserError, match="p.csv already exists"):
        evaluate(*flags, "--predictions", "new/p.csv")


def test_predictions_name_the_images_of_cifar_by_number(folder: Path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    data_dir = write_cifar100(folder, monkeypatch, pixels, [1, 0, 1], ["apple", "palm_tree"])
    evaluate("--dataset_type", "cifar", "--data_dir", data_dir, "--predictions", "p.csv")
    rows = list(csv.reader(Path("p.csv").read_text().splitlines()))[1:]
    assert [row[:2] for row in rows] == [["0", "palm tree"], ["1", "apple"], ["2", "palm tree"]]
    top1 = 100 * sum(row[1] == row[2] for row in rows) / 3
    assert result("CIFAR100")["top1"] == pytest.approx(top1)


@pytest.mark.parametrize(
    ("checkpoints", "labels"),
    [
        (["a/checkpoint_1_2.pt", "b/checkpoint_1_3.pt"], ["checkpoint_1_2", "checkpoint_1_3"]),
        (["a/saved/c.pt", "b/saved/c.pt"], ["a-saved-c", "b-saved-c"]),
        (["open_clip:RN50/openai", "open_clip:RN50/cc12m"], ["RN50-openai", "RN50-cc12m"]),
        (["open_clip:RN50/../x/y z.pt", "runs/v1.0"], ["RN50-y-z", "v1.0"]),
    ],
)
def test_labels_are_the_parts_of_paths_that_differ(checkpoints, labels):
    assert zero_shot_eval.label_models(checkpoints) == labels


def test_a_model_given_twice_is_refused():
    with pytest.raises(UserError, match="given twice"):
        zero_shot_eval.label_models(["a/c.pt", "./a/c.pt"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset_type", "folder", "--annotation_file", "a.json"],
        ["--dataset_type", "retrieval", "--templates", "single"],
        ["--dataset_type", "imagenet", "--class_names", "a"],
        ["--dataset_type", "folder", "--compare", "x"],
        ["--dataset_type", "folder", "--batch_size", "0"],
        ["--dataset_type", "retrieval", "--predictions", "a.csv"],
    ],
)
def test_flags_without_an_effect_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        evaluate("--data_dir", ".", *flags)
    assert "error: " in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_reported_before_the_work(folder: Path, monkeypatch):
    Path("zero_shot_eval_output").touch()
    make_set(folder / "set", ["apple"])
    monkeypatch.setattr(TrainedCLIP, "encode_readable", None)
    with pytest.raises(UserError, match="zero_shot_eval_output/ cannot be written .* --output"):
        evaluate("--dataset_type", "folder", "--data_dir", "set")
    with pytest.raises(UserError, match="zero_shot_eval_output/ cannot be written .* --predictions"):
        evaluate(
            "--dataset_type", "folder", "--data_dir", "set", "--output", "o", "--predictions", "zero_shot_eval_output/p"
        )


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_hostile_class_names_write_no_other_files(folder: Path, capsys):
    work = folder / "work"
    data_dir = make_set(work / "set", [f"class{number}" for number in range(len(HOSTILE))])
    before = files_of(folder)
    flags = ["--class_names", *HOSTILE]
    evaluate("--dataset_type", "folder", "--data_dir", data_dir, *flags)
    zero_shot_demo.main(
        ["--checkpoint_path", "first", "--img_dir", str(data_dir / "class0"), "--show_predictions", *flags]
    )
    written = files_of(folder) - before
    assert {Path(file).parts[0] for file in written} == {"zero_shot_eval_output", "demo_output"}
    table = Path("zero_shot_eval_output/set.txt").read_text(encoding="utf-8").splitlines()
    assert len(table) - table.index("") == 5 + len(HOSTILE)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed
    assert [row["class"] for row in result("set")["classes"]][:2] == ["../../escape", "$x 1$ & <b>"]


@pytest.mark.slow
def test_hostile_captions_and_texts_do_not_break_a_figure(folder: Path, capsys):
    img_dir, _ = make_captions(folder / "data", num_images=len(HOSTILE))
    images = [{"id": number, "file_name": file.name} for number, file in enumerate(sorted(img_dir.iterdir()))]
    annotations = [{"image_id": number, "caption": text} for number, text in enumerate(HOSTILE)]
    Path("hostile.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    evaluate("--dataset_type", "retrieval", "--data_dir", img_dir, "--annotation_file", "hostile.json")
    assert Path("zero_shot_eval_output/hostile.png").stat().st_size > 10_000
    zero_shot_demo.main(
        ["--checkpoint_path", "first", "--img_dir", str(img_dir), "--texts", *HOSTILE, "--output", "out"]
    )
    assert Path("out/similarity.png").stat().st_size > 10_000 and "\x1b" not in capsys.readouterr().out


def test_the_demo_prints_json_and_nothing_else(folder: Path, capsys):
    img_dir, _ = make_captions(folder / "data", num_images=3)
    (img_dir / "broken\n.png").write_bytes(b"x")
    flags = ["--checkpoint_path", "first", "--img_dir", str(img_dir), "--json", "--top_k", "2"]
    zero_shot_demo.main([*flags, "--class_names", "cat", "dog", "bus", "--show_predictions", "--output", "figures"])
    content = json.loads(capsys.readouterr().out)
    clip = load_clip("first")
    files = [entry["file"] for entry in content["images"]]
    probabilities = clip.classify(files, ["cat", "dog", "bus"])
    for row, entry in zip(probabilities, content["images"], strict=True):
        best = row.topk(2)
        assert [["cat", "dog", "bus"].index(found["class"]) for found in entry["predictions"]] == best.indices.tolist()
        assert [found["probability"] for found in entry["predictions"]] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert [Path(entry["file"]).name for entry in content["skipped"]] == ["broken\n.png"]
    assert content["checkpoint"] == "first/checkpoint_0_1.pt" and Path("figures/demo.png").is_file()


def test_the_demo_prints_the_similarities_of_texts_as_json(folder: Path, capsys):
    img_dir, _ = make_captions(folder / "data", num_images=2)
    flags = ["--checkpoint_path", "first", "--img_dir", str(img_dir), "--json"]
    zero_shot_demo.main([*flags, "--texts", "a cat", "a cat", "a bus"])
    content = json.loads(capsys.readouterr().out)
    clip = load_clip("first")
    expected = (
        clip.encode_image([entry["file"] for entry in content["images"]]) @ clip.encode_text(content["texts"]).t()
    )
    np.testing.assert_allclose([entry["similarities"] for entry in content["images"]], expected, atol=1e-5)


def test_retrieval_reads_any_table_by_the_names_of_its_columns(folder: Path):
    img_dir, _ = make_captions(folder / "data", num_images=3)
    rows = [f"{file.name},a picture,{index}" for index, file in enumerate(sorted(img_dir.iterdir()))]
    Path("table.txt").write_text("\n".join(["image,words,number", *rows]) + "\n")
    flags = ["--dataset_type", "retrieval", "--data_dir", img_dir, "--annotation_file", "table.txt", "--format", "csv"]
    evaluate(*flags, "--csv_image_column", "image", "--csv_caption_column", "words")
    assert (result("table")["num_images"], result("table")["num_captions"]) == (3, 3)
    with pytest.raises(UserError, match="--csv_caption_column"):
        evaluate(*flags, "--csv_image_column", "image")


def test_the_demo_finds_its_test_images_from_any_folder(folder: Path, capsys):
    zero_shot_demo.main(["--checkpoint_path", "first"])
    assert capsys.readouterr().out.count("%") == 5 * len(list((ROOT / "test_images").glob("*.*")))


def test_an_unavailable_device_is_refused(folder: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="the device cuda is not available"):
        zero_shot_demo.main(["--checkpoint_path", "first", "--device", "cuda"])
    assert choose_device() == torch.device("cpu")


LATE = ("open_clip", "onnx", "matplotlib", "torch")


@pytest.mark.slow
@pytest.mark.parametrize(("module", "imported"), [("zero_shot_demo", LATE[:3]), ("zero_shot_eval", LATE[:2])])
def test_imports_that_take_long_wait_until_they_are_needed(module, imported):
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {imported}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("script", ["zero_shot_demo.py", "zero_shot_eval.py"])
def test_help_does_not_import_pytorch(script):
    output = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / script, "--help"], capture_output=True, text=True
    )
    imported = {line.rpartition("|")[2].strip() for line in output.stderr.splitlines()}
    assert output.returncode == 0 and "argparse" in imported and not imported & set(LATE)
