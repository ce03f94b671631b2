"""Checkpoints of a training go on to the same bits."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_models import FILMS, X, Y, dense, fit, lossy, same

import fastclstm
from fastclstm.io import weights
from fastclstm.layers import Conv2D, Dense, Dropout, TimeDistributed
from fastclstm.models import Sequential
from fastclstm.nn.optimizers import SGD, Adam
from fastclstm.nn.schedules import CosineDecay, ExponentialDecay
from fastclstm.training.history import EarlyStopping

ROOT = Path(fastclstm.__file__).parents[1]


def train(path, model=None, **options):
    model = lossy() if model is None else model
    options = {"optimizer": Adam(0.01, amsgrad=True), "epochs": 3, "batch_size": 2, "validation_split": 0.34,
               "early_stopping": EarlyStopping(9), "checkpoint": path, "resume": True} | options  # fmt: skip
    return model, fit(model, options.pop("x", FILMS), 0.5 * FILMS, **options)


def test_a_checkpoint_after_the_last_epoch_holds_everything(tmp_path):
    path = tmp_path / "c.safetensors"
    model, history = train(path)
    before = path.read_bytes()
    again, curves = train(path)
    assert same(model, again)
    assert curves == history
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.safetensors"]


@pytest.mark.parametrize("seed", [0, None])
def test_more_epochs_go_on_as_if_never_ended(tmp_path, seed):
    path = tmp_path / "c.safetensors"
    train(path, epochs=1, seed=seed if seed is None else np.int64(seed), batch_size=np.int64(2))
    model, history = train(path, epochs=3, seed=seed)
    used = weights.load(path)[1]["progress"]["seed"]
    whole, curves = train(None, resume=False, seed=used)
    assert same(model, whole)
    for name in ("loss", "val_loss", "learning_rate"):
        assert history[name] == curves[name]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_the_state_of_any_generator_is_kept(tmp_path, bits):
    def model():
        return Sequential([Dropout(0.5, seed=np.random.Generator(bits(3))), Dense(3, 2, seed=0)])

    def fitted(path, epochs):
        fit(made := model(), epochs=epochs, checkpoint=path, resume=True)
        return made

    fitted(tmp_path / "c", 1)
    assert same(fitted(tmp_path / "c", 2), fitted(tmp_path / "d", 2))


CHILD = """
import os, signal, sys
import numpy as np
from fastclstm.layers import *
from fastclstm.models import Sequential
from fastclstm.nn.optimizers import Adam

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the test run ignores Ctrl-C, in the background

def batches(epoch):
    rng = np.random.default_rng(epoch)
    for step in range(4):
        if "kill" in sys.argv and (epoch, step) == (1, 2):
            os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        x = rng.standard_normal((2, 3, 4, 4, 1)).astype(np.float32)
        yield x, x

lstm = ConvLSTM2D(1, 2, 3, seed=0, dropout=0.3, recurrent_dropout=0.2, time_dropout=0.2, engine="reference")
conv = TimeDistributed(Conv2D(2, 1, 3, seed=1, engine="reference"))
model = Sequential([lstm, TimeDistributed(Dropout(0.3, seed=5)), BatchNormalization(2), conv])
model.fit(batches, optimizer=Adam(0.01), epochs=3, checkpoint=sys.argv[1], checkpoint_every=int(sys.argv[2]),
          resume=True, metrics="mae")
model.save(sys.argv[1] + ".model")
"""


def run_child(path, every, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", CHILD, str(path), str(every), *arguments], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


@pytest.mark.parametrize(("every", "end"), [(1, "SIGKILL"), (3, "SIGKILL"), (1, "SIGINT")])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, every, end):
    path, whole = tmp_path / "killed", tmp_path / "whole"
    assert run_child(whole, every).returncode == 0
    killed = run_child(path, every, end, "kill")
    assert killed.returncode == -getattr(signal, end)
    if end == "SIGINT":
        assert "KeyboardInterrupt" in killed.stderr
    progress = weights.load(path)[1]["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2 if every == 1 else 0)
    again = run_child(path, every, end)
    assert again.returncode == 0, again.stderr
    assert Path(f"{path}.model").read_bytes() == Path(f"{whole}.model").read_bytes()
    curves = [weights.load(p)[1]["progress"]["history"] for p in (path, whole)]
    assert [{**c, "seconds": 0} for c in curves] == [{**c, "seconds": 0} for c in curves[::-1]]
    assert sorted(os.listdir(tmp_path)) == ["killed", "killed.model", "whole", "whole.model"]


def test_an_iterator_is_read_up_to_where_the_training_was(tmp_path):
    batches = [(X[n : n + 1], Y[n : n + 1]) for n in range(10)]
    path, options = tmp_path / "c", {"steps_per_epoch": 4, "checkpoint_every": 1, "resume": True}

    def interrupted():
        yield from batches[:6]
        raise Interrupted

    with pytest.raises(Interrupted):
        fit(dense(), interrupted(), None, epochs=2, checkpoint=path, **options)
    fit(again := dense(), iter(batches), None, epochs=2, checkpoint=path, **options)
    fit(whole := dense(), iter(batches), None, epochs=2, steps_per_epoch=4)
    assert same(again, whole)


def test_the_best_epoch_survives_a_resume(tmp_path):
    def fitted(path, epochs):
        model = dense()
        fit(model, X, Y, epochs=epochs, optimizer=SGD(ExponentialDecay(0.5, 1, 1.7)), early_stopping=EarlyStopping(20),
            validation_split=0.3, checkpoint=path, resume=True)  # fmt: skip
        return model

    fitted(tmp_path / "c", 3)
    again, whole = fitted(tmp_path / "c", 5), fitted(tmp_path / "d", 5)
    assert same(again, whole)
    arrays, metadata = weights.load(tmp_path / "c")
    assert all((arrays[f"best/{n}"] == a).all() for n, a in again.parameters.items())
    losses_seen = metadata["progress"]["history"]["val_loss"]
    assert metadata["progress"]["best"] == min(losses_seen) != losses_seen[-1]


def test_a_learning_rate_that_was_assigned_to_is_kept(tmp_path):
    def fitted(path, epochs):
        optimizer = SGD(0.1)
        fit(made := dense(), optimizer=optimizer, epochs=epochs, checkpoint=path, resume=True,
            callbacks=lambda history: setattr(optimizer, "learning_rate", optimizer.learning_rate / 2))  # fmt: skip
        return made

    fitted(tmp_path / "c", 2)
    assert same(fitted(tmp_path / "c", 3), fitted(tmp_path / "d", 3))


def other_model():
    return Sequential([*lossy()[:2], TimeDistributed(Conv2D(2, 1, 3, seed=1, use_bias=False, engine="reference"))])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": other_model()}, r"model\.layers\[2\]\.layer\.use_bias was True and is False"),
        ({"model": lossy(seed=4)}, r"model\.layers\[0\]\.seed was 0 and is 4"),
        ({"optimizer": Adam(0.02, amsgrad=True)}, r"optimizer\.learning_rate was 0\.01 and is 0\.02"),
        ({"optimizer": "sgd"}, r"optimizer\.class was 'Adam' and is 'SGD'"),
        ({"loss": "mae"}, r"loss\.class was"),
        ({"batch_size": 3}, r"data\.batch_size was 2 and is 3"),
        ({"validation_split": 0.5}, r"data\.x\.shape\[0\] was 4 and is 3"),
        ({"x": -FILMS}, r"data\.x\.checksum was"),
        ({"seed": 1}, r"seed was 0 and is 1"),
        ({"early_stopping": None}, r"early_stopping was .* and is None"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, options, words):
    path = tmp_path / "c.safetensors"
    train(path, epochs=1)
    before, model = path.read_bytes(), options.pop("model", lossy())
    untouched = copy.deepcopy(model)
    with pytest.raises(ValueError, match=rf"c\.safetensors is of another training: {words}"):
        train(path, model, **options)
    assert path.read_bytes() == before
    assert same(model, untouched)


def test_a_schedule_for_other_epochs_is_told_as_such(tmp_path):
    def run(epochs):
        return train(tmp_path / "c", epochs=epochs, optimizer=Adam(CosineDecay(0.1, decay_steps=2 * epochs)))

    run(2)
    words = r"learning_rate\.decay_steps was 4 and is 6; its schedule was made for other epochs: give that the steps"
    with pytest.raises(ValueError, match=words):
        run(3)


def test_files_that_are_no_checkpoints(tmp_path):
    path, model = tmp_path / "c.safetensors", lossy()
    model.save(path)
    with pytest.raises(ValueError, match="is no checkpoint of a training but holds a Sequential"):
        train(path)
    path.write_text("text")
    with pytest.raises(ValueError, match="damaged"):
        train(path)
    for spoil in (
        lambda arrays, metadata: arrays.pop("optimizer/steps"),
        lambda arrays, metadata: arrays.pop("model/0.layers.0.bias"),
        lambda arrays, metadata: metadata.pop("generators"),
    ):
        train(path, epochs=1, resume=False)
        arrays, metadata = weights.load(path)
        spoil(arrays, metadata)
        weights.save(path, arrays, metadata)
        model, optimizer = lossy(), Adam(0.01, amsgrad=True)
        with pytest.raises(ValueError, match="is damaged, or the optimizer's options are no longer"):
            train(path, model, optimizer=optimizer)
        assert same(model, lossy())
        assert optimizer.steps == 0
        assert optimizer.state == {}
    with pytest.raises(OSError, match="cannot write here"):
        train(tmp_path / "no" / "c")


def test_what_callbacks_change_is_kept(tmp_path):
    """A learning rate that became a schedule, and a layer that thawed."""

    def run(path, epochs):
        model = dense()
        model[0].trainable = False
        optimizer = SGD(0.1)

        def change(history):
            if history.epochs == 1:
                optimizer.learning_rate, model[0].trainable = ExponentialDecay(0.4, 3, 0.5), True

        history = fit(model, epochs=epochs, optimizer=optimizer, callbacks=change, checkpoint=path, resume=True)
        return model, history

    whole, history = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    again, resumed = run(tmp_path / "b", 4)
    assert same(whole, again)
    assert history["learning_rate"] == resumed["learning_rate"]
    assert not same(whole, run(tmp_path / "c", 1)[0])


def test_a_stop_by_a_callback_can_be_resumed(tmp_path):
    path = tmp_path / "c"
    assert fit(dense(), epochs=5, checkpoint=path, callbacks=lambda history: np.bool_(history.epochs == 2)).epochs == 2
    model, whole = dense(), dense()
    assert fit(model, epochs=5, checkpoint=path, resume=True).epochs == 5
    fit(whole, epochs=5)
    assert same(model, whole)
