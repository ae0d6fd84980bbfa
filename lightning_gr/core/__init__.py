"""The update family on tensors: rules, perturbation and the second pass. Knows no module and no Lightning."""
