"""Displaces the weights ahead along the optimizer's momentum, where Momentum-SAM takes its only gradient.

The weights are only displaced during a forward and a backward pass, so checkpoints, averages, validation and the
optimizer's step never see displaced weights.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lightning_gr._compat import stepped_twin
from lightning_gr.core.gradients import BackwardCheck, may_step
from lightning_gr.core.perturb import Perturbation
from lightning_gr.core.sharding import plain_are_shards
from lightning_gr.core.signals import deferred_signals
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.tensors import global_norm, inverse

__all__ = ["MOMENTA", "Ahead", "keeps_momentum", "momenta_of"]

# the names of the momentum: in SGD, RMSprop and Muon; in the Adam family, Lion, Adan and others
MOMENTA = ("momentum_buffer", "exp_avg")


def momenta_of(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a parameter and its momentum, for those of ``params`` for which ``optimizer`` has one."""
    pairs = []
    for param in params:
        state: dict[str, Any] = optimizer.state.get(param, {})  # not [param]: an entry of ours would break Adam
        momentum = next((state[name] for name in MOMENTA if isinstance(state.get(name), Tensor)), None)
        if momentum is not None:
            pairs.append((param, momentum))
    return pairs


class Ahead:
    """The point θ − ρ v/‖v‖, at which the weights can be placed repeatedly until the optimizer's next step.

    Args:
        optimizer: The optimizer with the momentum v.
        params: The parameters to displace; those without a momentum are skipped. ‖v‖ is a single norm over all of them,
            for distributed tensors over all ranks.
        rho: The radius ρ.
        storage: Keeps the original weights in the meantime.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, params: Iterable[Tensor], rho: float, storage: WeightStorage
    ) -> None:
        params = list(params)
        pairs = momenta_of(optimizer, params)
        self.params: list[Tensor] = [param for param, _ in pairs]
        self._momenta: Sequence[Tensor] = [momentum for _, momentum in pairs]
        self._storage = storage
        self._factor = None
        if pairs or plain_are_shards():
            norm = global_norm(self._momenta, like=params)
            # a rank without a part knows from the norm whether there is a momentum on the others
            self._factor = -rho * inverse(norm) if pairs or norm > 0 else None
        self._current: Perturbation | None = None
        self._versions: list[int] = []

    def __bool__(self) -> bool:
        """Whether there is a momentum to look ahead along."""
        return self._factor is not None

    @contextmanager
    def _displaced(self, factor: Tensor, again: bool) -> Iterator[None]:
        perturbation = self._current = Perturbation(self.params, self._storage, self._momenta)
        versions = [tensor._version for tensor in (*self.params, *self._momenta)]
        unwritten, self._versions = again and versions == self._versions, versions
        with deferred_signals():
            try:
                with perturbation:
                    perturbation.displace_along(factor, again=unwritten)
                    # here, since restoring would undo a step; FSDP1 itself exchanges the parameters until then
                    check = BackwardCheck(may_step(self.params) if again and not plain_are_shards() else [])
                    yield
                    check.done()
            finally:
                perturbation.restore()  # again, in case Ctrl-C interrupted the first call
                self._current = None

    def displaced(self, *, again: bool = False) -> AbstractContextManager[None]:
        """A context manager with the weights at the point, or unchanged if there is no momentum yet.

        Args:
            again: Whether this is the backward pass of the forward pass that the last call was for. The point is then
                not computed again, unless the weights or the momentum have been written to in the meantime.
        """
        return nullcontext() if self._factor is None else self._displaced(self._factor, again)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A context manager with the original weights, within :meth:`displaced`."""
        current, factor = self._current, self._factor
        if current is None or factor is None:
            yield
            return
        current.restore()
        try:
            yield
        finally:
            current.__enter__()
            current.displace_along(factor)


def keeps_momentum(optimizer: torch.optim.Optimizer) -> bool | None:
    """Whether ``optimizer`` has a momentum after its first step; None if this cannot be determined.

    A copy of the optimizer takes a step on a dummy parameter, which avoids maintaining a list of optimizers.
    """
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    found = False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for group in optimizer.param_groups:
            # two-dimensional, as Muon requires
            param = torch.nn.Parameter(torch.ones(2, 2, device=device))
            param.grad = torch.ones_like(param)
            alone = {**group, "params": [param]}
            kept = _try_step(param, optimizer, alone, {})
            # most optimizers create their state in the first step, some (Adagrad in torch 2.6) in the constructor
            if kept is None and (state := _state_for(param, optimizer, group)):
                kept = _try_step(param, optimizer, alone, state)
            if kept is None:
                return None
            found = found or kept
    return found


def _try_step(
    param: Tensor, optimizer: torch.optim.Optimizer, group: dict[str, Any], state: dict[str, Any]
) -> bool | None:
    """Whether a dummy parameter with this state has a momentum after a step; None if the step fails."""
    try:
        return bool(momenta_of(stepped_twin(optimizer, group, state), [param]))
    except Exception:
        # for example an optimizer that needs a closure, or custom attributes on each parameter
        return None


def _state_for(param: Tensor, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The state that ``optimizer`` has for one parameter of the group, with zeros in the dummy parameter's shape."""
    like = next((p for p in group["params"] if p.dim() and optimizer.state.get(p)), None)
    if like is None:
        return {}
    return {
        name: torch.zeros_like(param) if isinstance(value, Tensor) and value.shape == like.shape else deepcopy(value)
        for name, value in optimizer.state[like].items()
    }
