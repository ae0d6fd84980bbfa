"""Measures of sharpness: the Hessian's largest eigenvalue and trace, and one-dimensional slices of the loss."""
