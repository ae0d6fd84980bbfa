"""A module of another library, unchanged: `python examples/tune/forecasting.py`.

pytorch-forecasting's TemporalFusionTransformer (`pip install pytorch-forecasting`) on its own autoregressive series:
60 series for training, and the last 20 steps of each for validation. Nothing is downloaded.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import pytorch_forecasting as forecasting
from pytorch_forecasting.data.examples import generate_ar_data
from rich.console import Console

from lightning_gr.tune import TuneError, tune
from lightning_gr.tune.answer import make_tables

warnings.filterwarnings("ignore", module="lightning|pytorch_lightning|pytorch_forecasting")
ENCODER, HORIZON = 40, 20


def datasets() -> list[forecasting.TimeSeriesDataSet]:
    """Series for training, and for validation in the steps that follow."""
    np.random.seed(0)  # generate_ar_data draws from the global generator
    frame = generate_ar_data(seasonality=10.0, timesteps=200, n_series=60, noise=0.3, trend=2.0, seed=0)
    frame["series"] = frame["series"].astype(str)
    train = forecasting.TimeSeriesDataSet(
        frame[frame["time_idx"] < 200 - HORIZON],
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        max_encoder_length=ENCODER,
        max_prediction_length=HORIZON,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["time_idx"],
    )
    validation = forecasting.TimeSeriesDataSet.from_dataset(train, frame, min_prediction_idx=200 - HORIZON)
    return [train, validation]


TRAIN, VALIDATION = datasets()


def make_module() -> forecasting.TemporalFusionTransformer:
    return forecasting.TemporalFusionTransformer.from_dataset(
        TRAIN,
        hidden_size=16,
        attention_head_size=1,
        dropout=0.1,
        learning_rate=3e-3,
        optimizer="adamw",
        log_interval=-1,
    )


def make_data() -> list:
    loaders = TRAIN.to_dataloader(train=True, batch_size=64, num_workers=0)
    return [loaders, VALIDATION.to_dataloader(train=False, batch_size=64, num_workers=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs", "tune", "forecasting"))
    for name, default in (("epochs", 8), ("batches", 40), ("trials", 6), ("seeds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    flags = {
        "max_epochs": args.epochs,
        "limit_train_batches": args.batches,
        "accelerator": "cpu",
        "gradient_clip_val": 0.5,
    }
    try:
        result = tune(
            make_module,
            make_data,
            monitor="val_loss",
            methods=["plain", "SAM", "MomentumSAM"],
            trials=args.trials,
            seeds=args.seeds,
            trainer=flags,
            output=args.output,
        )
    except TuneError as error:
        sys.exit(f"error: {error}")
    console = Console()
    for table in make_tables(result):
        console.print(table)
    console.print(result.sentence, markup=False)


if __name__ == "__main__":
    main()
