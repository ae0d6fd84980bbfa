"""The loop of plain_loop.py with Lightning Fabric: `python examples/fabric_loop.py [--epochs 40]`.

Both passes use the wrapped model and `fabric.backward`, so Fabric's precision and device settings apply to both.
"""

import argparse

import torch
from lightning_fabric import Fabric
from plain_loop import MEANING, network, train

from lightning_gr import GRRule


def run(rule, epochs, **options):
    """Train; return the module and its test accuracy."""
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    fabric.launch()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped, optimizer = fabric.setup(model, optimizer)
    return model, train(wrapped, optimizer, rule, epochs, backward=fabric.backward)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--precision", default="32-true", help="Fabric's precision, for example bf16-mixed")
    args = parser.parse_args()
    for name, rule in {"plain": GRRule(gamma=0.0), "regularized": GRRule(gamma=0.5, epsilon=0.1)}.items():
        print(f"{name}: test accuracy {run(rule, args.epochs, precision=args.precision)[1]:.3f}")
    print(MEANING)


if __name__ == "__main__":
    main()
