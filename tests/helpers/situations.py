"""Situations that several tests of the contract begin with."""

import numpy as np
from contract import AUTOMATIC, Situation, witness


class Factor(Situation):
    """The loss is multiplied by a number that comes from what the step writes."""

    def factor(self, loss):
        raise NotImplementedError

    def step(self, batch):
        loss = self.mse(batch)
        factor = float(self.factor(float(loss.detach())))
        witness(factor)
        return loss * (1 + 0.1 * np.tanh(factor))


class Wrapped(Situation):
    """Each batch is wrapped into something of its own, which Lightning moves to the device as it is."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def make_batches(self):
        return [self.wrap(x, y) for x, y in super().make_batches()]

    def wrap(self, x, y):
        raise NotImplementedError

    def pair(self, batch):
        return batch

    def step(self, batch):
        x, y = self.pair(batch)
        witness(x)
        return self.mse((x, y))


class Written(Wrapped):
    """Closures hold their batch in a local variable, which nobody can put back: see the mixin's docstring."""

    forms = AUTOMATIC
