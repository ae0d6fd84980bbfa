"""Lightning callbacks for training and monitoring, and a mixin for manual optimization."""
