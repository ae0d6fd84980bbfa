"""Hashes the contents of tensors, to detect changes without copies."""

import ctypes
import functools

import torch
from torch import Tensor, nn

from lightning_gr._compat import torchs_own_methods
from lightning_gr.core.sharding import local_parts
from lightning_gr.core.tensors import dense_parts

__all__ = ["digests"]

_SLAB = 2**18  # entries at once: 2 MB of 64-bit numbers, which stay in a cache
# of 32 bits at most: of 64-bit ones the highest bits, such as two signs, would cancel mod 2⁶⁴
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@torch.no_grad()
def digests(tensors: list[Tensor]) -> list[int]:
    """One number for each tensor, of all its bits.

    On the host it is a hash of its bytes. On an accelerator it is Σ wᵢ xᵢ over its entries as integers, with odd
    weights, mod 2⁶⁴: a change of one entry of 32 bits always changes it, any other with a probability of at least
    1 − 2⁻³². Reads each tensor once and waits for each device once for all of them.
    """
    with torchs_own_methods():
        found = [_digest(local_parts([Tensor.detach(tensor)])[0]) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for position, value in enumerate(found):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(position)
    for positions in by_device.values():
        read = torch.stack([found[position] for position in positions]).tolist()  # type: ignore[misc]
        for position, number in zip(positions, read, strict=True):
            found[position] = number
    return found  # type: ignore[return-value]


def _digest(tensor: Tensor) -> int | Tensor:
    return _hash(tensor) if _is_on_host(tensor) else _weighted_sum(tensor)


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _hash(tensor: Tensor) -> int:
    # slab by slab: hashing takes a copy of what it reads
    return hash(
        tuple(hash(_read(slab)) for part in dense_parts(tensor) for slab in torch.split(_integers(part), _SLAB))
    )


def _read(tensor: Tensor) -> bytes:
    # not by an array, for which torch would make the storage one that cannot be resized
    address = tensor.data_ptr()
    return ctypes.string_at(address, tensor.nbytes) if address else b""


def _weighted_sum(tensor: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in dense_parts(tensor):
        for number, slab in enumerate(torch.split(_integers(part), _SLAB)):
            slab_sum = (slab.long() * _weights(part.device)[: len(slab)]).sum()
            total = total * 0x5851F42D4C957F2D + slab_sum * (2 * number + 1) + len(slab)
    return total


def _integers(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if real.is_quantized:
        real = real.int_repr()
    return real.resolve_neg().contiguous().reshape(-1).view(_INTEGERS[real.dtype.itemsize])


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_SLAB,), generator=generator) * 2 + 1).to(device)
