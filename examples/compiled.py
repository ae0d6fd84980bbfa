"""The same module with and without torch.compile: `python examples/compiled.py`.

Just pass `torch.compile(module)` to `trainer.fit`; the second pass runs the same compiled graph. On a CPU, the default
backend needs a C++ compiler. `--backend aot_eager` does not.
"""

import argparse
import logging
import time

import pytorch_lightning as pl
import torch
from quickstart import Classifier
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import GradientRegularization


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile (default: inductor)")
    args = parser.parse_args()
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
    results = {}
    for name in ("eager", "compiled"):
        pl.seed_everything(0)
        model = Classifier()
        trained = torch.compile(model, backend=args.backend) if name == "compiled" else model
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_epochs=args.epochs,
            callbacks=[GradientRegularization(gamma=0.1, epsilon=0.05)],
            accelerator="cpu",
            enable_model_summary=False,
            **options,
        )
        start = time.perf_counter()
        loaders = DataLoader(data, batch_size=64, shuffle=True, drop_last=True), DataLoader(data, batch_size=len(data))
        trainer.fit(trained, *loaders)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model.net(data.tensors[0]), data.tensors[1])
        results[name] = torch.cat([param.detach().flatten() for param in model.parameters()])
        print(f"{name:9} training loss {loss:.5f} after {trainer.global_step} steps, {seconds:.1f} s with compilation")
    difference = (results["compiled"] - results["eager"]).norm() / results["eager"].norm()
    print(f"relative difference of the weights {difference:.1e}")
    print("That is rounding: compiled and eager training compute the same update.")


if __name__ == "__main__":
    main()
