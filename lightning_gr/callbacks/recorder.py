"""Records the calls of ``training_step`` in an accumulation window and replays them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gr._compat import (
    MisconfigurationException,
    gradient_scaler,
    lightning_attributes,
    logged_results,
    loggers_and_methods,
    static_graph,
    trainer_parts,
    unsynced,
    wrap_after_backward,
    wrap_backward,
    wrap_save_checkpoint,
    wrap_training_step,
)
from lightning_gr.callbacks.after_backward import AfterBackward, callbacks_with_hook
from lightning_gr.callbacks.windows import is_window_start
from lightning_gr.core.ahead import Ahead
from lightning_gr.core.gradients import BackwardCheck, TensorMarks
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.two_pass import NoLossError, Transform, extract_loss
from lightning_gr.replay.batch import Batch
from lightning_gr.replay.evaluation import Evaluation, Surroundings
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.machinery import BindingPlace, StatePlace
from lightning_gr.replay.parameters import Parameters

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Recorder", "displaced", "gradient_scale", "loss_scale", "surroundings_of"]


def loss_scale(trainer: "Trainer", device: torch.device) -> Tensor | None:
    """The scale of the precision plugin's gradient scaler, as a tensor on ``device``, without synchronizing."""
    scaler = gradient_scaler(trainer)
    return None if scaler is None else scaler.scale(torch.ones((), device=device))


def gradient_scale(trainer: "Trainer", device: torch.device, *, alone: bool) -> Tensor | None:
    """The factor on the gradient that defines the direction, relative to the gradient of the plain loss.

    The gradient of a window is the mean over its micro-batches. That of a micro-batch regularized ``alone`` is already
    divided by their number.
    """
    scale = loss_scale(trainer, device)
    if not alone:
        return scale
    weight = 1.0 / trainer.accumulate_grad_batches
    return torch.full((), weight, device=device) if scale is None else scale * weight


def surroundings_of(trainer: "Trainer", pl_module: "LightningModule") -> Surroundings:
    """The state that training steps may change: everything reachable from the module, and parts of the Trainer."""
    root, parameters = trainer.strategy.root_device, Parameters()

    def roots() -> Mapping[str, Any]:
        # their state before they are entered as objects
        states = {f"optimizer_{i}.state": o.state for i, o in enumerate(trainer.optimizers)}
        return {
            **{path: StatePlace(state, path) for path, state in states.items()},
            "self": pl_module,
            **{f"optimizer_{i}": optimizer for i, optimizer in enumerate(trainer.optimizers)},
            "lr_schedulers": [config.scheduler for config in trainer.lr_scheduler_configs],
            **{path: BindingPlace(part, path, containers=True) for path, part in trainer_parts(trainer).items()},
            # whose hooks may run in a second pass
            **{f"trainer.callbacks[{i}]": callback for i, callback in enumerate(callbacks_with_hook(trainer))},
            # not what is in it: a data set
            "trainer.datamodule": BindingPlace(_attributes(trainer, "datamodule"), "trainer.datamodule", False),
        }

    def closed() -> Iterable[object]:
        return [trainer, trainer.strategy, trainer.callbacks]  # type: ignore[attr-defined]

    def muted() -> list[tuple[Any, Any]]:
        return [
            (pl_module, ("log", "log_dict", "print")),
            # `self.log` may also be called through a reference taken earlier
            (logged_results(pl_module), ("log", "reset")),
            (trainer, ("save_checkpoint",)),
            *loggers_and_methods(trainer),
        ]

    def trained() -> list[Tensor]:
        groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        everything = [*parameters.of(pl_module), *chain.from_iterable(groups)]
        return list(dict(zip(map(id, everything), everything, strict=True)).values())

    footprint = Footprint(roots, hidden=lightning_attributes() | {"_lightning_gr"}, closed=closed)
    return Surroundings(footprint, [] if root.type == "cpu" else [root], muted, trained)


def _attributes(owner: object, name: str) -> dict[str, Any]:
    return getattr(getattr(owner, name, None), "__dict__", {})


@contextmanager
def displaced(trainer: "Trainer", ahead: Ahead, *, again: bool = False) -> Iterator[None]:
    """Displace the weights, except in checkpoints that a training step saves; for ``again``, see :class:`Ahead`."""

    def save(*args: Any, **kwargs: Any) -> Any:
        with ahead.suspended():
            return original(*args, **kwargs)

    with ahead.displaced(again=again):
        original, unwrap = wrap_save_checkpoint(trainer, save)
        try:
            yield
        finally:
            unwrap()


class Recorder:
    """Wraps the strategy's ``training_step``, which sees the unchanged arguments and random state.

    Args:
        trainer: The Trainer, with its model set up.
        pl_module: The module in training.
        storage: Keeps the weights while they are displaced.
        flood: Floods the loss of the second pass, given the Trainer and the loss; None does not flood.
        on_backward_end: Called after each backward pass and the hooks ``on_after_backward``.
    """

    def __init__(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        storage: WeightStorage,
        flood: Callable[["Trainer", Tensor], None] | None,
        on_backward_end: Callable[[], None],
    ) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        self.storage, self.flood = storage, flood
        self._calls: dict[int, tuple[Evaluation[Any], Batch]] = {}
        self.batch_idx = -1
        self._local = self._alone = False
        self._ahead: Ahead | None = None
        self._records = True
        self._started = False
        self._unsynced = ExitStack()
        self._surroundings = surroundings_of(trainer, pl_module)
        self._called = False
        self.gave_up = False  # a second pass found no loss: what is evaluated then is the clean gradient
        self.on_backward_end = on_backward_end
        self._writes_gradients = False
        self._after_backward = AfterBackward(trainer, pl_module, self._surroundings.trained)
        self._check: BackwardCheck | None = None
        self._thorough = True  # until a window has been made again
        self._original, self._unwrap = wrap_training_step(trainer, self._training_step)
        self._original_backward, self._unwrap_backward = wrap_backward(trainer, self._backward_ahead)
        self._run_hooks, self._unwrap_hooks = wrap_after_backward(trainer, self._post_backward)

    def remove(self) -> None:
        """Give the strategy and the precision plugin back the methods that they had."""
        self.forget()
        self._unwrap_hooks()
        self._unwrap_backward()
        self._unwrap()

    @property
    def is_empty(self) -> bool:
        """Whether none of the window's calls returned a loss."""
        return not self._calls

    def check_not_bypassed(self) -> None:
        """Check that the last call was recorded, that is, that no one has replaced the strategy's method.

        Raises:
            MisconfigurationException: If the call was not recorded.
        """
        if not self._called:
            raise MisconfigurationException(
                f"`training_step` of {type(self.trainer.strategy).__name__} was replaced after training started, by"
                " something that does not call the previous method, so nothing would be regularized: call that method,"
                " or replace it before `Trainer.fit`"
            )

    @property
    def params(self) -> list[Tensor]:
        """The parameters of the module and of the optimizers."""
        return list(self._surroundings.trained())

    @property
    def writes_gradients(self) -> bool:
        """Whether, in plain training, a step writes to gradients of earlier micro-batches, or a hook to any."""
        return self._writes_gradients or self._after_backward.change_gradients

    @property
    def is_at_start(self) -> bool:
        """Whether the last call was the first in its window to return a loss."""
        return len(self._calls) == 1

    def expect(
        self,
        batch_idx: int,
        *,
        local: bool = False,
        alone: bool = False,
        ahead: Ahead | None = None,
        records: bool = True,
    ) -> None:
        """Look at the next call.

        Args:
            batch_idx: Which micro-batch of the window it is.
            local: Whether its gradients are not to be reduced over devices.
            alone: Whether it is regularized by itself, and not the window.
            ahead: Where its forward and its backward pass take place, if not at the weights.
            records: Whether it is to be made again.
        """
        self.batch_idx, self._local, self._alone = batch_idx, local, alone
        self._ahead, self._records = ahead, records
        self._called = self.gave_up = False

    def forget(self) -> None:
        """Drop the window and its batches."""
        self._calls.clear()
        self.batch_idx = -1
        self._ahead = None
        self._unsynced.close()
        self._surroundings.hooks.end()

    def watch_backward(self, params: Sequence[Tensor]) -> None:
        """Find out what hooks on parameters do in the backward pass that follows; none may move ``params``."""
        self._surroundings.hooks.begin(self.params, exactly=self._surroundings.learning)
        self._check = BackwardCheck(params, self._surroundings.learning)

    def _post_backward(self, *args: Any, **kwargs: Any) -> Any:
        self._surroundings.hooks.end()
        if self._check is not None:
            self._check.done()
            self._check = None
        if self._calls:
            result = self._after_backward.first(self._run_hooks, *args, thorough=self._thorough, **kwargs)
        else:
            result = self._run_hooks(*args, **kwargs)
        self.on_backward_end()
        return result

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        first, self._started, self._called = not self._started, True, True
        if self.batch_idx < 0:
            return self._original(*args, **kwargs)
        if not self._records:
            with self._at_the_point():
                return self._original(*args, **kwargs)
        self._unsynced.close()
        # an optimizer such as LBFGS evaluates one micro-batch several times: the last time counts
        self._calls.pop(self.batch_idx, None)
        batch = Batch(args, kwargs, self.pl_module, thorough=self._thorough)
        evaluation = Evaluation(lambda: self._original(*args, **kwargs), self._surroundings, batch)
        if self._local and not (first and static_graph(self.trainer.strategy.model)):
            self._unsynced.enter_context(unsynced(self.trainer))
        # plain training zeroes the gradients after the first step of a window, whatever it has done to them
        marks = None if self._zeroes_after(self.batch_idx) else TensorMarks(self._gradients(), self._thorough)
        with self._at_the_point():
            output = evaluation.first()
        batch.note_after_first()
        self._writes_gradients |= marks is not None and marks.differ(self._gradients())
        if extract_loss(output) is not None:
            self._calls[self.batch_idx] = evaluation, batch
        return output

    def _at_the_point(self, *, again: bool = False) -> AbstractContextManager[None]:
        return nullcontext() if self._ahead is None else displaced(self.trainer, self._ahead, again=again)

    def _backward_ahead(self, *args: Any, **kwargs: Any) -> Any:
        # between the two passes, where hooks run, the weights are themselves
        with self._at_the_point(again=True):
            return self._original_backward(*args, **kwargs)

    def clean_losses(self) -> list[Tensor]:
        """The losses of the window at the weights, each divided by the number of micro-batches, by a forward pass each.

        Gradients are enabled, since a training step may ask for one.
        """
        losses = []
        moved = [] if self._ahead is None else self._ahead.params
        for evaluation, batch in self._calls.values():
            batch.check(self.trainer.train_dataloader)
            with unsynced(self.trainer), evaluation.again(moved, gradients="dropped") as output:
                loss = extract_loss(output)
                if loss is not None:
                    losses.append(loss.detach() / self.trainer.accumulate_grad_batches)
        return losses

    def replay(self, transform: Transform, last: bool = True) -> None:
        """Make the calls of the window again, see :class:`~lightning_gr.core.two_pass.Replay`."""
        self._unsynced.close()
        for batch_idx, (evaluation, batch) in self._calls.items():
            batch.check(self.trainer.train_dataloader)
            # one reduction of the gradients for the whole window, as in the first pass
            sync = nullcontext() if last and batch_idx == max(self._calls) else unsynced(self.trainer)
            sees = self._writes_gradients and not self._zeroes_after(batch_idx)
            with (
                sync,
                evaluation.again(
                    self.storage.params, gradients="seen" if sees else "dropped", second=not self.gave_up
                ) as output,
            ):
                self._backward(extract_loss(output), transform)
                self._after_backward.again()
        self._thorough = False

    def _gradients(self) -> list[Tensor | None]:
        return [param.grad for param in self.params]

    def _zeroes_after(self, batch_idx: int) -> bool:
        """Whether gradients are zeroed, or set aside, after the step of a micro-batch."""
        return self._alone or is_window_start(self.trainer, batch_idx)

    def _backward(self, loss: Tensor | None, transform: Transform) -> None:
        trainer = self.trainer
        if loss is None:
            if trainer.world_size > 1:
                raise RuntimeError(
                    "training_step returned a loss in the first pass and None in the second, at displaced weights, and"
                    " the other devices wait for its gradient: return the loss as it is, or take a smaller radius"
                )
            self.gave_up = True
            raise NoLossError
        loss = loss / trainer.accumulate_grad_batches
        if self.flood is not None:
            self.flood(trainer, loss)
        scaler = gradient_scaler(trainer)
        loss = loss if scaler is None else scaler.scale(loss)
        # not strategy.backward: its hooks belong to the first pass
        trainer.precision_plugin.backward(transform(loss), self.pl_module, trainer.optimizers[0])
