"""The callback of the method with a single pass: Momentum-SAM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gr._validate import check_bool
from lightning_gr.callbacks.base import TwoPass
from lightning_gr.core.rules import MomentumSAMRule

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["MomentumSAM"]


class MomentumSAM(TwoPass):
    """Momentum-SAM: flat minima in a single pass, by the gradient at a point ahead along the optimizer's momentum.

        g = ∇L(θ − ρ v/‖v‖)

    v is the optimizer's momentum and ‖v‖ one norm over all parameters that are moved. −v is the step that was just
    taken, so the point lies ahead of the weights; on average the loss is higher there. A step costs about what plain
    training costs.

    The weights are at that point during the forward and the backward pass of each micro-batch, and are themselves at
    any other moment, bit for bit: hooks, checkpoints, averages, validation and the optimizer's step see nothing of it.
    The loss that ``training_step`` logs and the running statistics of BatchNorm are those of the moved weights. Before
    the first optimizer step there is no momentum, and that step is a plain one.

    Args:
        rho: The radius ρ ≥ 0. 2 was good on six small image tasks, and the authors use 1.7 to 5.5; from about 4 on
            training may fail.
        start_step: The first optimizer step (counted from 0) at which to look ahead. With a ViT, take the end of the
            learning rate's warm-up.
        interval: Every how many optimizer steps from there.
        warmup_steps: Over how many optimizer steps from there the radius grows linearly from 0.
        exclude: Shell-style patterns over parameter names, as in ``["*.bias", "*norm*"]``. Such parameters are not
            moved.
        update_batchnorm: Whether to re-estimate the running statistics of BatchNorm at the end of training, at the
            weights that were trained, by one more pass over the training data (torch's ``update_bn``, which calls
            ``forward`` with each batch or, of a tuple or list, its first entry).
        metrics: What to log on the steps that Lightning logs: ``"default"`` is the gradient norm (of g); ``"all"`` adds
            the sharpness L(θ − ρ v/‖v‖) − L(θ), for one forward pass on these steps; ``()`` is nothing.
        prefix: What the keys of the metrics begin with.
        prog_bar: Whether to show the gradient norm in the progress bar.
        verbose: Whether to show a panel before training and a table after it, unless Lightning itself is silent.

    Raises:
        ValueError: If an argument is out of its range, or at the start of ``fit`` if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if an optimizer keeps no momentum, or if this Trainer or
            module cannot be regularized.

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
        """Check the context."""
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
        """Look ahead in this step, if it is due."""
        if self.update_batchnorm and not isinstance(batch, (Tensor, list, tuple)):
            raise MisconfigurationException(
                "`update_batchnorm=True` needs batches that are tensors, or tuples or lists that begin with one, but"
                f" got {type(batch).__name__}: leave `update_batchnorm` out"
            )
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @torch.no_grad()
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Re-estimate the statistics of BatchNorm."""
        super().on_train_end(trainer, pl_module)
        if self.update_batchnorm and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in pl_module.modules()):
            torch.optim.swa_utils.update_bn(trainer.train_dataloader, pl_module, pl_module.device)  # type: ignore[arg-type]
