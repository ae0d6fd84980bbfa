"""Python examples in the README run unchanged, and those of a page run in a common namespace."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def quiet_trainer(**options):
    return pl.Trainer(
        **options,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def steps():
    """A list that gets one entry per optimizer step."""
    taken = []
    with register_optimizer_step_post_hook(lambda *_: taken.append(1)):
        yield taken


@pytest.mark.filterwarnings("default")  # a Trainer with default options warns
def test_readme_runs_unchanged(steps, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("README.md")
    exec(compile(block, "README.md", "exec"), {})
    assert len(steps) == 3 * 64
    assert "regularized: 192 of 192 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "count"),
    [("docs/usage.md", 4), ("docs/methods.md", 2), ("docs/metrics.md", 1), ("docs/releases/0.1.0.md", 1)],
)
def test_examples_of_a_page_run(page, count, steps):
    data = TensorDataset(torch.randn(16, 4), torch.randint(2, (16,)))
    namespace = {"Trainer": quiet_trainer, "Model": Model, "model": Model(), "train_loader": DataLoader(data, 8)}
    namespace["torch"] = torch
    assert len(blocks(page)) == count
    for block in blocks(page):
        steps.clear()
        exec(compile(block, page, "exec"), namespace)
        assert steps


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_linked_files_exist(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_start_with_a_summary(page):
    title, answer = page.read_text(encoding="utf-8").split("\n\n")[:2]
    assert title.startswith("# ")
    assert answer.startswith(("**In short.**", "```"))  # a summary, or the command
