"""Keeps ranks together: none of them decides alone whether there is a second pass."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_gr._compat import (
    MisconfigurationException,
    comm_hook_states,
    has_base_named,
    has_comm_hooks,
    is_fsdp1,
)
from lightning_gr._fsdp1 import forget_gathered
from lightning_gr.core.comm_states import CommStates
from lightning_gr.core.rules import Rule, Update
from lightning_gr.core.sharding import SideGroup, is_initialized, shards_over

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = [
    "Decisions",
    "check_comm_hooks",
    "check_same_arguments",
    "check_same_settings",
    "kept_comm_states",
    "may_differ",
    "passes_of",
    "reduction",
    "sharding",
]


def passes_of(update: Update | None) -> int:
    """How many times an update makes the calls of a window again."""
    if update is None or not update.has_second_pass:
        return 0
    return sum(probe.weight != 0.0 for probe in update.probes) + bool(update.curvature)


@contextmanager
def sharding(trainer: "Trainer", group: Any) -> Iterator[None]:
    """A context manager for what works on parameters, of which FSDP1 leaves each rank a part.

    Args:
        trainer: The Trainer.
        group: The ranks that share the parameters; None if each has all of them.
    """
    if is_fsdp1(trainer):
        forget_gathered(trainer.strategy.model)
    with shards_over(group, trainer.strategy.root_device):
        yield


def may_differ(callback: Any, base: type) -> bool:
    """Whether code of the user's decides on the update of a step, which may do so differently on each rank.

    Args:
        callback: A callback.
        base: The class of this package whose ``should_regularize`` follows the schedule.
    """
    own: Any = type(callback).should_regularize
    return own is not base.should_regularize or not type(callback.rule).__module__.startswith("lightning_gr.")  # type: ignore[attr-defined]


class Decisions:
    """Compares what ranks decide about a step, before any of them waits for another.

    Args:
        trainer: The Trainer.
        name: Of the class of the callback.
    """

    def __init__(self, trainer: "Trainer", name: str) -> None:
        self.trainer, self.name = trainer, name
        self._group = SideGroup(trainer.strategy.root_device, "decisions")
        self._agreed: Callable[[], bool] | None = None

    def announce(self, update: Update | None) -> None:
        """Start to compare this rank's update with those of the others."""
        self._update = update
        self._agreed = self._group.agree(2 * passes_of(update) + (update is not None and bool(update.ahead)))

    def check(self) -> None:
        """Wait for what the others announced.

        Raises:
            MisconfigurationException: On all ranks, if they will not make the same passes.
        """
        agreed, self._agreed = self._agreed, None
        if agreed is not None and not agreed():
            own = "plain" if self._update is None else "regularized"
            raise MisconfigurationException(
                f"`should_regularize` of {self.name}, or its rule, decided differently on some ranks in optimizer step"
                f" {self.trainer.global_step} (rank {self.trainer.global_rank}: {own}), and they would wait for each"
                " other: decide by the step, or broadcast what you decide by"
            )


def check_same_settings(trainer: "Trainer", rule: Rule, update: Update, callback: object) -> None:
    """Check that all ranks have the same method and the same settings of it; see :func:`check_same_arguments`."""
    numbers = update.direction, update.keep, update.probes, update.curvature, update.eta, update.ahead, update.clip
    settings = {name: getattr(callback, name) for name in ("schedule", "exclude", "ascent_sync", "accumulation")}
    method = (rule.name, *sorted(rule.constants.items()))
    check_same_arguments(trainer, rule.name, method=method, update=numbers, **settings)


def check_same_arguments(trainer: "Trainer", name: str, **arguments: object) -> None:
    """Check that all ranks have the same settings, once at the start of training.

    Args:
        trainer: The Trainer.
        name: Of the method.
        **arguments: The settings, each with a ``repr`` that says all.

    Raises:
        MisconfigurationException: On all ranks, if they do not.
    """
    if trainer.world_size == 1 or not is_initialized():
        return
    numbers = torch.tensor(
        [zlib.crc32(repr(value).encode()) for value in arguments.values()], device=trainer.strategy.root_device
    )
    both = torch.stack([numbers, -numbers])
    torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    high, low = both.tolist()
    differing = [key for key, a, b in zip(arguments, high, low, strict=True) if a != -b]
    if differing:
        own = f"{differing[0]} = {arguments[differing[0]]}"
        raise MisconfigurationException(
            f"The settings of {name} differ between ranks (on rank {trainer.global_rank}, {own}): give the callback the"
            " same arguments on all of them"
        )


def check_comm_hooks(trainer: "Trainer", update: Update, local: bool) -> None:
    """Reject methods that DDP's communication hook would bias if it adds to a gradient what it left out before.

    Raises:
        MisconfigurationException: If the method adds up gradients that are reduced separately, or divides by the norm
            of their difference, which is mostly what the hook left out.
    """
    states = [state for state in comm_hook_states(trainer.strategy.model) if not has_base_named(state, _COUNTS_ONLY)]
    if not states or local or (update.is_linear and not update.curvature):
        return
    way_out = (
        "`scheme='central'`, or `ascent_sync=False`"
        if update.curvature
        else "`SAM`, or a hook without a state, such as `bf16_compress_hook`"
    )
    raise MisconfigurationException(
        f"The method combines gradients that are reduced separately, and {type(states[0]).__name__}, the state of DDP's"
        f" communication hook, may add to each what was left out before: use {way_out}"
    )


_COUNTS_ONLY = "PostLocalSGDState"


def kept_comm_states(trainer: "Trainer", update: Update) -> CommStates:
    """What DDP's communication hooks keep, to be given back before gradients are reduced once more."""
    check_comm_hooks(trainer, update, False)
    return CommStates(comm_hook_states(trainer.strategy.model))


def reduction(trainer: "Trainer", local: bool, writes: bool) -> dict[str, bool]:
    """The options of :func:`~lightning_gr.core.two_pass.add_second_pass_` that depend on how gradients are reduced.

    Args:
        trainer: The Trainer.
        local: Whether each rank ascends along its own gradient.
        writes: Whether code of the user's writes to gradients.
    """
    model = trainer.strategy.model
    hooked = has_comm_hooks(model)
    return {
        # FSDP1 would take what is in `.grad` for a gradient of the whole unit. A hook that keeps what it leaves out
        # would find in `.grad` what it has added to the first gradient, and add it again
        "apart": writes or is_fsdp1(trainer) or (not local and bool(comm_hook_states(model))),
        "weighted": hooked,
        # a hook may leave different gradients on ranks, as local SGD does
        "check_finite": not local and not hooked,
    }
