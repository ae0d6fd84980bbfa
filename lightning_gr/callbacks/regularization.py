"""The callbacks of the methods with a second pass: gradient regularization and SAM."""

from collections.abc import Sequence

from lightning_gr.callbacks.base import TwoPassCallback
from lightning_gr.core.rules import Accumulation, GRRule, SAMRule, Scheme

__all__ = ["SAM", "GradientRegularization"]


class GradientRegularization(TwoPassCallback):
    """Gradient regularization by finite differences: penalize (γ/2)‖∇L(θ)‖² at the cost of a second pass.

    F-GR (``scheme="forward"``) takes one ascent step and gives the optimizer

        g = (1 − γ/ε) ∇L(θ) + (γ/ε) ∇L(θ + ε ∇L(θ)).

    With γ = ε this is SAM without normalization. ``"backward"`` (B-GR) descends instead, ``"central"`` does both in
    three passes, ``"exact"`` is double backward. ``normalize=True`` is the gradient-norm penalty γ‖∇L(θ)‖.

    Args:
        gamma: The strength γ ≥ 0 of the penalty. The paper's grid for WRN-28-10 spans 1e-4 to 1e-1; 0 is plain
            training.
        epsilon: The step ε > 0 of the finite difference. "A relatively large ε ≈ 0.05" works best (Ackermann et al.,
            arXiv 2602.18037, appendix C, on the paper's grid 0.01 to 0.5).
        scheme: ``"forward"`` (F-GR), ``"backward"`` (B-GR), ``"central"`` (three passes) or ``"exact"`` (double
            backward).
        normalize: Step ε∇L/‖∇L‖ instead of ε∇L, which penalizes γ‖∇L‖ instead of (γ/2)‖∇L‖².
        start_step: The first optimizer step (counted from 0) that is regularized.
        interval: Every how many optimizer steps from there.
        warmup_steps: Over how many optimizer steps from there the penalty grows linearly from 0. Recommended with
            Adam and a learning-rate warm-up.
        lazy: Multiply γ by ``interval``, so that the steps that are regularized stand for those between. ε is not
            multiplied; where γ · interval is well above it, take a larger one.
        exclude: Shell-style patterns over parameter names, as in ``["*.bias", "*norm*"]``. Such parameters are
            neither perturbed nor regularized and end with exactly the clean gradient.
        ascent_sync: On several devices, whether the first gradient is averaged over them before it gives the
            direction. False saves that communication: each device ascends along its own gradient.
        accumulation: With ``accumulate_grad_batches``: ``"window"`` regularizes the gradient of the whole window, as of
            one large batch, and keeps its batches until then; ``"micro_batch"`` regularizes each micro-batch by
            itself (m-sharpness) and keeps none.
        metrics: What to log on the steps that Lightning logs: ``"default"`` (gradient norm, sharpness, penalty),
            ``"all"``, names as listed in docs/metrics.md, or ``()`` for nothing.
        prefix: What the keys of the metrics begin with.
        prog_bar: Whether the gradient norm is shown in the progress bar, too.
        verbose: Whether to show a panel before training and a table after it, where Lightning shows something, too.

    Raises:
        ValueError: If an argument is out of its range, or at the start of ``fit`` if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if this Trainer or module cannot be regularized.

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
        )


class SAM(TwoPassCallback):
    """Sharpness-aware minimization: the gradient at the worst point of a ball around the weights.

        g = ∇L(θ + ρ ∇L(θ)/‖∇L(θ)‖)

    ``adaptive=True`` is ASAM, whose ball is scaled by T = |θ| + η: g = ∇L(θ + ρ T²∇L/‖T∇L‖).

    Args:
        rho: The radius ρ ≥ 0. 0.05 is Foret et al.'s; ASAM takes about ten times as much (Kwon et al.).
        adaptive: Use ASAM's ball, scaled by the size of each weight.
        eta: η ≥ 0 of ASAM; 0 as in the common implementations (Kwon et al. write 0.01).
        start_step: The first optimizer step (counted from 0) that is regularized.
        interval: Every how many optimizer steps from there.
        warmup_steps: Over how many optimizer steps from there the radius grows linearly from 0.
        lazy: Multiply ρ by ``interval``.
        exclude: Shell-style patterns over parameter names, as in ``["*.bias", "*norm*"]``. Such parameters are not
            perturbed and end with exactly the clean gradient.
        ascent_sync: On several devices, whether the first gradient is averaged over them before it gives the
            direction. False (m-sharpness) saves that communication, and Foret et al. found it to generalize better.
        accumulation: With ``accumulate_grad_batches``: ``"window"`` regularizes the gradient of the whole window, as of
            one large batch, and keeps its batches until then; ``"micro_batch"`` regularizes each micro-batch by
            itself (m-sharpness) and keeps none.
        metrics: What to log on the steps that Lightning logs: ``"default"`` (gradient norm, sharpness, penalty),
            ``"all"``, names as listed in docs/metrics.md, or ``()`` for nothing.
        prefix: What the keys of the metrics begin with.
        prog_bar: Whether the gradient norm is shown in the progress bar, too.
        verbose: Whether to show a panel before training and a table after it, where Lightning shows something, too.

    Raises:
        ValueError: If an argument is out of its range, or at the start of ``fit`` if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if this Trainer or module cannot be regularized.

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
        )
