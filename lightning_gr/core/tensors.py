"""Vector operations on lists of tensors: norms, inner products, scaling and random vectors.

Everything runs on the device (foreach operators, no host synchronization). Distributed tensors are handled through
their local shards; only norms are reduced over ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_gr.core.sharding import by_layout, local_parts, norm_over_ranks, sum_of_shards

__all__ = [
    "HALVES",
    "dense_parts",
    "global_norm",
    "inner_product",
    "inverse",
    "is_lazy",
    "random_signs",
    "random_unit",
    "scale_",
    "tensor_norms",
    "wide",
    "wide_dtype",
]

HALVES = (torch.bfloat16, torch.float16)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def scale_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply all tensors in place by a number, or by a 0-dimensional tensor on any device."""
    for device, group in _by_device(tensors).items():
        if isinstance(factor, Tensor):
            torch._foreach_mul_(group, factor.to(device, non_blocking=True))
        else:
            # on the CPU, foreach would convert a Python number to a tensor once per tensor
            torch._foreach_mul_(group, torch.tensor(factor, dtype=torch.float64) if device.type == "cpu" else factor)


def wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Float64 if any of the tensors is double precision, else float32."""
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return torch.float64 if wide else torch.float32


def global_norm(tensors: Sequence[Tensor], like: Sequence[Tensor] = ()) -> Tensor:
    """The Euclidean norm of all tensors as one vector, as a 0-dimensional tensor on the first tensor's device.

    It is accumulated in at least float32 (bfloat16 has 8 bits of precision and float16 overflows at 65,504), or in
    float64 if any tensor is. For distributed tensors it is the norm of the full tensors, equal on all ranks. The norm
    of no tensors is 0, or that of the parts on other ranks, in the type and on the device of the tensors ``like``.
    """
    if not tensors:
        zero = torch.zeros((), dtype=wide_dtype(like), device=like[0].device if like else None)
        return sum_of_shards(zero.double()).sqrt().to(zero.dtype)
    dtype = wide_dtype(tensors)
    groups = by_layout(tensors).values()
    return _norm([norm_over_ranks(_norm(tensor_norms(local_parts(group), dtype)), group[0]) for group in groups])


def _norm(norms: Sequence[Tensor]) -> Tensor:
    """Combine the norms of several vectors into the norm of their concatenation."""
    if len(norms) == 1:
        return norms[0]
    stacked = torch.stack([norm.to(norms[0].device, non_blocking=True) for norm in norms])
    return torch.linalg.vector_norm(stacked)  # type: ignore[no-any-return]


def tensor_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The Euclidean norm of each tensor, on its device, accumulated in ``dtype``."""
    # the operator requires a complex dtype for complex input, but the norm is real
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    groups = _by_device(real).values()
    norms = [norm for group in groups for norm in torch._foreach_norm(group, 2.0, dtype=dtype)]
    if len(groups) > 1:  # restore the original order
        position = {id(tensor): i for i, tensor in enumerate(tensor for group in groups for tensor in group)}
        norms = [norms[position[id(tensor)]] for tensor in real]
    return norms


def inverse(norm: Tensor) -> Tensor:
    """1/norm, or a large finite number if ``norm`` is 0, so that a zero gradient gives a zero direction, never NaN."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny).reciprocal()


def wide(tensor: Tensor) -> Tensor:
    """Upcast 16-bit tensors to float32; return others unchanged."""
    return tensor.float() if tensor.dtype in HALVES else tensor


def inner_product(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """⟨x, y⟩ as a 0-dimensional tensor on the first tensor's device, accumulated in at least float32.

    Allocates the product of one pair of tensors at a time, since torch has no foreach operator for it. Complex tensors
    are treated as pairs of real ones.

    Example::

        >>> inner_product([torch.ones(2), torch.ones(3)], [torch.ones(2), 2 * torch.ones(3)])
        tensor(8.)
    """
    products = [(wide(x) * wide(y).conj()).sum().real for x, y in zip(xs, ys, strict=True)]
    device = products[0].device
    return torch.stack([product.to(device, non_blocking=True) for product in products]).sum()


def random_signs(like: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Draw a Rademacher vector (independent signs ±1) with the shapes of ``like``."""
    drawn = [torch.randint(2, x.shape, generator=generator, device=generator.device) for x in like]
    return [(2 * d - 1).to(x.device, wide(x).dtype) for d, x in zip(drawn, like, strict=True)]


def random_unit(like: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Draw a vector of norm 1 in a uniformly random direction, with the shapes of ``like``."""
    drawn = [torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32) for x in like]
    vector = [d.to(x.device, wide(x).dtype) for d, x in zip(drawn, like, strict=True)]
    torch._foreach_mul_(vector, 1.0 / float(inner_product(vector, vector)) ** 0.5)
    return vector


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that a tensor of whatever layout is made of, sharing its memory."""
    if tensor.is_nested:
        return [part for each in tensor.unbind() for part in dense_parts(each)]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def is_lazy(tensor: Tensor) -> bool:
    """Whether the tensor has no storage yet: of a lazy module, or on the meta device."""
    # the exact type first, since torch's isinstance of parameters takes a microsecond
    of_module = type(tensor) not in (Tensor, nn.Parameter)
    return tensor.is_meta or (of_module and isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)))
