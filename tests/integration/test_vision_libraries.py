"""Libraries that need torchvision or torchaudio, which do not come with PyPI's CPU build of torch.

They are not part of the extra `integration`; docs/integrations.md says how to install them.
"""

import copy
import importlib.util

import pytest
import pytorch_lightning as pl
import torch
from real import QUIET, check_library, trains
from torch import nn

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # warnings of the libraries, which we cannot fix
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision"),
]


def numbers(*shape):
    """Return random numbers, always the same for a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def small():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def test_timm():
    """The step updates averages of weights and buffers, and the network has stochastic depth."""
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
            self.net = timm.models.VisionTransformer(**sizes, drop_path_rate=0.5, proj_drop_rate=0.1)
            self.average = ModelEmaV3(self.net, decay=0.9, use_warmup=True)

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.average.update(self.net, step=self.global_step)
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return create_optimizer_v2(self.net, opt="adamw", lr=1e-2)

    check_library(trains(Module, numbers(12, 3, 8, 8), torch.arange(12) % 3))


@pytest.mark.parametrize("method", ["EMA", "SWA"])
def test_torch_uncertainty(method):
    """The library's own LightningModule, whose averaged models get new tensors."""
    methods = pytest.importorskip("torch_uncertainty.methods")
    import lightning.pytorch
    from torch_uncertainty.routines import ClassificationRoutine

    def train(callbacks):
        model = methods.EMA(small(), momentum=0.9) if method == "EMA" else methods.SWA(small(), 0, 1)
        data = torch.utils.data.TensorDataset(numbers(12, 8), torch.arange(12) % 3)
        routine = ClassificationRoutine(
            model, num_classes=3, loss=nn.CrossEntropyLoss(), optim_recipe=torch.optim.Adam(model.parameters(), 1e-2)
        )
        loader = torch.utils.data.DataLoader(data, 4)
        lightning.pytorch.Trainer(max_epochs=2, callbacks=callbacks, **QUIET).fit(routine, loader, loader)

    check_library(train)


class DINO(pl.LightningModule):
    """DINO as in the library's documentation, on small vectors instead of images."""

    def __init__(self):
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.student_backbone = nn.Sequential(nn.Flatten(), nn.Linear(8, 8))
        self.student_head = DINOProjectionHead(8, 16, 4, 10, freeze_last_layer=1)
        self.teacher_backbone = copy.deepcopy(self.student_backbone)
        self.teacher_head = DINOProjectionHead(8, 16, 4, 10)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=10, warmup_teacher_temp_epochs=5)

    def training_step(self, batch, batch_idx):
        from lightly.models.utils import update_momentum

        update_momentum(self.student_backbone, self.teacher_backbone, m=0.9)
        update_momentum(self.student_head, self.teacher_head, m=0.9)
        teacher_out = [self.teacher_head(self.teacher_backbone(view)) for view in batch[:2]]
        student_out = [self.student_head(self.student_backbone(view)) for view in batch]
        return self.criterion(teacher_out, student_out, epoch=self.current_epoch)

    def on_after_backward(self):
        self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_lightly_dino():
    """The module cancels gradients in a hook, and moves its teacher."""
    pytest.importorskip("lightly")
    check_library(trains(DINO, *(numbers(12 + i, 8)[:12] for i in range(3))))


def test_lightly_prototypes():
    """SwAV: the step normalizes prototypes, and keeps a queue of features."""
    pytest.importorskip("lightly")
    from lightly.loss import SwaVLoss
    from lightly.loss.memory_bank import MemoryBankModule
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

    class SwAV(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(8, 8), SwaVProjectionHead(8, 8, 4)
            self.prototypes, self.loss = SwaVPrototypes(4, n_prototypes=6), SwaVLoss()
            self.queues = nn.ModuleList([MemoryBankModule(size=(8, 4)) for _ in range(2)])

        def training_step(self, batch, batch_idx):
            self.prototypes.normalize()
            features = [nn.functional.normalize(self.head(self.backbone(view)), dim=1) for view in batch]
            queued = [queue(each, update=True)[1] for queue, each in zip(self.queues, features, strict=True)]
            queued = [self.prototypes(each.t().detach()) for each in queued]
            return self.loss([self.prototypes(each) for each in features], [], queued)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    check_library(trains(SwAV, *(numbers(12 + i, 8)[:12] for i in range(2))))


def test_braindecode():
    """Augmentations each have a RandomState."""
    augmentation = pytest.importorskip("braindecode.augmentation")
    from braindecode.models import ShallowFBCSPNet

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = ShallowFBCSPNet(3, 2, n_times=120, final_conv_length="auto")
            self.augment = augmentation.Compose(
                [
                    augmentation.ChannelsDropout(0.5, p_drop=0.5, random_state=0),
                    augmentation.FTSurrogate(0.5, random_state=1),
                    augmentation.GaussianNoise(0.5, std=0.5, random_state=2),
                ]
            )

        def training_step(self, batch, batch_idx):
            x, y = self.augment(*batch)
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    check_library(trains(Module, numbers(12, 3, 120), torch.arange(12) % 2))
