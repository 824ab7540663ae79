"""Image and video data sets by name, as NumPy arrays, with a validation set held out.

`digits` comes with scikit-learn. The others are read by TensorFlow Datasets (TFDS) from
the folder that the environment variable TFDS_DATA_DIR names, `~/tensorflow_datasets` if
it names none. Reading needs no TensorFlow; preparing a data set that isn't there needs
TensorFlow and a network, once.
"""

import importlib
import importlib.util
import io
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments.tasks import motion, video
from experiments.tasks.dataset import DataError, Dataset, Split

DATASETS = (
    "digits",
    "mnist",
    "fashion_mnist",
    "kmnist",
    "cifar10",
    "cifar100",
    "cifar10_jpeg",
)
# Of clips, with an axis of frames before the height; see `experiments.tasks.video`.
VIDEOS = ("motion", "ucf101")
# Not of TFDS' catalogue: CIFAR-10 stored as JPEG, where somebody has prepared it so.
# That loses a little of the images: its errors are not those of CIFAR-10.
_NOT_IN_CATALOGUE = ("cifar10_jpeg",)

# TFDS asks for importlib_resources when it prepares, without depending on it.
_NEEDED_TO_PREPARE = ("tensorflow", "importlib_resources")
_PATIENCE = 10.0  # seconds

Found = TypeVar("Found")


def load(name: str, validation: float) -> Dataset:
    """A data set by name.

    The validation set is the same in every run, whatever the run's seed; that of a
    smaller fraction is part of that of a larger one.

    Args:
        name: one of `DATASETS` or `VIDEOS`, or `module:function`, a function from the
            fraction to a data set.
        validation: fraction of the training examples that is held out, in (0, 1); of
            `ucf101`, of the groups of training videos.

    Raises:
        ValueError: if there is no such data set, or if the fraction is outside (0, 1)
            or leaves either side without an example.
        DataError: if the data set is not there and can't be prepared here, or if its
            folder can't be read.
    """
    if ":" in name:
        return named(name)(validation)
    if name not in DATASETS + VIDEOS:
        there_are = ", ".join(DATASETS + VIDEOS)
        raise ValueError(f"no data set {name!r}; there are {there_are}")
    # Asked for before anything is read, for reading may mean downloading.
    if not 0 < validation < 1:
        raise ValueError(
            f"validation is {validation}; a fraction of the training examples is "
            "wanted, above 0 and below 1"
        )
    if name == "ucf101":
        return video.ucf101(_data_dir(), validation)
    own = {"digits": _digits, "motion": _motion}
    train, test, classes, scale = own[name]() if name in own else _prepared(name)
    count = len(train.labels)
    held_out = round(validation * count)
    if not 0 < held_out < count:
        raise ValueError(
            f"validation is {validation}, which holds out {held_out} of the {count} "
            f"training examples of {name}; at least one is wanted on either side"
        )
    # RandomState, for its stream is frozen; that of default_rng may change with NumPy.
    order = np.random.RandomState(0).permutation(count)
    chosen = np.zeros(count, bool)
    chosen[order[:held_out]] = True
    return Dataset(
        name,
        train=Split(train.images[~chosen], train.labels[~chosen]),
        validation=Split(train.images[chosen], train.labels[chosen]),
        test=test,
        classes=classes,
        scale=scale,
    )


def named(place: str) -> Any:
    """What a user names as `module:function`.

    Raises:
        ValueError: if there is no such module, or nothing of that name in it.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{place!r} is to be a function of a module that can be imported here: "
            f"{error}"
        ) from error


def _digits() -> tuple[Split, Split, int, float]:
    """Train, test, classes and scale of scikit-learn's 1,797 digits of 8x8 pixels.

    There is no official split: the last 360 images are the test set.
    """
    from sklearn.datasets import load_digits  # takes a second

    digits: Any = load_digits()
    images = digits["images"].astype(np.uint8)[..., None]
    labels = digits["target"].astype(np.int32)
    train, test = slice(None, -360), slice(-360, None)
    return (
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        10,
        16.0,
    )


def _motion(train: int = 4000, test: int = 2000) -> tuple[Split, Split, int, float]:
    """Train, test, classes and scale of so many clips of moving digits of MNIST.

    Raises:
        DataError: if MNIST can't be prepared or read.
    """

    digits, others, _, scale = _prepared("mnist")
    return (
        motion.motion(digits.images, train, seed=0),
        motion.motion(others.images, test, seed=1),
        len(motion.DIRECTIONS),
        scale,
    )


def _data_dir() -> Path:
    """The folder of TFDS."""
    data_dir = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    return data_dir.expanduser().absolute()


def _prepared(name: str) -> tuple[Split, Split, int, float]:
    """Train, test, classes and scale of images of TFDS, prepared if need be.

    Raises:
        DataError: if they can't be prepared or read.
    """

    def read(builder: Any) -> tuple[Split, Split, int, float]:
        train, test = (_read(builder, split) for split in ("train", "test"))
        return train, test, builder.info.features["label"].num_classes, 255.0

    return stored(name, read)


def stored(name: str, read: Callable[[Any], Found]) -> Found:
    """What is read with a TFDS builder, of a data set that is prepared if need be.

    Args:
        name: of the data set.
        read: of a builder; whatever it raises is said to be the folder's fault.

    Raises:
        DataError: if it can't be prepared or read.
    """
    import tensorflow_datasets as tfds

    data_dir = _data_dir()
    if name in _NOT_IN_CATALOGUE:
        versions = sorted((data_dir / name).glob("*.*.*"))
        if not versions:
            raise DataError(
                f"{name} is not in {data_dir}, and not in the catalogue of TFDS to be "
                "made from: point TFDS_DATA_DIR at a folder that holds it"
            )
        folder = versions[-1]
    else:
        folder = data_dir / name / str(tfds.builder_cls(name).VERSION)
        if not folder.is_dir():
            _prepare(name, data_dir, folder)
    try:
        return read(tfds.builder_from_directory(folder))
    except (ImportError, MemoryError, PermissionError):
        raise  # nothing that deleting the folder would mend
    # JSON, protobuf, array_record, PNG and TFDS: each raises types of its own.
    except Exception as error:
        raise DataError(
            f"{folder} can't be read ({_one_line(error)}): delete it and prepare "
            "again, or point TFDS_DATA_DIR at another folder"
        ) from error


def _read(builder: Any, split: str) -> Split:
    """One split of a TFDS builder, in stored order."""
    import tensorflow_datasets as tfds
    from PIL import Image

    # Pillow alone is faster than the decoder of TFDS. Threads make it no faster still:
    # most of what is left is Python.
    source = builder.as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    # One call for all: TFDS is several times slower if asked one by one.
    examples = source.__getitems__(range(len(source)))
    height, width, channels = builder.info.features["image"].shape
    images = np.empty((len(examples), height, width, channels), np.uint8)
    for image, example in zip(images, examples, strict=True):
        stored = Image.open(io.BytesIO(example["image"]), formats=("PNG", "JPEG"))
        image[...] = np.frombuffer(stored.tobytes(), np.uint8).reshape(image.shape)
    labels = np.array([example["label"] for example in examples], np.int32)
    return Split(images, labels)


def _prepare(name: str, data_dir: Path, folder: Path) -> None:
    """Downloads a data set and writes it to `folder`, which lies in `data_dir`.

    Raises:
        DataError: if TensorFlow or the network is missing, or preparing fails.
    """
    import tensorflow_datasets as tfds

    missing = [
        module
        for module in _NEEDED_TO_PREPARE
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        obstacle = f"not installed: {', '.join(missing)}"
    else:
        # Asked first, for TFDS itself would try again for more than three minutes.
        urls: Any = tfds.builder_cls(name).url_infos
        obstacle = _unreachable(next(iter(urls)))
    if not obstacle:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        try:
            builder.download_and_prepare()
        # Downloading, checking, TensorFlow and the disk: types of their own, again.
        except Exception as error:
            obstacle = _one_line(error)
        else:
            return
    raise DataError(
        f"{name} is not prepared (no folder {folder}) and can't be prepared here "
        f"({obstacle}): point TFDS_DATA_DIR at a folder that holds {name} prepared, "
        "or load it once where there is a network, after "
        "`pip install 'l0jax[prepare]'`, which brings TensorFlow"
    )


def _unreachable(url: str, patience: float = _PATIENCE) -> str:
    """Why `url` gives no answer within `patience` seconds; empty if it gives one."""
    # What TFDS downloads with, so that proxies and certificates are the same.
    import requests

    answers = queue.SimpleQueue()

    def ask() -> None:
        try:
            with requests.get(url, stream=True, timeout=patience) as response:
                response.raise_for_status()
            answers.put("")
        except requests.RequestException as error:
            answers.put(f"{url} can't be reached: {_one_line(error)}")

    # The timeout of requests covers neither the look-up of the name nor all addresses
    # of one name together; nor may a look-up that hangs keep the process from ending.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=patience)
    except queue.Empty:
        return f"{url} can't be reached: no answer in {patience:g} s"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
