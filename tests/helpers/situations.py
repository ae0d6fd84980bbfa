"""Situations shared by several contract tests."""

import numpy as np
from contract import AUTOMATIC, Situation, witness


class Factor(Situation):
    """Multiplies the loss by a number that depends on what the step writes."""

    def factor(self, loss):
        raise NotImplementedError

    def step(self, batch):
        loss = self.mse(batch)
        factor = float(self.factor(float(loss.detach())))
        witness(factor)
        return loss * (1 + 0.1 * np.tanh(factor))


class Wrapped(Situation):
    """Wraps each batch in a custom object, which Lightning moves to the device unchanged."""

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
    """Batches that a step writes to: closures hold theirs in a local variable, which cannot be restored."""

    forms = AUTOMATIC
