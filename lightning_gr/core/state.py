"""Vectors that a rule keeps from step to step, such as an average of gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["State"]


class State:
    """The vectors of a rule, each with one tensor per parameter, by name.

    A callback keeps one state for its rule and saves it in checkpoints by parameter name. In a loop of your own, create
    one, pass it to :func:`~lightning_gr.regularized_backward` in each step, and save its :meth:`state_dict`. The
    vectors are made of unscaled gradients, whatever a gradient scaler does.

    Example::

        >>> w = torch.zeros(2)
        >>> state = State()
        >>> with state.of([w]):
        ...     state.get("average") is None
        ...     state.set("average", [torch.ones(2)])
        ...     state.get("average")
        True
        [tensor([1., 1.])]
    """

    def __init__(self) -> None:
        self.step = 0
        self._vectors: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        self._params: list[Tensor] = []

    def of(self, params: Sequence[Tensor]) -> "State":
        """Select the parameters that :meth:`get` and :meth:`set` refer to, as a context manager."""
        self._params = list(params)
        return self

    def __enter__(self) -> None:
        """Nothing to do: :meth:`of` has selected the parameters."""

    def __exit__(self, *exception: object) -> None:
        self._params = []

    def get(self, name: str) -> list[Tensor] | None:
        """The vector ``name``, one tensor per selected parameter; None unless each parameter has one."""
        known = self._vectors.get(name, {})
        if any(id(param) not in known for param in self._params):
            return None
        return [known[id(param)][1] for param in self._params]

    def set(self, name: str, vector: Sequence[Tensor]) -> None:
        """Keep ``vector``, one tensor per selected parameter. The tensors are kept as they are, not copied."""
        pairs = zip(self._params, vector, strict=True)
        self._vectors.setdefault(name, {}).update((id(param), (param, value)) for param, value in pairs)

    def snapshot(self) -> dict[str, list[Tensor]]:
        """Copies of all vectors of the selected parameters."""
        found = {name: self.get(name) for name in self._vectors}
        return {name: [value.clone() for value in vector] for name, vector in found.items() if vector is not None}

    def restore_unless(self, finite: Tensor, snapshot: dict[str, list[Tensor]]) -> None:
        """Restore ``snapshot`` where ``finite`` is False, without reading it from the device."""
        for name, before in snapshot.items():
            now = self.get(name) or []
            self.set(name, [torch.where(finite.to(n.device), n, b) for n, b in zip(now, before, strict=True)])
        for name in self._vectors.keys() - snapshot.keys():
            first = [torch.where(finite.to(n.device), n, torch.zeros_like(n)) for n in self.get(name) or []]
            if first:
                self.set(name, first)

    def state_dict(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
        """The vectors by their name and that of the parameter, and the number of steps.

        Args:
            named: ``module.named_parameters()``.
        """
        names = {id(param): name for name, param in named}
        vectors = {
            vector: {names[key]: value for key, (_, value) in known.items() if key in names}
            for vector, known in self._vectors.items()
        }
        return {"step": self.step, "vectors": vectors}

    def load_state_dict(self, state: dict[str, Any], named: Iterable[tuple[str, Tensor]]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Args:
            state: The vectors and the number of steps, or the vectors alone, as version 0.1 saved them.
            named: ``module.named_parameters()``.
        """
        params = dict(named)
        if isinstance(state.get("step"), int):
            self.step, state = state["step"], state["vectors"]
        self._vectors = {
            vector: {
                id(params[n]): (params[n], value.to(params[n].device)) for n, value in known.items() if n in params
            }
            for vector, known in state.items()
        }
