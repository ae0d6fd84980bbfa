"""Detects writes to tensors without copies, at almost no cost: by versions, addresses and a few entries."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gr.replay.contents import TensorPlace, is_plain, sample
from lightning_gr.replay.machinery import QuietTensorPlace
from lightning_gr.replay.places import Place
from lightning_gr.replay.snapshot import storage_of

__all__ = ["Marker", "Marks"]

_FEW = 8
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VERSION = operator.attrgetter("_version")
_WANTS_GRADIENT = operator.attrgetter("requires_grad")


class Marker:
    """Takes marks of the same tensors in each step, of all of them at once.

    Args:
        places: The tensors, and other places that have marks.
        thorough: Whether a few entries are read of all kinds of tensors on the host, which detects writes through
            ``.data``, as version counters do not. Otherwise, only of plain tensors that require no gradient.
    """

    def __init__(self, places: Sequence[Place], *, thorough: bool = False) -> None:
        plain = {id(place) for place in places if isinstance(place, TensorPlace) and is_plain(place.owner)}
        self._quiet = [place for place in places if type(place) is QuietTensorPlace and id(place) in plain]
        self._places = [place for place in places if type(place) is TensorPlace and id(place) in plain]
        done = {id(place) for place in (*self._quiet, *self._places)}
        self._others = [place for place in places if id(place) not in done]
        self._thorough = thorough
        self._tensors = [place.owner for place in self._places]
        self._quiet_tensors = [place.owner for place in self._quiet]
        self._hosted = [at for at, tensor in enumerate(self._tensors) if tensor.device.type == "cpu"]
        self._wants_gradient: list[bool] | None = None
        self._sampled: list[int] = []
        self._sampled_at: list[int] = []
        self._samples = _Samples([], len(self._tensors))

    def look(self) -> "_Looks":
        """The marks now."""
        addresses = list(map(Tensor.data_ptr, self._tensors))
        self._find_samples(addresses)
        others = [(place.mark(), _read_few(place.owner) if self._thorough else "") for place in self._others]
        quiet, versions = list(map(_VERSION, self._quiet_tensors)), list(map(_VERSION, self._tensors))
        return _Looks(versions, addresses, self._samples, self._samples.read(), quiet, others)

    def _find_samples(self, addresses: list[int]) -> None:
        wants = list(map(_WANTS_GRADIENT, self._tensors))
        if wants != self._wants_gradient:
            self._wants_gradient = wants
            self._sampled = [at for at in self._hosted if self._thorough or not wants[at]]
        at = [addresses[position] for position in self._sampled]
        if at != self._sampled_at:
            # a sample is a view of memory, and the tensor may use other memory by now
            self._sampled_at = at
            chosen = [(position, self._tensors[position]) for position in self._sampled if addresses[position]]
            self._samples = _Samples(chosen, len(self._tensors))

    def changed(self, before: "_Looks") -> list[Place]:
        """The places whose marks differ now."""
        now = self.look()
        if now == before:
            return []
        each = zip(self._places, before.by_tensor(), now.by_tensor(), strict=True)
        quiet = zip(self._quiet, before.quiet, now.quiet, strict=True)
        others = zip(self._others, before.others, now.others, strict=True)
        return [place for place, old, new in (*each, *quiet, *others) if old != new]


class _Looks(NamedTuple):
    """The marks of tensors at one moment."""

    versions: list[int]
    addresses: list[int]
    samples: "_Samples"
    read: list[bytes]
    quiet: list[int]
    others: list[Any]

    def by_tensor(self) -> Iterator[tuple[int, int, bytes]]:
        """The marks of each plain tensor."""
        return zip(self.versions, self.addresses, self.samples.split(self.read), strict=True)


class Marks:
    """The marks of some tensors at one moment.

    Args:
        markers: Take the marks.
    """

    def __init__(self, markers: Sequence[Marker]) -> None:
        self._before = [(marker, marker.look()) for marker in markers]

    def changed(self, moved: frozenset[int] = frozenset()) -> list[Place]:
        """The places whose marks differ now, except for tensors in the storages ``moved``."""
        found = [place for marker, before in self._before for place in marker.changed(before)]
        return [p for p in found if not (moved and isinstance(p, TensorPlace) and storage_of(p.owner) in moved)]

    def restore(self, changed: Sequence[Place]) -> Sequence[Place]:
        """Return ``changed``, since there are no copies to restore."""
        return changed


class _Samples:
    """A few entries of each of some plain tensors on the host, as views, which are read by one operator for each size.

    Args:
        tensors: The tensors, with their numbers.
        count: How many numbers there are.
    """

    def __init__(self, tensors: Iterable[tuple[int, Tensor]], count: int) -> None:
        self._count = count
        self._groups: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
        for position, tensor in tensors:
            if tensor.numel():
                view = _few(tensor)
                self._groups.setdefault(view.dtype, []).append((position, view))
        self._views = [[view for _, view in group] for group in self._groups.values()]

    def read(self) -> list[bytes]:
        """The bits of the entries now, so that NaN equals itself."""
        return [torch.cat(views).view(torch.uint8).numpy().tobytes() for views in self._views]

    def split(self, read: list[bytes]) -> list[bytes]:
        """What was read, by tensor."""
        found = [b""] * self._count
        for group, data in zip(self._groups.values(), read, strict=True):
            start = 0
            for position, view in group:
                found[position] = data[start : start + view.nbytes]
                start += view.nbytes
        return found


@torch.no_grad()
def _few(tensor: Tensor) -> Tensor:
    """A view of entries at equal distances, along the diagonal if the tensor is not contiguous."""
    count = tensor.numel()
    if tensor.is_contiguous():
        size, stride = min(count, _FEW), max(1, count // _FEW)
    else:
        size = min(_FEW, max(tensor.shape))
        stride = sum(step * (length // size) for step, length in zip(tensor.stride(), tensor.shape, strict=True))
    view = tensor.detach().as_strided((size,), (stride,), tensor.storage_offset())
    return view.view(_INTEGERS.get(view.dtype.itemsize, view.dtype))


def _read_few(tensor: Tensor) -> str:
    """The same for other kinds of dense tensors on the host, read by their own operators."""
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    if not is_dense or tensor.device.type != "cpu":
        return ""
    return repr(sample([tensor]))  # in which NaN is equal to itself
