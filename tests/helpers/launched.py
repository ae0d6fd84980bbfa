"""A training run with DDP and options from the command line; run by test_launchers.py."""

import sys

import torch
from replicas import Case, Module, fit

from lightning_gr import in_second_pass


class Saving(Module):
    """Saves the final state of each rank; on request, fails on the last rank in its second pass."""

    def __init__(self, case, folder, fails):
        super().__init__(case)
        self.folder, self.fails = folder, fails

    def training_step(self, batch, batch_idx):
        if self.fails and in_second_pass() and batch_idx == 2 and self.global_rank == 1:
            raise ValueError("broken on rank 1")
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        torch.save({n: p.detach() for n, p in self.net.named_parameters()}, f"{self.folder}/{self.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, strategy, devices, nodes, method, fails = sys.argv[1:]
    local = {"ascent_sync": False} if method == "local" else {}
    case = Case("SAM", local)
    fit(case, Saving(case, folder, fails == "fails"), strategy=strategy, devices=int(devices), num_nodes=int(nodes))
