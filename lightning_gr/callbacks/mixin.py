"""A mixin for manual optimization: GANs, multiple optimizers, custom loops."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_gr.callbacks.manual import LevelChoice, LossFn, ManualRun, RuleChoice

__all__ = ["GradientRegularizationMixin"]


class GradientRegularizationMixin:
    """Gradient regularization, SAM and flooding in manual optimization.

    List it before LightningModule in the bases. The Trainer's callbacks set the method
    (:class:`~lightning_gr.GradientRegularization`, :class:`~lightning_gr.SAM`, :class:`~lightning_gr.Flooding`);
    without them, training is plain. Their schedules count the steps of each optimizer separately.

    As in automatic optimization, the additional passes have no side effects. Each call of the closure starts from the
    same random numbers and the same state, only the first one logs, and the weights are restored bit for bit. State
    includes everything reachable from the module and from the variables that the closure captures: after the step, a
    hidden state assigned through ``nonlocal`` is that of the first pass. Global variables are not restored. Keep such
    state in an attribute or a captured variable, or check :func:`~lightning_gr.in_second_pass`.

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
        """Take one optimizer step: zero the gradients, run both passes, clip, and step.

        Args:
            optimizer: One of ``self.optimizers()``. Only its parameters are perturbed.
            loss_fn: Computes the loss (or a mapping with ``"loss"``) at the current weights; called at least twice. A
                list of functions is treated as micro-batches: the loss is their mean, as for one large batch.
            rule: Overrides the Trainer's method; None skips the second pass.
            level: Overrides the Trainer's flood level; None disables flooding.
            gradient_clip_val: Clip the final gradient at this value. None disables clipping. (The Trainer does not
                accept its own argument in manual optimization.) With 16-mixed, the unscaled gradient is clipped.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``.

        Returns:
            The loss of the first pass, detached and without flooding.

        Raises:
            MisconfigurationException: In automatic optimization, outside ``training_step``, or if ``optimizer`` belongs
                to another module.
            ValueError: If ``loss_fn`` does not return a loss with a graph.
        """
        run = ManualRun.of(self, "regularized_step")
        optimizer = run.find(optimizer)
        optimizer.zero_grad()
        loss = self.regularized_backward(loss_fn, optimizer, rule=rule, level=level)
        if gradient_clip_val is not None:
            with run.unscaled(optimizer):
                run.module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
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
        """Add the final gradient to ``.grad`` without taking a step, for custom clipping or accumulation.

        Existing gradients in ``.grad`` are kept and do not affect the direction, which is computed from this loss only.
        Parameters of other optimizers get the clean gradient.

        Args:
            loss_fn: As in :meth:`regularized_step`.
            optimizer: One of ``self.optimizers()``, whose parameters are regularized, or a subset of one optimizer's
                parameters, such as ``self.backbone.parameters()``. All other parameters get the clean gradient.
            rule: As in :meth:`regularized_step`.
            level: As in :meth:`regularized_step`.

        Returns:
            The loss of the first pass, detached and without flooding.

        Raises:
            MisconfigurationException: As in :meth:`regularized_step`.
            ValueError: If ``loss_fn`` does not return a loss with a graph.
        """
        run = ManualRun.of(self, "regularized_backward")
        if isinstance(optimizer, Iterable):
            params = list(optimizer)
            return run.backward(loss_fn, run.find_owner(params), rule, level, params)
        return run.backward(loss_fn, run.find(optimizer), rule, level)
