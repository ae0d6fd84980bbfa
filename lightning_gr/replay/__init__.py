"""Evaluating a loss again from the same start, without a trace."""
