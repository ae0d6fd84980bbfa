"""Replays evaluations of a loss from the same starting state, without side effects."""
