"""Finds out which methods help on your module and data, and with which constants: needs the extra ``tune``."""

from lightning_gr.tune.answer import Row, TuneResult
from lightning_gr.tune.ranges import Range, range_test
from lightning_gr.tune.search import tune
from lightning_gr.tune.space import METHODS, TuneError
from lightning_gr.tune.sweep import RangeFinder, Sweep

__all__ = ["METHODS", "Range", "RangeFinder", "Row", "Sweep", "TuneError", "TuneResult", "range_test", "tune"]
