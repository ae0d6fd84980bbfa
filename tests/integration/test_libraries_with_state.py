"""Libraries that write state in each step, in LightningModules like those in their documentation."""

import copy
import sys

import pytest
import pytorch_lightning as pl
import torch
from real import QUIET, check_library, copy_tensor, run, trains
from torch import nn

from lightning_gr import SAM

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # warnings of the libraries, which we cannot fix
    pytest.mark.timeout(600),
]


def numbers(*shape):
    """Return random numbers, always the same for a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Module(pl.LightningModule):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_monai():
    """Augmentations are plain objects, each with its own RandomState."""
    transforms = pytest.importorskip("monai.transforms")
    from monai.losses import DiceLoss
    from monai.networks.nets import BasicUNet

    class Segmentation(Module):
        def __init__(self):
            super().__init__()
            self.net = BasicUNet(spatial_dims=2, out_channels=2, features=(4, 4, 4, 4, 4, 4))
            self.loss = DiceLoss(to_onehot_y=True, softmax=True)
            self.augment = transforms.Compose(
                [
                    transforms.RandFlip(prob=0.5, spatial_axis=1),
                    transforms.RandGaussianNoise(prob=0.5, std=0.5),
                    transforms.RandScaleIntensity(factors=0.5, prob=0.5),
                ]
            ).set_random_state(seed=0)

        def training_step(self, batch, batch_idx):
            images, labels = batch
            loss = self.loss(self.net(torch.stack([self.augment(image) for image in images])), labels)
            self.log("loss", loss)
            return loss

    images = numbers(12, 1, 32, 32)
    check_library(trains(Segmentation, images, (images > 0).float()))


def test_pina(monkeypatch):
    """A plain object keeps weights of the conditions, computed from the neural tangent kernel."""
    pytest.importorskip("pina")
    from pina import LabelTensor, Trainer
    from pina._src.core.utils import labelize_forward
    from pina.model import FeedForward
    from pina.problem.zoo import Poisson2DSquareProblem
    from pina.solver import PINN
    from pina.weighting import NeuralTangentKernelWeighting

    # the original method requires labels, which these tensors lose
    monkeypatch.setattr(LabelTensor, "__deepcopy__", copy_tensor)

    def train(callbacks):
        problem = Poisson2DSquareProblem()
        problem.discretise_domain(n=40, mode="random")
        model = FeedForward(input_dimensions=2, output_dimensions=1, layers=[8, 8])
        solver = PINN(problem=problem, model=model, weighting=NeuralTangentKernelWeighting(alpha=0.5))
        Trainer(solver, max_epochs=4, callbacks=callbacks, batch_size=20, train_size=1.0, **QUIET).train()

    def mend(solver):
        """Replace the ``forward`` of a copy, which is bound to the original."""
        del solver.forward
        names = solver.problem.input_variables, solver.problem.output_variables
        solver.forward = labelize_forward(solver.forward, *names)

    check_library(train, mend=mend)


class Quantized(Module):
    """An autoencoder with a codebook, as in the library's README."""

    options: dict

    def __init__(self):
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        self.encode, self.decode = nn.Linear(8, 6), nn.Linear(6, 8)
        self.quantize = VectorQuantize(dim=6, codebook_size=8, **self.options)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        quantized, _, loss = self.quantize(self.encode(x))
        loss = loss.sum() + nn.functional.mse_loss(self.decode(quantized), x)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize(
    "options",
    [
        {"affine_param": True, "sync_affine_param": False},
        {"kmeans_init": True, "threshold_ema_dead_code": 2},
        {"learnable_codebook": True, "ema_update": False},
    ],
    ids=["buffers that are None at first", "k-means", "its own optimizer"],
)
def test_vector_quantize_pytorch(options):
    pytest.importorskip("vector_quantize_pytorch")
    if "learnable_codebook" in options:
        options = {**options, "in_place_codebook_optimizer": lambda params: torch.optim.Adam(params, lr=1e-2)}
    check_library(trains(type("Kind", (Quantized,), {"options": options}), numbers(12, 5, 8)))


def copy_attributes(self, memo):
    """Deep-copy an object whose ``__new__`` prevents ``copy`` from doing so."""
    memo[id(self)] = made = object.__new__(type(self))
    made.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return made


def test_ema_pytorch(monkeypatch):
    """The step updates a teacher."""
    ema_pytorch = pytest.importorskip("ema_pytorch")
    monkeypatch.setattr(ema_pytorch.EMA, "__deepcopy__", copy_attributes, raising=False)

    class MeanTeacher(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
            self.teacher = ema_pytorch.EMA(self.net, beta=0.9, update_after_step=1, update_every=2)

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.teacher.update()
            out = self.net(x)
            return nn.functional.cross_entropy(out, y) + nn.functional.mse_loss(out, self.teacher(x))

        def configure_optimizers(self):
            return torch.optim.Adam(self.net.parameters(), lr=1e-2)

    check_library(trains(MeanTeacher, numbers(12, 8), torch.arange(12) % 3))


def test_pytorch_metric_learning():
    """The loss keeps a memory of embeddings."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    class Embeddings(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            loss = losses.NTXentLoss(temperature=0.5)
            self.loss = losses.CrossBatchMemory(loss, 4, memory_size=12, miner=MultiSimilarityMiner())

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.loss(self.net(x), y)

    check_library(trains(Embeddings, numbers(24, 8), torch.arange(24) % 3))


def test_gpytorch():
    """The first call of the model initializes variational parameters."""
    gpytorch = pytest.importorskip("gpytorch")

    class Process(gpytorch.models.ApproximateGP):
        def __init__(self):
            distribution = gpytorch.variational.CholeskyVariationalDistribution(6)
            super().__init__(gpytorch.variational.VariationalStrategy(self, numbers(6, 2), distribution))
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    class Regression(Module):
        def __init__(self):
            super().__init__()
            self.model, likelihood = Process(), gpytorch.likelihoods.GaussianLikelihood()
            self.loss = gpytorch.mlls.VariationalELBO(likelihood, self.model, num_data=12)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return -self.loss(self.model(x), y)

    check_library(trains(Regression, numbers(12, 2), numbers(12)), rho=0.5)


def test_diffusers():
    """A plain object keeps averaged weights in a list, and the step draws noise."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import EMAModel

    class Diffusion(Module):
        def __init__(self):
            super().__init__()
            sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
            blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
            self.net = diffusers.UNet2DModel(8, 1, 1, **sizes, **blocks)
            self.scheduler = diffusers.DDPMScheduler(20)
            self.average = EMAModel(self.net.parameters(), decay=0.9)

        def training_step(self, batch, batch_idx):
            (images,) = batch
            self.average.step(self.net.parameters())
            noise = torch.randn_like(images)
            times = torch.randint(20, (len(images),))
            out = self.net(self.scheduler.add_noise(images, noise, times), times).sample
            return nn.functional.mse_loss(out, noise)

    check_library(trains(Diffusion, numbers(8, 1, 8, 8)))


def test_torchrl():
    """The step fills a replay memory, draws from it, and moves a target network."""
    data = pytest.importorskip("torchrl.data")
    from tensordict import TensorDict
    from torchrl.modules import MLP, QValueActor
    from torchrl.objectives import DQNLoss, SoftUpdate

    class DQN(Module):
        def __init__(self):
            super().__init__()
            value = QValueActor(MLP(4, 3, num_cells=[8]), in_keys=["observation"], action_space="one_hot")
            self.loss = DQNLoss(value, action_space="one_hot", delay_value=True)
            self.loss.make_value_estimator(gamma=0.9)
            self.target = SoftUpdate(self.loss, eps=0.9)
            self.memory = data.ReplayBuffer(storage=data.LazyTensorStorage(20), batch_size=8)

        def training_step(self, batch, batch_idx):
            observation, following = batch
            # random actions, since copies of the loss would act by the original weights and not by the moved ones
            action = nn.functional.one_hot(torch.randint(3, (4,)), 3)
            outcome = {"observation": following, "reward": following.sum(-1, keepdim=True)}
            outcome |= {name: torch.zeros(4, 1, dtype=torch.bool) for name in ("done", "terminated")}
            self.memory.extend(TensorDict({"observation": observation, "action": action, "next": outcome}, [4]))
            loss = self.loss(self.memory.sample())["loss"]
            self.target.step()
            return loss

    check_library(trains(DQN, numbers(12, 4), numbers(12, 4)))


def train_scanvi(callbacks):
    scvi = pytest.importorskip("scvi")
    scvi.settings.seed = 0  # for the split of the data
    adata = scvi.data.synthetic_iid(batch_size=60)
    scvi.model.SCANVI.setup_anndata(adata, labels_key="labels", unlabeled_category="label_0", batch_key="batch")
    model = scvi.model.SCANVI(adata, n_hidden=16, n_latent=4)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "max_epochs": 2}
    model.train(callbacks=callbacks, train_size=0.9, batch_size=64, n_samples_per_label=10, **options)


def test_scanvi():
    """The module keeps a set of argument names, and trains a classifier along with the autoencoder."""
    check_library(train_scanvi, rho=0.1)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_an_exception_at_displaced_weights_has_a_note(monkeypatch):
    """torch's distributions reject parameters that are not finite, unless another library has disabled the check."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    with pytest.raises(ValueError, match="constraint") as raised:
        run(train_scanvi, SAM(1e30))
    assert "lightning_gr" in raised.value.__notes__[0]
