"""The Lightning callbacks and the mixin."""
