"""Simulates Ctrl-C before a chosen bytecode of the package, and provides a second pass to interrupt."""

import sys
from dis import opmap

import torch
from modules import METHODS, cross_entropy, make_data

from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.two_pass import add_second_pass_
from lightning_gr.replay.evaluation import Evaluation, Surroundings
from lightning_gr.replay.footprint import Footprint


def second_pass_of(name, net):
    """Create a function that runs the second pass of a method on ``net``, without Lightning."""
    batch, params, storage = make_data(), list(net.parameters()), WeightStorage()
    surroundings = Surroundings(Footprint(lambda: {"net": net}), trained=lambda: params)
    evaluation = Evaluation(lambda: cross_entropy(net, batch), surroundings)
    evaluation.first()
    for param in params:
        param.grad = torch.ones_like(param)

    def replay(transform, last=True):
        with evaluation.again(storage.params) as loss:
            transform(loss).backward()

    return lambda: add_second_pass_(METHODS[name].rule.update(), params, replay, storage)


NOP = opmap["NOP"]


class Interrupter:
    """Raises KeyboardInterrupt before the ``count``-th bytecode executed in the package, or in ``part`` of it."""

    def __init__(self, count, part="lightning_gr"):
        self.left, self.part = count, part

    def __enter__(self):
        self.before = sys.gettrace()  # set by coverage, if it is being measured
        # Python 3.12 traces opcodes only if a frame has asked for it before tracing begins
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self.trace)

    def __exit__(self, *exc):
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        if not frame.f_globals.get("__name__", "").startswith(self.part):
            return None
        frame.f_trace_opcodes = True
        # at a NOP the interpreter runs no signal handlers, and no `finally` would see the exception
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] != NOP:
            self.left -= 1
            if self.left == 0:
                self.interrupt()
        return self.trace

    def interrupt(self):
        raise KeyboardInterrupt
