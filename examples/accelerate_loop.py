"""The loop of plain_loop.py with Hugging Face Accelerate: `python examples/accelerate_loop.py [--epochs 40]`.

Both passes use the prepared model and `accelerator.backward`, so Accelerate's precision and device settings apply to
both.
"""

import argparse

import torch
from accelerate import Accelerator
from plain_loop import MEANING, network, train

from lightning_gr import GRRule


def run(rule, epochs, **options):
    """Train; return the module and its test accuracy."""
    accelerator = Accelerator(cpu=True, **options)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    return model, train(prepared, optimizer, rule, epochs, backward=accelerator.backward)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--precision", default="no", help="Accelerate's mixed_precision, for example bf16")
    args = parser.parse_args()
    for name, rule in {"plain": GRRule(gamma=0.0), "regularized": GRRule(gamma=0.5, epsilon=0.1)}.items():
        print(f"{name}: test accuracy {run(rule, args.epochs, mixed_precision=args.precision)[1]:.3f}")
    print(MEANING)


if __name__ == "__main__":
    main()
