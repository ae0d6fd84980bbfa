"""One-dimensional slices of a loss: the public path of :mod:`lightning_gr.sharpness.slices`."""

from lightning_gr.sharpness.slices import LossSlice, draw_slices, filter_normalized, loss_slice, plot_slices

__all__ = ["LossSlice", "draw_slices", "filter_normalized", "loss_slice", "plot_slices"]
