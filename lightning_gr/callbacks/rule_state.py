"""The vectors that a rule keeps from step to step, over runs, copies and checkpoints of a callback."""

import weakref
from typing import TYPE_CHECKING, Any

from lightning_gr.core.state import State

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["RuleState"]


class RuleState:
    """Holds a rule's :class:`~lightning_gr.core.state.State`; a copy or a pickle of it starts empty."""

    def __init__(self) -> None:
        self.vectors = State()
        self._module: weakref.ref[LightningModule] | None = None
        self._restored: dict[str, Any] | None = None

    def __reduce__(self) -> Any:
        return type(self), ()

    def begin(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Continue from what was loaded; in a run from the start, without vectors."""
        self._module = weakref.ref(pl_module)
        if self._restored is not None:
            self.vectors.load_state_dict(self._restored, pl_module.named_parameters())
        elif trainer.global_step == 0:
            self.vectors = State()
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """The vectors by parameter name; empty before the first run."""
        module = None if self._module is None else self._module()
        # without the number of steps, which the callback counts itself
        return {} if module is None else self.vectors.state_dict(module.named_parameters())["vectors"]

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Keep ``state`` for :meth:`begin`, when the module is known."""
        self._restored = state
