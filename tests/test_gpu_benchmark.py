"""benchmarks.gpu at a tiny size on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from utils.errors import UserError

SECTIONS = ["steps_8", "steps_4", "profile", "repeat", "save", "augment", "largest"]


@pytest.mark.slow
def test_every_section_gives_rows_and_a_section_without_time_is_open(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(["--toy", "--output", str(tmp_path), "--only", *SECTIONS, "--minutes", "30"])
    content = json.loads((tmp_path / "results.json").read_text())
    assert not content["open"] and set(content["results"]) == set(SECTIONS)
    rows = {row["row"]: row for row in content["results"]["steps_8"]}
    assert rows["project"]["pairs/s"] > 0 and rows["open_clip"]["ratio"] == 1
    assert all(row["equal"] for row in content["results"]["repeat"])
    assert (tmp_path / "steps.png").stat().st_size > 1000
    gpu.main(["--toy", "--output", str(tmp_path), "--only", "save", "--minutes", "0"])
    assert "save" in json.loads((tmp_path / "results.json").read_text())["open"]


def test_without_a_gpu_it_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU; --toy"):
        gpu.main(["--output", str(tmp_path)])
    with pytest.raises(UserError, match="--only nothing"):
        gpu.main(["--toy", "--only", "nothing"])
