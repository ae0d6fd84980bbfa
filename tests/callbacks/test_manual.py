"""The state of the mixin between calls: kept per Trainer and optimizer, and never copied with the module."""

import copy
import pickle

import pytest
import pytorch_lightning as pl
import torch
from modules import Manual, TinyModule, assert_near, assert_same, fit, gradients, make_trainer, weights
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_gr import SAM
from lightning_gr.callbacks.manual import ManualRun


class Looks(Manual):
    """Collects the run that each step gets."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        RUNS.append(ManualRun.of(self, "here"))


RUNS = []


@pytest.mark.parametrize("groups", [1, 2])
def test_one_run_per_fit_with_a_weight_storage_per_optimizer(groups):
    RUNS.clear()
    module = Looks()
    module.groups = groups
    fit(module, SAM(0.1), max_epochs=2)
    assert len(RUNS) == 6
    assert all(run is RUNS[0] for run in RUNS)
    assert len(RUNS[0]._storages) == groups
    assert all(storage.params == [] for storage in RUNS[0]._storages.values())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_is_empty(clone):
    RUNS.clear()
    fit(Looks(), SAM(0.1))
    assert vars(clone(RUNS[0])) == vars(ManualRun())


def test_each_trainer_has_its_own_methods():
    module, expected = Manual(), Manual()
    fit(module, SAM(0.3))
    fit(module)
    fit(expected, SAM(0.3))
    after = weights(expected.net)
    fit(expected)
    assert_same(weights(module.net), weights(expected.net))
    assert any(not torch.equal(after[n], p) for n, p in module.net.named_parameters())
    assert vars(module)["_lightning_gr"].trainer is module.trainer


def test_the_optimizer_may_be_wrapped_or_not():
    class Finds(Manual):
        def training_step(self, batch, batch_idx):
            run, wrapped = ManualRun.of(self, "here"), self.optimizers()
            assert run.find(wrapped) is run.find(wrapped.optimizer) is wrapped
            assert run.find_owner(list(self.net[0].parameters())) is wrapped
            with pytest.raises(MisconfigurationException, match=r"one of `self\.optimizers"):
                run.find(torch.optim.SGD(self.parameters(), lr=0.1))
            SEEN.append(batch_idx)

    SEEN.clear()
    fit(Finds())
    assert SEEN == [0, 1, 2]


SEEN = []


def test_gradients_are_unscaled_and_scaled_again():
    class Unscales(Manual):
        def training_step(self, batch, batch_idx):
            run, optimizer = ManualRun.of(self, "here"), self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.net[0].weight.sum())
            before = gradients(self.net)
            assert before["0.weight"].eq(1024.0).all()
            with run.unscaled(optimizer):
                SEEN.append(self.net[0].weight.grad.unique().tolist())
            assert_near(gradients(self.net), before, 0)

    SEEN.clear()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(Unscales(), plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)])
    assert SEEN == [[1.0]] * 3


def test_requires_manual_optimization_and_a_training_trainer():
    with pytest.raises(MisconfigurationException, match="`f` needs manual optimization"):
        ManualRun.of(TinyModule(), "f")
    with pytest.raises(MisconfigurationException, match="`f` only works in `training_step`"):
        ManualRun.of(Manual(), "f")
    module = Manual()
    module.trainer = make_trainer()
    with pytest.raises(MisconfigurationException, match="`f` only works in `training_step`"):
        ManualRun.of(module, "f")
