"""Unchanged libraries that ship LightningModules and accept callbacks through their own options."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from real import QUIET, assert_close, check_library, run

from lightning_gr import SAM, Flooding, GradientRegularization

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # warnings of the libraries, which we cannot fix
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_demos(namespace, tmp_path):
    """Lightning's demo transformer, with a local text instead of a downloaded one."""
    lightning = pytest.importorskip(namespace)
    demo = importlib.import_module(f"{namespace}.demos.transformer")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext-2.txt").write_text("flat minima are found by small steps in wide valleys\n" * 20)

    def train(callbacks):
        model = demo.LightningTransformer(vocab_size=demo.WikiText2(download=False).vocab_size)
        lightning.Trainer(max_epochs=1, limit_train_batches=4, callbacks=callbacks, **QUIET).fit(model)

    check_library(train)


def test_pytorch_forecasting():
    pd, forecasting = pytest.importorskip("pandas"), pytest.importorskip("pytorch_forecasting")
    import lightning.pytorch as pl

    steps = np.arange(60)
    frames = [
        pd.DataFrame({"time": steps, "series": str(i), "value": np.sin(steps / 5 + i).astype("float32")})
        for i in range(4)
    ]
    data = forecasting.TimeSeriesDataSet(
        pd.concat(frames, ignore_index=True),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        static_categoricals=["series"],
    )
    loader = data.to_dataloader(train=True, batch_size=32, num_workers=0)

    def train(callbacks):
        model = forecasting.TemporalFusionTransformer.from_dataset(
            data, hidden_size=8, attention_head_size=1, dropout=0.1, log_interval=-1
        )
        trainer = pl.Trainer(max_epochs=1, limit_train_batches=4, callbacks=callbacks, **QUIET)
        trainer.fit(model, loader)

    check_library(train)


def test_scvi_tools():
    scvi = pytest.importorskip("scvi")

    def train(callbacks):
        scvi.settings.seed = 0  # for the split of the data
        adata = scvi.data.synthetic_iid(batch_size=100)
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        model = scvi.model.SCVI(adata, n_hidden=16, n_latent=4)
        options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "max_epochs": 2}
        model.train(callbacks=callbacks, train_size=0.9, batch_size=64, **options)

    check_library(train)


def test_chemprop():
    pytest.importorskip("chemprop")
    import lightning.pytorch as pl
    from chemprop import data, featurizers, models, nn

    smiles = ["C" * n + end for n in range(1, 9) for end in ("O", "N", "C", "Cl")]
    points = [data.MoleculeDatapoint.from_smi(s, [float(len(s))]) for s in smiles]
    dataset = data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())

    def train(callbacks):
        loader = data.build_dataloader(dataset, batch_size=8, seed=0, shuffle=True)
        model = models.MPNN(
            nn.BondMessagePassing(d_h=16, depth=2, dropout=0.1),
            nn.MeanAggregation(),
            nn.RegressionFFN(input_dim=16),
            True,
        )
        trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, **QUIET)
        trainer.fit(model, loader)

    check_library(train)


def test_pytorch_tabular(tmp_path):
    """Models can also be saved and loaded together with their callbacks."""
    pytest.importorskip("pytorch_tabular")
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig
    from sklearn.datasets import load_wine

    frame = load_wine(as_frame=True).frame
    frame["level"] = pd.cut(frame["alcohol"], 3, labels=["low", "middle", "high"]).astype(str)
    numbers = [name for name in frame.columns if name not in ("target", "level")]
    architecture = {"task": "classification", "layers": "16", "use_batch_norm": True, "dropout": 0.1}
    options = {"early_stopping": None, "checkpoints": None, "load_best": False, "progress_bar": "none"}

    def train(callbacks):
        model = TabularModel(
            data_config=DataConfig(target=["target"], continuous_cols=numbers, categorical_cols=["level"]),
            model_config=CategoryEmbeddingModelConfig(**architecture),
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(batch_size=32, max_epochs=1, accelerator="cpu", **options),
            verbose=False,
        )
        model.fit(train=frame, callbacks=callbacks, seed=0)
        return model

    check_library(train)
    model = train([GradientRegularization(0.1)])
    model.save_model(str(tmp_path / "model"))
    loaded = TabularModel.load_model(str(tmp_path / "model"))
    assert loaded.predict(frame).equals(model.predict(frame))


def test_neuralforecast(tmp_path):
    neuralforecast = pytest.importorskip("neuralforecast")
    import pandas as pd
    from neuralforecast.models import NHITS

    stamps = pd.date_range("2000-01-01", periods=80, freq="D")
    value = np.sin(np.arange(80) / 4).astype("float32")
    frame = pd.concat([pd.DataFrame({"unique_id": str(i), "ds": stamps, "y": value + i}) for i in range(3)])

    def train(callbacks):
        sizes = {"h": 4, "input_size": 12, "mlp_units": 3 * [[16, 16]]}
        model = NHITS(**sizes, max_steps=4, callbacks=callbacks, **QUIET)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forecast = neuralforecast.NeuralForecast(models=[model], freq="D")
            forecast.fit(frame)
        return forecast

    check_library(train)
    forecast = train([SAM(0.1)])
    forecast.save(str(tmp_path / "model"), save_dataset=True)
    loaded = neuralforecast.NeuralForecast.load(str(tmp_path / "model"))
    assert loaded.predict()["NHITS"].tolist() == forecast.predict()["NHITS"].tolist()


def test_darts(tmp_path, monkeypatch):
    pytest.importorskip("darts")
    from darts.models import NBEATSModel
    from darts.utils.timeseries_generation import sine_timeseries

    series = sine_timeseries(length=120).astype(np.float32)

    def train(callbacks):
        model = NBEATSModel(
            input_chunk_length=12,
            output_chunk_length=4,
            num_blocks=1,
            num_stacks=2,
            layer_widths=16,
            n_epochs=1,
            batch_size=24,
            pl_trainer_kwargs={**QUIET, "callbacks": callbacks},
            random_state=0,
        )
        model.fit(series)
        return model

    check_library(train)
    model = train([Flooding(0.01), GradientRegularization(0.1)])
    model.save(str(tmp_path / "model.pt"))
    loaded = NBEATSModel.load(str(tmp_path / "model.pt"), trusted=True)  # the file also refers to our classes
    assert loaded.predict(4) == model.predict(4)
    expected = run(train, GradientRegularization(0.1))
    monkeypatch.setenv("LIGHTNING_GR", "gamma=0.1")
    assert_close(run(train).after, expected.after)


def test_transformers():
    transformers = pytest.importorskip("transformers")
    import pytorch_lightning as pl

    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    tokens = torch.randint(40, (16, 16), generator=torch.Generator().manual_seed(0))

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(config)

        def training_step(self, batch, batch_idx):
            loss = self.model(input_ids=batch, labels=batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train(callbacks):
        trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, **QUIET)
        trainer.fit(Module(), torch.utils.data.DataLoader(tokens, batch_size=4))

    check_library(train)


def test_torch_geometric():
    pytest.importorskip("torch_geometric")
    import lightning.pytorch as pl  # which its data module uses if both are installed
    from torch_geometric.data import Data
    from torch_geometric.data.lightning import LightningDataset
    from torch_geometric.nn import GCN, global_mean_pool

    generator = torch.Generator().manual_seed(0)
    graphs = [
        Data(
            x=torch.randn(6, 4, generator=generator),
            edge_index=torch.randint(6, (2, 10), generator=generator),
            y=torch.tensor([i % 2]),
        )
        for i in range(32)
    ]

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.gnn = GCN(4, 16, num_layers=2, out_channels=2, dropout=0.1, norm="batch_norm")

        def training_step(self, batch, batch_idx):
            out = global_mean_pool(self.gnn(batch.x, batch.edge_index), batch.batch)
            return torch.nn.functional.cross_entropy(out, batch.y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def train(callbacks):
        trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, **QUIET)
        trainer.fit(Module(), datamodule=LightningDataset(graphs, batch_size=8))

    check_library(train)


def test_the_example_that_tunes_pytorch_forecasting(tmp_path):
    pytest.importorskip("pytorch_forecasting")
    program = Path(__file__).parents[2] / "examples" / "tune" / "forecasting.py"
    sizes = {"epochs": 1, "batches": 6, "trials": 1, "seeds": 2}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(program), "--output", str(tmp_path), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "MomentumSAM" in ended.stdout
    assert {"best.yaml", "trials.csv", "final.png"} <= {path.name for path in tmp_path.iterdir()}
