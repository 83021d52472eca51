"""The number of operators of a training step, which a GPU launches one by one: nothing is computed."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.train_step import Inputs, project_step
from model import CLIP, load_model_config

BUDGET = 1_450  # 3 % above the 1,410 of PyTorch 2.14; on a GPU the 255 norms of gradients are a few kernels


class CountOperators(TorchDispatchMode):
    """Counts the operators that compute something: no views, and no new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in operator._schema.returns]
        is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        name = operator._schema.name.removeprefix("aten::")
        if not is_view and not name.startswith(("prim::", "empty", "new_empty")) and name != "detach":
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.slow
def test_a_step_of_rn50_stays_within_its_budget_of_operators(monkeypatch):
    monkeypatch.setattr(CLIP, "to", lambda model, *args, **kwargs: model)  # fake parameters cannot be moved
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = Inputs(torch.empty(64, 3, 224, 224), torch.ones(64, 24, dtype=torch.int64))
        step, _ = project_step(load_model_config({"name": "RN50"}), inputs, "bf16")
        step()
        with CountOperators() as mode:
            step()
    assert sum(mode.counts.values()) <= BUDGET, mode.counts.most_common(12)
