"""Measures training steps, logs the values, prints summaries and plots runs."""
