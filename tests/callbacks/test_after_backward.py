"""Which hooks count, and when they run again. For the gradients, see contract/test_written_gradients.py."""

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from modules import TinyModule, make_trainer

from lightning_gr import SAM
from lightning_gr.callbacks.after_backward import AfterBackward, callbacks_with_hook


class Hooked(pl.Callback):
    def __init__(self, change):
        self.change, self.calls = change, 0

    def on_after_backward(self, trainer, pl_module):
        self.calls += 1
        self.change(pl_module)


def halve(module):
    module.net[0].weight.grad *= 0.5


def halve_data(module):
    module.net[0].weight.grad.data.mul_(0.5)


def drop(module):
    module.net[0].weight.grad = None


def look(module):
    module.net[0].weight.grad.norm()


class Mine(SAM):
    def on_after_backward(self, trainer, pl_module):
        """Hooks of our callbacks and their subclasses do not count."""


def run(*callbacks, module=None, thorough=True):
    """Run the hooks after a first and after a second backward pass; return the observer."""
    module = TinyModule() if module is None else module
    trainer = make_trainer(*callbacks)
    hooks = AfterBackward(trainer, module, lambda: list(module.parameters()))
    for param in module.parameters():
        param.grad = torch.ones_like(param)

    def by_lightning():
        for callback in callbacks:
            callback.on_after_backward(trainer, module)
        module.on_after_backward()

    hooks.first(by_lightning, thorough=thorough)
    hooks.again()
    return hooks


@pytest.mark.parametrize(("change", "expected"), [(halve, True), (halve_data, True), (drop, True), (look, False)])
def test_a_hook_runs_again_if_it_changes_gradients(change, expected):
    callback = Hooked(change)
    if change is drop:
        assert run(callback).change_gradients
    else:
        assert run(callback).change_gradients is expected
    assert callback.calls == 1 + expected


def test_a_write_through_data_is_only_detected_by_a_thorough_check():
    assert not run(Hooked(halve_data), thorough=False).change_gradients


def test_hooks_of_modules_and_hooks_set_on_an_instance_count():
    class Own(TinyModule):
        def on_after_backward(self):
            halve(self)

    assert run(module=Own()).change_gradients
    module = TinyModule()
    module.on_after_backward = lambda: halve(module)
    assert run(module=module).change_gradients


def test_hooks_of_lightning_and_of_our_callbacks_do_not_count():
    callbacks = [pl.Callback(), lightning.pytorch.Callback(), SAM(), pl.callbacks.ModelSummary()]
    assert callbacks_with_hook(make_trainer(*callbacks[:1], *callbacks[2:])) == []
    by_lambda = pl.callbacks.LambdaCallback(on_after_backward=lambda trainer, module: halve(module))
    assert callbacks_with_hook(make_trainer(by_lambda)) == [by_lambda]
    assert callbacks_with_hook(make_trainer(Mine())) == []
