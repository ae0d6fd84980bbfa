"""The demonstration: its data, and short runs."""

import pytest
import torch

from lightning_gr.cli.demo import task as demo
from lightning_gr.cli.demo.task import DEMO_METHODS, Digits, train
from lightning_gr.tune.trial import Interrupted


def test_data_is_as_documented():
    from sklearn.datasets import load_digits

    data = Digits.load(seed=3)
    assert [len(labels) for _, labels in (data.train, data.validation, data.test)] == [500, 400, 897]
    images = torch.cat([data.train[0], data.validation[0], data.test[0]])
    everything = torch.tensor(load_digits().data, dtype=torch.float32) / 16 - 0.3
    # the three parts contain each image exactly once
    assert sorted(map(tuple, images.tolist())) == sorted(map(tuple, everything.tolist()))


def test_only_training_labels_are_noisy():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    truth = {tuple(image): label for image, label in zip((torch.tensor(pixels).float() / 16 - 0.3).tolist(), labels)}  # noqa: B905
    data = Digits.load(seed=3)

    def wrong(part):
        images, labels = part
        return sum(truth[tuple(image)] != label for image, label in zip(images.tolist(), labels.tolist(), strict=True))

    assert wrong(data.test) == wrong(data.validation) == 0
    # 100 labels are drawn at random, so about a tenth of them are right by chance
    assert 80 <= wrong(data.train) <= 100


def test_test_part_is_the_same_for_each_seed():
    assert torch.equal(Digits.load(1).test[0], Digits.load(2).test[0])
    assert not torch.equal(Digits.load(1).train[0], Digits.load(2).train[0])


@pytest.mark.slow
def test_a_run_is_determined_by_its_seed():
    first, second, other = (train("SAM", DEMO_METHODS["SAM"](), seed, epochs=2) for seed in (5, 5, 6))
    assert first == second
    assert first != other
    assert [record.epoch for record in first] == [1, 2]


def test_flooding_at_zero_is_plain():
    runs = [train("plain", callbacks, 0, epochs=2) for callbacks in ([], [demo.Flooding(0.0)])]
    assert runs[0] == runs[1]


def test_an_interrupted_run_raises(monkeypatch):
    def interrupt(self, trainer, pl_module):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo._Curves, "on_train_epoch_end", interrupt)
    with pytest.raises(Interrupted):
        train("plain", [], 0, epochs=1)
