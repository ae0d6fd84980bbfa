"""The hooks ``on_after_backward``, which belong to the function that is trained where they change gradients."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_gr._compat import has_base_named, overrides_hook
from lightning_gr.core.gradients import TensorMarks

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["AfterBackward", "callbacks_with_hook"]

_HOOK = "on_after_backward"


class AfterBackward:
    """Runs the hooks of a module and of callbacks on the gradient of a second pass as well, if they change gradients.

    Where a module cancels the gradient of a layer, or clips it, both passes get what it makes of theirs. Hooks that
    only look at gradients run once.

    Args:
        trainer: The Trainer.
        pl_module: The module in training.
        params: Returns the parameters whose gradients are looked at.
    """

    def __init__(
        self, trainer: "Trainer", pl_module: "LightningModule", params: Callable[[], Sequence[Tensor]]
    ) -> None:
        self.trainer, self.pl_module, self._params = trainer, pl_module, params
        self.change_gradients = False

    def first(self, run_hooks: Callable[..., Any], *args: Any, thorough: bool, **kwargs: Any) -> Any:
        """Run the hooks after a first backward pass, by Lightning's own function, and see what they do.

        Args:
            run_hooks: That function.
            *args: Its arguments.
            thorough: Whether a write through ``.data`` is to be seen as well.
            **kwargs: Its other arguments.
        """
        if self.change_gradients or not self._owners():
            return run_hooks(*args, **kwargs)
        params = self._params()
        marks = TensorMarks([param.grad for param in params], thorough)
        result = run_hooks(*args, **kwargs)
        self.change_gradients = marks.differ([param.grad for param in params])
        return result

    def again(self) -> None:
        """Run them after the backward pass of a second one."""
        for hook, args in self._owners() if self.change_gradients else ():
            hook(*args)

    def _owners(self) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
        found: list[tuple[Any, tuple[Any, ...]]] = [
            (callback, (self.trainer, self.pl_module)) for callback in callbacks_with_hook(self.trainer)
        ]
        if overrides_hook(self.pl_module, _HOOK):
            found.append((self.pl_module, ()))
        return [(getattr(owner, _HOOK), args) for owner, args in found]


def callbacks_with_hook(trainer: "Trainer") -> list[Any]:
    """The callbacks, other than the package's own, that have this hook."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if overrides_hook(c, _HOOK) and not has_base_named(c, "TwoPass")]
