"""The Hessian of a loss: its largest eigenvalue, its trace, and slices through the loss."""
