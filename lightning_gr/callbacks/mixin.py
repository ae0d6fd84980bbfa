"""Manual optimization: GANs, several optimizers, loops of one's own."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_gr.callbacks.manual import LevelChoice, LossFn, ManualRun, RuleChoice

if TYPE_CHECKING:
    # what the mixin is mixed into; at run time it inherits from nothing, so that it works in both namespaces
    from pytorch_lightning import LightningModule as _Base
else:
    _Base = object

__all__ = ["GradientRegularizationMixin"]


class GradientRegularizationMixin(_Base):
    """Gradient regularization, SAM and flooding in manual optimization.

    Put it before LightningModule in the bases. What is done is set by the callbacks in the Trainer
    (:class:`~lightning_gr.GradientRegularization`, :class:`~lightning_gr.SAM`, :class:`~lightning_gr.Flooding`);
    without one the module trains plainly. Their schedules count the steps of each optimizer by itself.

    The passes leave no trace, as in automatic optimization: the closure starts each time from the same random numbers
    and the same state, logs once, and the weights are restored bit for bit. State is what can be reached from the
    module, and the variables that the closure has captured with the objects in them: a hidden state that it assigns
    by ``nonlocal`` is that of the first pass afterwards. Global variables are not put back; keep such state in an
    attribute or a captured variable, or ask :func:`~lightning_gr.in_second_pass`.

    Source: Karakida, Takase, Hayase & Osawa (ICML 2023, arXiv 2210.02720).

    Example: a GAN whose discriminator is regularized and whose generator is not::

        >>> from pytorch_lightning import LightningModule
        >>> class GAN(GradientRegularizationMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.automatic_optimization = False
        ...
        ...     def training_step(self, real):
        ...         generator, discriminator = self.optimizers()
        ...         noise = torch.randn(len(real), 64)
        ...         fake = self.generator(noise).detach()
        ...         self.regularized_step(discriminator, lambda: self.discriminator_loss(real, fake))
        ...         with generator.toggle_model():
        ...             self.regularized_step(generator, lambda: self.generator_loss(noise), rule=None)
    """

    def regularized_step(
        self,
        optimizer: Any,
        loss_fn: LossFn,
        *,
        rule: RuleChoice = "trainer",
        level: LevelChoice = "trainer",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
    ) -> Tensor:
        """Make one step: zero the gradients, run both passes, clip, step.

        Args:
            optimizer: One of ``self.optimizers()``. Only its parameters are perturbed.
            loss_fn: Computes the loss (or a mapping with ``"loss"``) from the current weights; called twice or more
                often. Several of them are micro-batches: the loss is their mean, and the step that of one large batch.
            rule: Another method than the Trainer's, or None for a step without second pass.
            level: Another flood level than the Trainer's, or None for no flooding.
            gradient_clip_val: Clip the final gradient at this value; None does not. (Trainer refuses its own argument
                in manual optimization.) Under 16-mixed it is clipped in the unit of the loss, not in the scaler's.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``.

        Returns:
            The loss of the first pass, detached, without flooding.

        Raises:
            MisconfigurationException: In automatic optimization, outside ``training_step``, or if ``optimizer`` is not
                one of this module.
            ValueError: If ``loss_fn`` returns no loss with a graph.
        """
        run = ManualRun.of(self, "regularized_step")
        optimizer = run.find(optimizer)
        optimizer.zero_grad()
        loss = self.regularized_backward(loss_fn, optimizer, rule=rule, level=level)
        if gradient_clip_val is not None:
            with run.unscaled(optimizer):
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        optimizer.step()
        return loss

    def regularized_backward(
        self,
        loss_fn: LossFn,
        optimizer: Any,
        *,
        rule: RuleChoice = "trainer",
        level: LevelChoice = "trainer",
    ) -> Tensor:
        """Add the final gradient to ``.grad`` and make no step, for clipping or accumulation of your own.

        What is in ``.grad`` before is kept and added to: the direction comes from this loss only. Parameters of other
        optimizers get the clean gradient.

        Args:
            loss_fn: As in :meth:`regularized_step`.
            optimizer: One of ``self.optimizers()``, whose parameters are regularized; or some of the parameters of one
                of them, as in ``self.backbone.parameters()``. The others get the clean gradient.
            rule: As there.
            level: As there.

        Returns:
            The loss of the first pass, detached, without flooding.

        Raises:
            MisconfigurationException: As in :meth:`regularized_step`.
            ValueError: If ``loss_fn`` returns no loss with a graph.
        """
        run = ManualRun.of(self, "regularized_backward")
        if isinstance(optimizer, Iterable):
            params = list(optimizer)
            return run.backward(loss_fn, run.find_owner(params), rule, level, params)
        return run.backward(loss_fn, run.find(optimizer), rule, level)
