"""The two-pass callbacks: gradient regularization and SAM."""

from collections.abc import Sequence

from lightning_gr._validate import GradientClip
from lightning_gr.callbacks.base import TwoPass
from lightning_gr.core.rules import Accumulation, GRRule, SAMRule, Scheme

__all__ = ["SAM", "GradientRegularization"]


class GradientRegularization(TwoPass):
    """Gradient regularization with finite differences: penalizes (γ/2)‖∇L(θ)‖² using a second pass.

    F-GR (``scheme="forward"``) takes an ascent step and passes the optimizer

        g = (1 − γ/ε) ∇L(θ) + (γ/ε) ∇L(θ + ε ∇L(θ)).

    With γ = ε this is SAM without normalization. ``"backward"`` (B-GR) takes a descent step instead, ``"central"``
    takes both in three passes, and ``"exact"`` uses double backward. ``normalize=True`` gives the gradient-norm penalty
    γ‖∇L(θ)‖.

    Args:
        gamma: The penalty strength γ ≥ 0. The paper's grid for WRN-28-10 spans 1e-4 to 1e-1. 0 is plain training.
        epsilon: The finite-difference step ε > 0. "A relatively large ε ≈ 0.05" works best (Ackermann et al., arXiv
            2602.18037, appendix C, on the paper's grid 0.01 to 0.5).
        scheme: ``"forward"`` (F-GR), ``"backward"`` (B-GR), ``"central"`` (three passes) or ``"exact"`` (double
            backward).
        normalize: Take the step ε∇L/‖∇L‖ instead of ε∇L, which penalizes γ‖∇L‖ instead of (γ/2)‖∇L‖².
        start_step: The first optimizer step (counted from 0) to regularize.
        interval: Regularize every ``interval``-th optimizer step from then on.
        warmup_steps: The number of optimizer steps over which the penalty grows linearly from 0. Recommended with Adam
            and a learning-rate warm-up.
        lazy: Multiply γ by ``interval`` to make up for the skipped steps. ε is not multiplied; increase it if
            γ · interval is much larger.
        exclude: Shell-style patterns for parameter names, such as ``["*.bias", "*norm*"]``. These parameters are
            neither perturbed nor regularized and get exactly the clean gradient.
        ascent_sync: Whether to average the first gradient over devices before it sets the direction. False saves that
            communication: each device ascends along its own gradient.
        accumulation: With ``accumulate_grad_batches``, ``"window"`` regularizes the gradient of the whole window, as
            for one large batch, and keeps its batches until then. ``"micro_batch"`` regularizes each micro-batch
            separately (m-sharpness) and keeps none.
        metrics: The metrics to log, on the steps that Lightning logs: ``"default"`` (gradient norm, sharpness,
            penalty), ``"all"``, names from docs/metrics.md, or ``()`` for none.
        prefix: The prefix of the metrics' keys.
        prog_bar: Whether to show the gradient norm in the progress bar.
        verbose: Whether to print a panel before training and a table after it. They are only printed if Lightning shows
            a progress bar or a model summary.
        gradient_clip: Scale the clean gradient, and each further one, down to this norm before they are combined; two
            numbers are the norms of the clean gradient and of the further ones. The Trainer's own clipping comes after.

    Raises:
        ValueError: If an argument is out of range, or, at the start of ``fit``, if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if this Trainer or module is not supported.

    Source: Karakida, Takase, Hayase & Osawa (ICML 2023, arXiv 2210.02720); Zhao, Zhang & Hu (ICML 2022, arXiv
    2202.03599) for ``normalize=True``.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[GradientRegularization(gamma=0.1)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        gamma: float = 0.05,
        epsilon: float = 0.05,
        *,
        scheme: Scheme = "forward",
        normalize: bool = False,
        start_step: int = 0,
        interval: int = 1,
        warmup_steps: int = 0,
        lazy: bool = False,
        exclude: Sequence[str] = (),
        ascent_sync: bool = True,
        accumulation: Accumulation = "window",
        metrics: str | Sequence[str] = "default",
        prefix: str = "gr/",
        prog_bar: bool = False,
        verbose: bool = True,
        gradient_clip: GradientClip | None = None,
    ) -> None:
        super().__init__(
            GRRule(gamma, epsilon, scheme, normalize),
            start_step=start_step,
            interval=interval,
            warmup_steps=warmup_steps,
            lazy=lazy,
            exclude=exclude,
            ascent_sync=ascent_sync,
            accumulation=accumulation,
            metrics=metrics,
            prefix=prefix,
            prog_bar=prog_bar,
            verbose=verbose,
            gradient_clip=gradient_clip,
        )


class SAM(TwoPass):
    """Sharpness-aware minimization: takes the gradient at the worst point of a ball around the weights.

        g = ∇L(θ + ρ ∇L(θ)/‖∇L(θ)‖)

    ``adaptive=True`` is ASAM, which scales the ball by T = |θ| + η: g = ∇L(θ + ρ T²∇L/‖T∇L‖).

    Args:
        rho: The radius ρ ≥ 0. Foret et al. use 0.05; ASAM needs about ten times as much (Kwon et al.).
        adaptive: Use ASAM's ball, scaled by the size of each weight.
        eta: ASAM's η ≥ 0. The default of 0 follows common implementations (Kwon et al. give 0.01).
        start_step: The first optimizer step (counted from 0) to regularize.
        interval: Regularize every ``interval``-th optimizer step from then on.
        warmup_steps: The number of optimizer steps over which the radius grows linearly from 0.
        lazy: Multiply ρ by ``interval``.
        exclude: Shell-style patterns for parameter names, such as ``["*.bias", "*norm*"]``. These parameters are not
            perturbed and get exactly the clean gradient.
        ascent_sync: Whether to average the first gradient over devices before it sets the direction. False
            (m-sharpness) saves that communication, and Foret et al. found that it generalizes better.
        accumulation: With ``accumulate_grad_batches``, ``"window"`` regularizes the gradient of the whole window, as
            for one large batch, and keeps its batches until then. ``"micro_batch"`` regularizes each micro-batch
            separately (m-sharpness) and keeps none.
        metrics: The metrics to log, on the steps that Lightning logs: ``"default"`` (gradient norm, sharpness,
            penalty), ``"all"``, names from docs/metrics.md, or ``()`` for none.
        prefix: The prefix of the metrics' keys.
        prog_bar: Whether to show the gradient norm in the progress bar.
        verbose: Whether to print a panel before training and a table after it. They are only printed if Lightning shows
            a progress bar or a model summary.
        gradient_clip: Scale the clean gradient, and each further one, down to this norm before they are combined; two
            numbers are the norms of the clean gradient and of the further ones. The Trainer's own clipping comes after.

    Raises:
        ValueError: If an argument is out of range, or, at the start of ``fit``, if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if this Trainer or module is not supported.

    Source: Foret, Kleiner, Mobahi & Neyshabur (ICLR 2021, arXiv 2010.01412), equation 2 and algorithm 1; Kwon, Kim,
    Park & Choi (ICML 2021, arXiv 2102.11600).

    Example::

        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[SAM(rho=0.05)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        eta: float = 0.0,
        start_step: int = 0,
        interval: int = 1,
        warmup_steps: int = 0,
        lazy: bool = False,
        exclude: Sequence[str] = (),
        ascent_sync: bool = True,
        accumulation: Accumulation = "window",
        metrics: str | Sequence[str] = "default",
        prefix: str = "gr/",
        prog_bar: bool = False,
        verbose: bool = True,
        gradient_clip: GradientClip | None = None,
    ) -> None:
        super().__init__(
            SAMRule(rho, adaptive, eta),
            start_step=start_step,
            interval=interval,
            warmup_steps=warmup_steps,
            lazy=lazy,
            exclude=exclude,
            ascent_sync=ascent_sync,
            accumulation=accumulation,
            metrics=metrics,
            prefix=prefix,
            prog_bar=prog_bar,
            verbose=verbose,
            gradient_clip=gradient_clip,
        )
