"""The README's Python examples run, in order, in one namespace."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

README = Path(__file__).parents[2] / "README.md"


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(**options):
    return pl.Trainer(
        **options,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize(("page", "count"), [("README.md", 4), ("docs/methods.md", 2)])
def test_examples_run(page, count):
    text = (README.parent / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= count
    data, steps = TensorDataset(torch.randn(16, 4), torch.randint(2, (16,))), []
    namespace = {"Trainer": quiet_trainer, "Model": Model, "model": Model(), "train_loader": DataLoader(data, 8)}
    namespace["torch"] = torch
    with register_optimizer_step_post_hook(lambda *_: steps.append(1)):
        for block in blocks:
            steps.clear()
            exec(compile(block, page, "exec"), namespace)
            assert steps


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)h][^)]*)\)", README.read_text(encoding="utf-8")))
def test_readme_files_exist(link):
    assert (README.parent / link).exists()
