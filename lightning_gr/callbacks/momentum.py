"""The Momentum-SAM callback, which needs a single pass."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gr._compat import MisconfigurationException
from lightning_gr._validate import check_bool
from lightning_gr.callbacks.base import TwoPass
from lightning_gr.core.rules import MomentumSAMRule

if TYPE_CHECKING:
    from lightning_gr._compat import AnyModule as LightningModule
    from lightning_gr._compat import AnyTrainer as Trainer

__all__ = ["MomentumSAM"]


class MomentumSAM(TwoPass):
    """Momentum-SAM: flat minima in a single pass, using the gradient at a point ahead along the optimizer's momentum.

        g = ∇L(θ − ρ v/‖v‖)

    v is the optimizer's momentum, and ‖v‖ is a single norm over all displaced parameters. −v is the direction of the
    previous step, so the point lies ahead of the weights, where the loss is higher on average. A step costs about as
    much as in plain training.

    The weights are displaced only during the forward and backward pass of each micro-batch, and restored bit for bit in
    between, so hooks, checkpoints, averages, validation and the optimizer's step see the original weights. The loss
    logged in ``training_step`` and BatchNorm's running statistics are those of the displaced weights. The first
    optimizer step is plain, because there is no momentum yet.

    Args:
        rho: The radius ρ ≥ 0. 2 worked well with MLPs on small image tasks, and the authors use 1.7 to 5.5. Training
            may fail from about 4 on; with a small CNN with BatchNorm, it did in 2 of 5 runs with 1, and 0.3 worked.
        start_step: The first optimizer step (counted from 0) at which to look ahead. For a ViT, use the end of the
            learning-rate warm-up.
        interval: Look ahead every ``interval``-th optimizer step from then on.
        warmup_steps: The number of optimizer steps over which the radius grows linearly from 0.
        exclude: Shell-style patterns for names of parameters that are not displaced, such as ``["*.bias", "*norm*"]``.
        update_batchnorm: Whether to re-estimate BatchNorm's running statistics for the final weights at the end of
            training, with another pass over the training data. This uses torch's ``update_bn``, which calls ``forward``
            with each batch, or with its first entry if the batch is a tuple or list.
        metrics: The metrics to log, on the steps that Lightning logs: ``"default"`` is the gradient norm (of g),
            ``"all"`` adds the sharpness L(θ − ρ v/‖v‖) − L(θ), which takes another forward pass on these steps, and
            ``()`` logs nothing.
        prefix: The prefix of the metrics' keys.
        prog_bar: Whether to show the gradient norm in the progress bar.
        verbose: Whether to print a panel before training and a table after it. They are only printed if Lightning shows
            a progress bar or a model summary.

    Raises:
        ValueError: If an argument is out of range, or, at the start of ``fit``, if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if an optimizer keeps no momentum, or if this Trainer or
            module is not supported.

    Source: Becker, Altrock & Risse (2024, arXiv 2401.12033); the sign is that of the authors' code.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[MomentumSAM(rho=2.0)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        rho: float = 2.0,
        *,
        start_step: int = 0,
        interval: int = 1,
        warmup_steps: int = 0,
        exclude: Sequence[str] = (),
        update_batchnorm: bool = False,
        metrics: str | Sequence[str] = "default",
        prefix: str = "gr/",
        prog_bar: bool = False,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            MomentumSAMRule(rho),
            start_step=start_step,
            interval=interval,
            warmup_steps=warmup_steps,
            exclude=exclude,
            metrics=metrics,
            prefix=prefix,
            prog_bar=prog_bar,
            verbose=verbose,
        )
        check_bool("update_batchnorm", update_batchnorm)
        self.update_batchnorm = update_batchnorm

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Raise if this Trainer or module is not supported."""
        super().setup(trainer, pl_module, stage)
        inherited = type(pl_module).forward.__qualname__ == "LightningModule.forward"
        if stage == "fit" and self.update_batchnorm and inherited:
            raise MisconfigurationException(
                f"`update_batchnorm=True` runs the training data through `forward`, which {type(pl_module).__name__}"
                " does not define: define it, or leave `update_batchnorm` out"
            )

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Check the batch if BatchNorm's statistics will be updated, and decide on the update of the window."""
        if self.update_batchnorm and not isinstance(batch, (Tensor, list, tuple)):
            raise MisconfigurationException(
                "`update_batchnorm=True` needs batches that are tensors, or tuples or lists that begin with one, but"
                f" got {type(batch).__name__}: leave `update_batchnorm` out"
            )
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @torch.no_grad()
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Stop recording, and re-estimate BatchNorm's statistics if requested."""
        super().on_train_end(trainer, pl_module)
        if self.update_batchnorm and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in pl_module.modules()):
            torch.optim.swa_utils.update_bn(trainer.train_dataloader, pl_module, pl_module.device)
