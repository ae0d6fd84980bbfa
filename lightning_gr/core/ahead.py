"""A point ahead of the weights along the optimizer's momentum, at which Momentum-SAM takes its only gradient.

The weights are displaced for a forward and for a backward pass, and are themselves at any other moment: a checkpoint,
an average, a validation or the optimizer's step never sees displaced ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_gr._compat import stepped_twin
from lightning_gr.core.perturb import Perturbation
from lightning_gr.core.signals import deferred_signals
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.tensors import global_norm, inverse

__all__ = ["MOMENTA", "Ahead", "keeps_momentum", "momenta_of"]

# what optimizers call their momentum: SGD, RMSprop and Muon; the Adam family, Lion, Adan and others
MOMENTA = ("momentum_buffer", "exp_avg")


def momenta_of(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Those of ``params`` for which ``optimizer`` has a momentum by now, each with it."""
    found = []
    for param in params:
        state: dict[str, Any] = optimizer.state.get(param, {})  # not [param]: an entry of ours would break Adam
        momentum = next((state[name] for name in MOMENTA if isinstance(state.get(name), Tensor)), None)
        if momentum is not None:
            found.append((param, momentum))
    return found


class Ahead:
    """The point θ − ρ v/‖v‖, as a context that may be entered again until the optimizer's next step.

    Args:
        optimizer: Whose momentum v is.
        params: The parameters to displace, as far as they have a momentum. ‖v‖ is one norm over all of them; of
            distributed tensors it is the norm of the whole.
        rho: ρ.
        storage: Where the weights are kept meanwhile.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, params: Iterable[Tensor], rho: float, storage: WeightStorage
    ) -> None:
        pairs = momenta_of(optimizer, params)
        self.params: list[Tensor] = [param for param, _ in pairs]
        self._momenta: Sequence[Tensor] = [momentum for _, momentum in pairs]
        self._storage = storage
        self._factor = -rho * inverse(global_norm(self._momenta)) if pairs else None

    def __bool__(self) -> bool:
        """Whether there is a momentum to look ahead along."""
        return self._factor is not None

    @contextmanager
    def _displaced(self, factor: Tensor) -> Iterator[None]:
        perturbation = Perturbation(self.params, self._storage, self._momenta)
        with deferred_signals():
            try:
                with perturbation:
                    perturbation.displace_along(factor)
                    yield
            finally:
                perturbation.restore()  # again, should Ctrl-C have come on the way to the first time

    def displaced(self) -> AbstractContextManager[None]:
        """A context with the weights at the point; with their own values where there is no momentum yet."""
        return nullcontext() if self._factor is None else self._displaced(self._factor)


def keeps_momentum(optimizer: torch.optim.Optimizer) -> bool | None:
    """Whether ``optimizer`` has a momentum once it has made a step; None if that cannot be found out.

    A twin of it makes one step on a parameter of its own, so no list of optimizers has to be kept up to date.
    """
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    found = False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for group in optimizer.param_groups:
            # two dimensions, which Muon asks for
            param = torch.nn.Parameter(torch.ones(2, 2, device=device))
            param.grad = torch.ones_like(param)
            try:
                twin = stepped_twin(optimizer, {**group, "params": [param]})
            except Exception:
                # an optimizer that needs a closure, or attributes of its own for each parameter
                return None
            found = found or bool(momenta_of(twin, [param]))
    return found
