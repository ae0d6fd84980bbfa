"""Remembers the calls of ``training_step`` in one accumulation window, and makes them again."""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gr._compat import is_a, lightning_attributes
from lightning_gr.core.two_pass import Transform, extract_loss
from lightning_gr.replay.isolation import ModuleState, RandomState, StatefulModules, second_pass

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Recorder", "gradient_scale", "loss_scale", "rebuild"]


def loss_scale(trainer: "Trainer", device: torch.device) -> Tensor | None:
    """The scale of the precision plugin's gradient scaler, as a tensor on ``device`` and without reading it back."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones((), device=device))


def gradient_scale(trainer: "Trainer", device: torch.device, *, alone: bool) -> Tensor | None:
    """The factor of the gradient from which the direction is made, against that of a loss by itself.

    That of a window is the mean over its micro-batches; one that is taken ``alone`` came divided by their number.
    """
    scale = loss_scale(trainer, device)
    if not alone:
        return scale
    share = 1.0 / trainer.accumulate_grad_batches
    return torch.full((), share, device=device) if scale is None else scale * share


class _Call:
    """One call of ``training_step``: its arguments and the random numbers that it started with.

    The containers of the batch are rebuilt, since training steps like to ``pop`` from them; tensors are not copied.
    """

    def __init__(self, args: tuple[Any, ...], devices: list[torch.device]) -> None:
        self.tensors: list[tuple[Tensor, int]] = []
        self.args = rebuild(args, self._note)
        self.random_state = RandomState(devices)

    def _note(self, tensor: Tensor) -> None:
        if not tensor.is_inference():
            self.tensors.append((tensor, tensor._version))

    def check_unchanged(self) -> None:
        """Refuse a batch that the first pass wrote to: the second one would start from something else."""
        if any(tensor._version != version for tensor, version in self.tensors):
            raise RuntimeError(
                "training_step changed a tensor of its batch in place, so it cannot be run again on the same data:"
                " work on a copy there, as in `x = batch['x'].clone()`"
            )

    @contextmanager
    def unchanged_gradients(self) -> Iterator[None]:
        """Keep the gradients of the batch, which a training step may have asked for, those of the first pass."""
        leaves = [(tensor, tensor.grad) for tensor, _ in self.tensors if tensor.requires_grad and tensor.is_leaf]
        try:
            for tensor, _ in leaves:
                tensor.grad = None
            yield
        finally:
            for tensor, grad in leaves:
                tensor.grad = grad


def rebuild(value: Any, note: Callable[[Tensor], None] = lambda tensor: None) -> Any:
    """Copy the containers in a batch but not its tensors, each of which is shown to ``note``.

    Any other object with attributes (the batches of graph libraries, dataclasses) is copied as ``copy.copy`` does.
    """
    if isinstance(value, Tensor):
        note(value)
    elif isinstance(value, (list, tuple)):
        items = [rebuild(item, note) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif isinstance(value, MutableMapping):
        entries = copy.copy(value)
        entries.update({key: rebuild(item, note) for key, item in value.items()})
        return entries
    elif hasattr(value, "__dict__") and not callable(value):
        try:
            other = copy.copy(value)
        except TypeError:  # it holds a lock, a file, …: nobody copies such a thing, so it is passed on
            return value
        own = {k: v for k, v in vars(value).items() if isinstance(v, (Tensor, list, tuple, dict))}
        vars(other).update({key: rebuild(item, note) for key, item in own.items()})
        return other
    return value


class Recorder:
    """Stands before the strategy's ``training_step``, where the arguments and the random state are seen as they are.

    Args:
        trainer: The Trainer, with its model set up.
        pl_module: The module in training.
        flood: Floods the loss of the second pass, given the Trainer and the loss; None does not flood.
    """

    def __init__(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        flood: Callable[["Trainer", Tensor], None] | None,
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.flood = flood
        self._calls: dict[int, _Call] = {}
        self.batch_idx = -1
        self._local = False
        self._started = False
        self._foreign = lightning_attributes()
        self._unsynced = ExitStack()
        root = trainer.strategy.root_device
        self._devices = [] if root.type == "cpu" else [root]
        self._original: Callable[..., Any] = trainer.strategy.training_step
        trainer.strategy.training_step = self._training_step  # type: ignore[method-assign]
        self._modules = StatefulModules(None)
        self.look_through()

    def remove(self) -> None:
        """Give the strategy its own method back."""
        self.forget()
        vars(self.trainer.strategy).pop("training_step", None)

    def look_through(self) -> None:
        """Find the modules with a state and the parameters; to be repeated when the module may have grown."""
        self.params = list(self.pl_module.parameters())
        self._modules = StatefulModules(self.pl_module, self._foreign, self._modules)

    @property
    def is_at_start(self) -> bool:
        """Whether the last call was the first one of its window with a loss."""
        return len(self._calls) == 1

    def expect(self, batch_idx: int, *, local: bool) -> None:
        """Record the next call, as micro-batch ``batch_idx`` of the window; ``local``: without reducing gradients."""
        self.batch_idx, self._local = batch_idx, local

    def forget(self) -> None:
        """Drop the window and its batches."""
        self._calls.clear()
        self.batch_idx = -1
        self._unsynced.close()

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        first, self._started = not self._started, True
        if self.batch_idx < 0:
            return self._original(*args, **kwargs)
        self._unsynced.close()
        # an optimizer such as LBFGS evaluates one micro-batch several times: the last time counts
        self._calls.pop(self.batch_idx, None)
        if not self._calls:
            self._before = ModuleState(self._modules)
        call = _Call(args, self._devices)
        # DDP learns a static graph in its first iteration, and does so only if it reduces there
        if self._local and not (first and getattr(self.trainer.strategy.model, "static_graph", False)):
            self._unsynced.enter_context(self._without_sync())
        output = self._original(*args, **kwargs)
        self._modules.note_written(self._before)
        if extract_loss(output) is not None:
            self._calls[self.batch_idx] = call
        return output

    def _without_sync(self) -> AbstractContextManager[Any]:
        strategy: Any = self.trainer.strategy
        return strategy.block_backward_sync() if is_a(strategy, "ParallelStrategy") else nullcontext()

    def replay(self, transform: Transform, last: bool = True) -> None:
        """Make the calls of the window again, see :class:`~lightning_gr.core.two_pass.Replay`."""
        self._unsynced.close()
        if not self._calls:
            return
        with second_pass(self._modules, self._before, self._devices, muted=self.pl_module):
            for position, call in enumerate(self._calls.values(), start=1):
                call.check_unchanged()
                call.random_state.restore()
                # one reduction of the gradients for the whole window, as in the first pass
                sync = nullcontext() if last and position == len(self._calls) else self._without_sync()
                with sync, call.unchanged_gradients():
                    self._evaluate(call, transform)

    def _evaluate(self, call: _Call, transform: Transform) -> None:
        trainer = self.trainer
        # rebuilt again: with the central scheme this call is made twice
        loss = extract_loss(self._original(*rebuild(call.args)))
        if loss is None:
            raise RuntimeError(
                "training_step returned a loss in the first pass and none in the second, for the same batch"
            )
        loss = loss / trainer.accumulate_grad_batches
        if self.flood is not None:
            self.flood(trainer, loss)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = loss if scaler is None else scaler.scale(loss)
        # not strategy.backward: its hooks belong to the first pass
        trainer.precision_plugin.backward(transform(loss), self.pl_module, trainer.optimizers[0])
