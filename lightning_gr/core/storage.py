"""Moving parameters by pointing them at other storage: nothing is copied there and back.

Copying costs four passes over the parameters, two to keep the weights and two to put them back. With a swap θ + s·d is
written into spare storage at which the parameter then points, and restoring is pointing back. That is right only for a
parameter whose storage nobody else reads, which :func:`can_swap` finds out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_gr._compat import storage_uses

__all__ = ["SMALLEST", "WeightSwap", "can_swap"]

# In bytes. For a smaller tensor the foreach operators, which copy, are faster than the calls that a swap takes.
SMALLEST = 2**17


def can_swap(param: Tensor) -> bool:
    """Whether ``param`` is plain, large and alone in its storage.

    On the CPU only: a captured CUDA graph, and the weights that cuDNN's recurrent layers have flattened, are read where
    they were. Views of a flat buffer, tied data, arrays that share memory and other aliases show in the number of users
    of the storage. 16-bit weights are left to the copy, by which it is seen if they move at all.
    """
    grad = param.grad
    return (
        type(param) in (nn.Parameter, Tensor)
        and type(grad) is Tensor
        and param.nbytes >= SMALLEST
        and param.device.type == "cpu"
        and param.dtype == grad.dtype
        and param.dtype in (torch.float32, torch.float64)
        and _is_alone(param)
    )


def _is_alone(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    # another process may read shared memory
    return storage_uses(tensor) == 1 and storage.nbytes() == tensor.nbytes and not tensor.is_shared()  # type: ignore[no-untyped-call]


class WeightSwap:
    """Parameters that are moved by a swap, and spare storage for them that is kept from step to step."""

    def __init__(self) -> None:
        self._key: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...] = ()
        self._spare: list[Tensor] = []
        self.params: list[Tensor] = []
        self.originals: list[Tensor] = []

    def take(self, params: Sequence[Tensor]) -> None:
        """Remember where ``params`` are."""
        self.params, self.originals = list(params), [param.data for param in params]

    def release(self) -> None:
        """Forget that: who remembers it is a user of the storage, too."""
        self.params, self.originals = [], []

    def put_back(self) -> None:
        """Point the parameters back; calling it again changes nothing."""
        for param, original in zip(self.params, self.originals, strict=True):
            param.data = original

    def scale_gradients_(self, eta: float) -> None:
        """Multiply ``.grad`` by T = |θ| + η, which stays in the spare storage."""
        for param, spare in zip(self.params, self._spares(), strict=True):
            torch.abs(param, out=spare)
            if eta:
                spare.add_(eta)
            param.grad.mul_(spare)  # type: ignore[union-attr]

    def move(self, step: float, *, scaled: bool) -> None:
        """Point the parameters at θ + ``step`` · ``.grad``, times T if the gradients were ``scaled`` by it.

        Not into the storage of gradients that need not be kept: allocating theirs anew would cost more.
        """
        for param, original, spare in zip(self.params, self.originals, self._spares(), strict=True):
            grad: Tensor = param.grad  # type: ignore[assignment]
            if scaled:
                torch.addcmul(original, grad, spare, value=step, out=spare)
            else:
                torch.add(original, grad, alpha=step, out=spare)
            param.data = spare

    def _spares(self) -> list[Tensor]:
        key = tuple((p.shape, p.stride(), p.dtype) for p in self.originals)
        if key != self._key:
            self._spare, self._key = [torch.empty_like(p) for p in self.originals], key
        return self._spare
