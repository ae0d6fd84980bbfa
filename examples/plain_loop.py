"""Gradient regularization in a plain PyTorch loop: `python examples/plain_loop.py [--epochs 40]`.

100 of the 500 training labels are wrong. Plain training memorizes them, which costs accuracy on the clean test images.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_gr import GRRule, regularized_backward

MEANING = "A fifth of the training labels are wrong, and the regularized loop memorizes fewer of them."


def digits():
    """500 training images, 100 of them with random labels, and 1,297 test images, each with their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    labels[:100] = torch.randint(10, (100,), generator=torch.Generator().manual_seed(0))
    return images[:500], labels[:500], images[500:], labels[500:]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def train(model, optimizer, rule, epochs, backward=torch.Tensor.backward):
    """Train ``model`` and return its accuracy on the test images."""
    images, labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            regularized_backward(
                lambda batch=batch: nn.functional.cross_entropy(model(images[batch]), labels[batch]),
                model,
                rule,
                backward=backward,
            )
            optimizer.step()
    with torch.no_grad():
        return (model(test_images).argmax(1) == test_labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    epochs = parser.parse_args().epochs
    for name, rule in {"plain": GRRule(gamma=0.0), "regularized": GRRule(gamma=0.5, epsilon=0.1)}.items():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        print(f"{name}: test accuracy {train(model, optimizer, rule, epochs):.3f}")
    print(MEANING)


if __name__ == "__main__":
    main()
