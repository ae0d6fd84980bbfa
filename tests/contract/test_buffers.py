"""The contract for buffers of every kind."""

import pytest
import torch
from contract import LIGHTNING, Batches, Situation, check_no_trace, contract, make_trainer, same, seed, witness
from fingerprints import fingerprint
from oracle import HUGE
from torch import nn

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support is in beta",
    "ignore:The PyTorch API of nested tensors is in prototype",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
)


class Norms(Situation):
    """BatchNorm with a momentum and with a cumulative average, both updated in every forward pass."""

    def prepare(self):
        self.norm, self.average = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3, momentum=None).double()

    def step(self, batch):
        witness(self.norm.running_mean)
        witness(self.average.num_batches_tracked)
        return self.mse((self.norm(self.average(batch[0])), batch[1]))


class LazyNorm(Situation):
    """A layer whose buffers have no shape before the first step."""

    has_oracle = False

    def prepare(self):
        self.norm = nn.LazyBatchNorm1d(affine=False).double()

    def step(self, batch):
        return self.mse((self.norm(batch[0]), batch[1]))


class LazyNormOfTheThirdStep(LazyNorm):
    """Large lazy layers, first used between two learning evaluations; one of them has lazy weights as well."""

    def prepare(self):
        self.calls = 0
        self.norm = nn.LazyInstanceNorm1d(affine=False, track_running_stats=True).double()
        self.wide = nn.LazyBatchNorm1d(affine=False).double()
        self.head = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()).double()

    def step(self, batch):
        self.calls += 1
        x = batch[0]
        if self.calls >= 3:
            x = x + self.norm(x.reshape(1, 3, -1)).mean() + self.wide(x.repeat(1, 700)).std()
            x = self.head(x)
        return self.mse((x, batch[1]))


class Graph(Situation):
    """A sparse adjacency matrix that is only read."""

    has_oracle = False  # cannot be deep-copied

    def prepare(self):
        self.register_buffer("adjacency", torch.eye(4).double().to_sparse_csr())

    def step(self, batch):
        return self.mse((self.adjacency @ batch[0], batch[1]))


class SparseWritten(Situation):
    """Two COO buffers, one replaced by assignment and one written to in place."""

    def prepare(self):
        self.register_buffer("assigned", torch.eye(4).double().to_sparse())
        self.register_buffer("scaled", torch.eye(4).double().to_sparse())

    def step(self, batch):
        witness(self.assigned.to_dense())
        witness(self.scaled.to_dense())
        self.assigned = (self.assigned * 0.9).coalesce()
        self.scaled.mul_(0.9)
        return self.mse((self.assigned @ (self.scaled @ batch[0]), batch[1]))


class Ragged(Situation):
    """A nested tensor that is only read."""

    has_oracle = False

    def prepare(self):
        self.register_buffer("parts", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], dtype=torch.float64))

    def step(self, batch):
        return self.mse((self.parts.unbind()[1] * batch[0], batch[1]))


class RaggedWritten(Situation):
    """A nested tensor that each step writes to in place."""

    has_oracle = False

    def prepare(self):
        self.register_buffer("parts", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], dtype=torch.float64))

    def step(self, batch):
        witness(self.parts.unbind()[1])
        self.parts.mul_(0.9)
        return self.mse((self.parts.unbind()[1] * batch[0], batch[1]))


class Resized(Situation):
    """Buffers that are resized, as by the observers of torch.ao in their first call."""

    def prepare(self):
        self.register_buffer("low", torch.tensor([]).double())
        self.register_buffer("seen", torch.zeros(1).double())

    def step(self, batch):
        x = batch[0]
        witness(self.low)
        witness(self.seen)
        if self.low.numel() == 0:
            self.low.resize_(3)
            self.low.copy_(x.amin(0))
        self.low.copy_(torch.minimum(self.low, self.net(x).detach().amin()))
        self.seen.resize_(len(self.seen) + 1)
        self.seen[-1] = 1.0
        return self.mse((x - self.low, batch[1]))


class Reassigned(Situation):
    """Buffers that grow by assignment or are registered again."""

    def prepare(self):
        self.register_buffer("queue", torch.zeros(0, 2).double(), persistent=False)
        self.register_buffer("state", torch.zeros(2).double())

    def step(self, batch):
        witness(self.queue)
        witness(self.state)
        self.queue = torch.cat([self.queue, self.net(batch[0]).detach()])[-6:]
        self.register_buffer("state", self.state + 1)
        # the factor is bounded: otherwise the weights would not stay finite for nine steps
        return self.mse(batch) * (1 + 0.1 * torch.sin(self.queue.square().mean() + self.state.sum()))


class Deleted(Situation):
    """Deletes a buffer, and creates and deletes another one within the step."""

    def prepare(self):
        self.register_buffer("tmp", torch.ones(3).double())
        self.register_buffer("kept", torch.ones(3).double())

    def step(self, batch):
        kept = self.kept
        witness(kept)
        if hasattr(self, "tmp"):
            del self.tmp
        self.register_buffer("scratch", kept * 0.9)
        loss = self.mse((batch[0] * self.scratch, batch[1]))
        del self.scratch, self.kept
        self.register_buffer("kept", kept * 0.9)
        return loss


class PastTheCounter(Situation):
    """Writes through ``.data``, through NumPy and through a view of another buffer."""

    def prepare(self):
        self.register_buffer("data_", torch.zeros(3).double())
        self.register_buffer("array", torch.zeros(3).double())
        self.register_buffer("whole", torch.zeros(6).double())
        self.register_buffer("part", self.whole[:3])

    def step(self, batch):
        for buffer in (self.data_, self.array, self.whole, self.part):
            witness(buffer)
        self.data_.data.add_(1.0)
        self.array.numpy()[:] += 1.0
        self.part += 1.0
        return self.mse((batch[0] + self.data_ + self.array + self.whole[:3], batch[1]))


class Kinds(Situation):
    """Buffers of other dtypes and shapes, some written to and some only read."""

    def prepare(self):
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("phase", torch.zeros(3, dtype=torch.complex128))
        self.register_buffer("short", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("wide", torch.ones(1, 3).double().expand(4, 3))
        self.register_buffer("turned", torch.zeros(3, 4).double().T)

    def step(self, batch):
        for buffer in (self.flag, self.count, self.phase.abs(), self.short, self.turned):
            witness(buffer)
        self.flag.logical_not_()
        self.count += 1
        self.phase += 0.5j
        self.short += 0.25
        self.turned += 1.0
        scale = 1 + self.flag.double() + self.count + self.phase.abs().sum() + self.short.double().sum()
        return self.mse((batch[0] * self.wide + 0.1 * self.turned, batch[1])) * scale / 100


class BornInInference(Situation):
    """Buffers that are assigned in ``validation_step``, which Lightning runs in inference mode."""

    forms, has_oracle = LIGHTNING, False

    def prepare(self):
        self.register_buffer("threshold", torch.zeros(2).double())
        self.register_buffer("limit", torch.zeros(2).double())
        with torch.inference_mode():
            self.threshold = torch.ones(2).double()
            self.limit = torch.ones(2).double()
            self.best = {"scores": torch.ones(2).double()}

    def validation_step(self, batch, batch_idx):
        self.threshold = self.net(batch[0]).mean(0)
        self.limit = self.net(batch[0]).amin(0)
        self.best = {"scores": self.net(batch[0]).amax(0)}

    def step(self, batch):
        witness(self.threshold)
        self.threshold = self.threshold * 0.9
        shift = self.limit + self.best["scores"]
        return self.mse((batch[0], batch[1] + shift)) * (1 + self.threshold.square().sum())


test_leaves_no_trace, test_gradient = contract(
    Norms,
    LazyNorm,
    LazyNormOfTheThirdStep,
    Graph,
    SparseWritten,
    Ragged,
    RaggedWritten,
    Resized,
    Reassigned,
    Deleted,
    PastTheCounter,
    Kinds,
    BornInInference,
)


def test_validate_before_fit():
    states = []
    for callbacks in ([], [HUGE.callback()]):
        seed()
        module = BornInInference()
        seed()
        batches = module.make_batches()
        trainer = make_trainer(*callbacks, limit_val_batches=2)
        trainer.validate(module, Batches(batches), verbose=False)
        trainer.fit(module, Batches(batches), Batches(batches))
        states.append(fingerprint(module))
    same("what is left", *states[::-1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("form", LIGHTNING)
def test_observers_of_quantization_aware_training(form):
    """``prepare_qat`` with the default configuration for x86, whose observers resize their buffers."""
    check_no_trace(Quantized, form)


class Quantized(Situation):
    has_oracle = False

    def prepare(self):
        quantization = torch.ao.quantization
        self.net = nn.Sequential(quantization.QuantStub(), nn.Linear(3, 2), quantization.DeQuantStub())
        self.net.qconfig = quantization.get_default_qat_qconfig("x86")
        self.net.train()
        quantization.prepare_qat(self.net, inplace=True)

    def make_batches(self):
        return [(x.float(), y.float()) for x, y in super().make_batches()]

    def step(self, batch):
        witness([buffer.clone() for buffer in self.net.buffers()])
        return self.mse(batch)
