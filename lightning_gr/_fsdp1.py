"""The private APIs of FSDP1 (``FullyShardedDataParallel``), one function each, as in :mod:`lightning_gr._compat`."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_gr._compat import has_base_named

__all__ = [
    "forget_gathered",
    "fsdp1_handles",
    "fsdp1_managed",
    "fsdp1_tensors",
    "own_name",
    "own_names",
    "shard_group",
]


def fsdp1_handles(model: nn.Module | None) -> list[Any]:
    """FSDP1's handles, one for each unit with parameters. Relies on the names ``FlatParamHandle`` and ``_handle``."""
    if model is None or not torch.distributed.is_available():
        return []
    handles = [getattr(module, "_handle", None) for module in model.modules()]
    return [handle for handle in handles if type(handle).__name__ == "FlatParamHandle"]


def fsdp1_tensors(handle: Any) -> list[Tensor]:
    """The parameters of a unit of FSDP1: the flattened one, and its parts under the names of the user's own.

    Relies on ``_params``, which is None with ``use_orig_params=False``.
    """
    flat = handle.flat_param
    return [flat, *(getattr(flat, "_params", None) or ())]


def shard_group(handle: Any) -> Any:
    """The process group over which FSDP1 has spread a unit; None if each rank has all of it (``NO_SHARD``)."""
    return handle.process_group if handle.uses_sharded_strategy else None


_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def own_name(name: str) -> str:
    """The name that a parameter or layer has in the user's own module, without those of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removesuffix("._fsdp_wrapped_module")


def own_names(name: str, param: Tensor) -> list[str]:
    """The names of all parameters of the user's that are in ``param``: several if FSDP1 has flattened them into one.

    Relies on the names that FSDP1 keeps of them, relative to their unit.
    """
    inner = getattr(param, "_fqns", None)
    unit = own_name(name).rpartition("_flat_param")[0]
    return [own_name(name)] if inner is None else [own_name(f"{unit}{each}") for each in inner]


def forget_gathered(model: nn.Module | None) -> None:
    """Drop the gathered weights of FSDP1, so that they are gathered again from the shards as these are now.

    The outermost unit, and all with ``SHARD_GRAD_OP``, keep them from the forward to the backward pass. Not to be
    called after an exception within a pass: FSDP1 then refuses to save the model, so no displaced weights are saved.
    Relies on ``FlatParamHandle.reshard``, on ``needs_unshard`` (after a forward pass alone, the outermost unit shows
    its shard again while the gathered weights are still there), and on ``_full_param_padded``, which the first forward
    pass creates.
    """
    for handle in fsdp1_handles(model):
        started = hasattr(handle.flat_param, "_full_param_padded")
        if started and handle.uses_sharded_strategy and not handle.needs_unshard():
            handle.reshard(True)
            handle.post_reshard()
            handle._prefetched = False


def fsdp1_managed(model: nn.Module | None) -> dict[int, frozenset[str]]:
    """The attributes that FSDP1 itself sets and replaces in each pass, by the identity of their module.

    That is its own state, and the parameters, which are views of one tensor that is gathered and freed.
    """
    managed: dict[int, set[str]] = {}
    wrappers = (
        [module for module in model.modules() if has_base_named(module, "FullyShardedDataParallel")] if model else []
    )
    for wrapper in wrappers:
        managed.setdefault(id(wrapper), set()).add("*")
        handle: Any = wrapper._handle
        if handle is not None:
            flat = handle.flat_param
            for name, module, _ in (*flat._param_infos, *((i[0], i[1], i[2]) for i in flat._shared_param_infos)):
                managed.setdefault(id(module), {"_parameters"}).add(name)
            inner = wrapper._fsdp_wrapped_module
            managed.setdefault(id(inner), {"_parameters"}).update(("_flat_param", "_parameters"))
    return {key: frozenset(names) for key, names in managed.items()}
