import http.server
import importlib.resources
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from sklearn.datasets import load_digits

from experiments.tasks import data

TFDS = ("mnist", "fashion_mnist", "kmnist")
SIZES = {"train": 40, "test": 7}
SHAPE = (5, 3, 1)  # not square, so that swapped axes are seen
VERSION = "3.0.1"

# What TFDS itself writes, cut down to what it reads.
FEATURES = {
    "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
    "featuresDict": {
        "features": {
            "image": {
                "pythonClassName": (
                    "tensorflow_datasets.core.features.image_feature.Image"
                ),
                "image": {
                    "dtype": "uint8",
                    "shape": {"dimensions": [str(n) for n in SHAPE]},
                },
            },
            "label": {
                "pythonClassName": (
                    "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
                ),
                "classLabel": {"numClasses": "10"},
            },
        }
    },
}


def record_file(folder: Path, split: str) -> Path:
    return folder / f"{folder.parent.name}-{split}.array_record-00000-of-00001"


def write(folder: Path) -> dict[str, data.Split]:
    """A prepared data set, handmade and random; returns what is in it."""
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(FEATURES))
    info = {
        "name": folder.parent.name,
        "version": VERSION,
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(size)],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, size in SIZES.items()
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=SHAPE),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
    )
    rng = np.random.default_rng(0)
    written = {}
    for split, size in SIZES.items():
        images = rng.integers(0, 256, (size, *SHAPE), np.uint8)
        labels = rng.integers(0, 10, size, np.int32)
        writer = ArrayRecordWriter(str(record_file(folder, split)), "group_size:1")
        for image, label in zip(images, labels, strict=True):
            png = io.BytesIO()
            Image.fromarray(image[..., 0]).save(png, "PNG")
            png.seek(0)
            example = {"image": png, "label": int(label)}
            writer.write(features.serialize_example(example))
        writer.close()
        written[split] = data.Split(images, labels)
    return written


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that TFDS_DATA_DIR points at, and nothing to prepare with."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(data, "_NEEDED_TO_PREPARE", ("a_module_that_is_not_there",))
    return tmp_path


@pytest.fixture
def folder(data_dir: Path) -> Path:
    """Where kmnist belongs; nothing is there."""
    return data_dir / "kmnist" / VERSION


def check_same(found: data.Split, expected: data.Split):
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.labels, expected.labels)


def check_divides(dataset: data.Dataset, stored: data.Split):
    """Train and validation are the stored examples, each once, in stored order."""
    rows = {
        part: [
            (image.tobytes(), int(label)) for image, label in zip(*split, strict=True)
        ]
        for part, split in {
            "train": dataset.train,
            "validation": dataset.validation,
            "stored": stored,
        }.items()
    }
    places = {
        part: [rows["stored"].index(row) for row in rows[part]]
        for part in ("train", "validation")
    }
    assert places["train"] == sorted(places["train"])
    assert places["validation"] == sorted(places["validation"])
    both = places["train"] + places["validation"]
    assert sorted(both) == list(range(len(stored.labels)))


def check_error(error: Exception, *words: str):
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


def test_digits():
    images, labels = load_digits(return_X_y=True)
    dataset = data.load("digits", 0.1)
    assert (dataset.name, dataset.classes, dataset.scale) == ("digits", 10, 16.0)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [len(part.labels) for part in parts] == [1293, 144, 360]
    for part in parts:
        assert part.images.shape == (len(part.labels), 8, 8, 1)
        assert (part.images.dtype, part.labels.dtype) == (np.uint8, np.int32)
    assert dataset.train.images.max() == dataset.scale
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    check_divides(dataset, data.Split(images[:1437], labels[:1437]))
    check_same(dataset.test, data.Split(images[1437:], labels[1437:]))


def test_validation_set_does_not_depend_on_a_seed():
    # Of NumPy's global state, the one seed that could leak in.
    np.random.seed(1)  # noqa: NPY002
    first = data.load("digits", 0.2)
    np.random.seed(2)  # noqa: NPY002
    check_same(data.load("digits", 0.2).validation, first.validation)


def test_validation_set_does_not_depend_on_the_version_of_numpy(folder: Path):
    stored = write(folder)["train"]
    # Printed once, with NumPy 2.4: another set would be another experiment.
    places = [4, 20, 22, 25]
    validation = data.load("kmnist", 0.1).validation
    np.testing.assert_array_equal(validation.images, stored.images[places])


def test_smaller_validation_set_is_part_of_the_larger(folder: Path):
    write(folder)
    sets = [
        {image.tobytes() for image in data.load("kmnist", fraction).validation.images}
        for fraction in (0.1, 0.3, 0.9)
    ]
    assert [len(images) for images in sets] == [4, 12, 36]
    assert sets[0] < sets[1] < sets[2]


@pytest.mark.parametrize("name", TFDS)
def test_reads_what_is_stored(name: str, data_dir: Path):
    written = write(data_dir / name / VERSION)
    dataset = data.load(name, 0.25)
    assert (dataset.name, dataset.classes, dataset.scale) == (name, 10, 255.0)
    for part in (dataset.train, dataset.validation, dataset.test):
        assert (part.images.dtype, part.labels.dtype) == (np.uint8, np.int32)
    assert len(dataset.validation.labels) == 10
    check_divides(dataset, written["train"])
    check_same(dataset.test, written["test"])


@pytest.mark.parametrize("value", [None, ""])
def test_default_folder(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    else:
        monkeypatch.setenv("TFDS_DATA_DIR", value)
    written = write(tmp_path / "tensorflow_datasets" / "mnist" / VERSION)
    check_same(data.load("mnist", 0.5).test, written["test"])


def test_import_is_cheap():
    code = (
        "import sys, experiments.tasks.data as data; print(*sys.modules);"
        "assert not {'sklearn', 'tensorflow_datasets', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_unknown_name():
    with pytest.raises(ValueError, match="no data set") as info:
        data.load("emnist", 0.1)
    check_error(info.value, "'emnist'", *data.DATASETS, *data.VIDEOS)


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, 1.5, float("nan")])
def test_fraction_outside(fraction: float, data_dir: Path):
    # Of a data set that isn't there: the fraction is looked at first.
    with pytest.raises(ValueError, match="above 0 and below 1") as info:
        data.load("mnist", fraction)
    check_error(info.value, f"validation is {fraction}")


@pytest.mark.parametrize(("fraction", "held_out"), [(1e-6, 0), (1 - 1e-6, 1437)])
def test_fraction_that_leaves_nothing(fraction: float, held_out: int):
    with pytest.raises(ValueError, match="at least one") as info:
        data.load("digits", fraction)
    check_error(info.value, str(fraction), f"{held_out} of the 1437", "digits")


@pytest.mark.parametrize("name", TFDS)
def test_not_prepared_and_nothing_to_prepare_with(name: str, data_dir: Path):
    start = time.monotonic()
    with pytest.raises(data.DataError) as info:
        data.load(name, 0.1)
    assert time.monotonic() - start < 5
    check_error(
        info.value,
        f"no folder {data_dir / name / VERSION}",
        "not installed: a_module_that_is_not_there",
        "point TFDS_DATA_DIR",
        "pip install 'l0jax[prepare]'",
    )
    assert not any(data_dir.iterdir())


@pytest.fixture
def can_prepare(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if what preparing needs were installed."""
    monkeypatch.setattr(data, "_NEEDED_TO_PREPARE", ())
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    return data_dir


@pytest.mark.parametrize("name", TFDS)
def test_not_prepared_and_no_network(
    name: str, can_prepare: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []
    monkeypatch.setattr(data, "_unreachable", lambda url: asked.append(url) or "gone")
    with pytest.raises(data.DataError) as info:
        data.load(name, 0.1)
    assert len(asked) == 1
    assert name.replace("_", "-") in asked[0]
    check_error(info.value, str(can_prepare / name / VERSION), "(gone)", "[prepare]")
    assert not any(can_prepare.iterdir())


def test_prepares_as_array_record(can_prepare: Path, monkeypatch: pytest.MonkeyPatch):
    written = {}

    def download_and_prepare(builder):
        assert builder.info.file_format.value == "array_record"
        written.update(write(Path(builder.data_dir)))

    kmnist = tfds.builder_cls("kmnist")
    monkeypatch.setattr(data, "_unreachable", lambda url: "")
    monkeypatch.setattr(kmnist, "download_and_prepare", download_and_prepare)
    check_same(data.load("kmnist", 0.1).test, written["test"])


def test_preparing_fails(can_prepare: Path, monkeypatch: pytest.MonkeyPatch):
    def download_and_prepare(builder):
        raise OSError("the disk\nis full")

    kmnist = tfds.builder_cls("kmnist")
    monkeypatch.setattr(data, "_unreachable", lambda url: "")
    monkeypatch.setattr(kmnist, "download_and_prepare", download_and_prepare)
    with pytest.raises(data.DataError) as info:
        data.load("kmnist", 0.1)
    check_error(info.value, str(can_prepare), "OSError: the disk is full")


def replace_in_info(folder: Path, old: str, new: str):
    path = folder / "dataset_info.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def truncate(path: Path, kept: float):
    os.truncate(path, int(kept * path.stat().st_size))


def flip_bytes(path: Path):
    content = path.read_bytes()
    place = content.index(b"\x89PNG")
    path.write_bytes(content[:place] + bytes(20) + content[place + 20 :])


# Name: what is done to the folder, and a word of what the error has to say about it.
DAMAGE = {
    "records truncated": (
        lambda folder: truncate(record_file(folder, "train"), 0.7),
        "Corrupted Riegeli",
    ),
    # A whole number of blocks: array_record then finds as many records, all empty.
    "records truncated between blocks": (
        lambda folder: os.truncate(record_file(folder, "train"), 2**16),
        "UnidentifiedImageError",
    ),
    "records empty": (
        lambda folder: os.truncate(record_file(folder, "test"), 0),
        "ArrayRecord",
    ),
    "records overwritten": (
        lambda folder: flip_bytes(record_file(folder, "test")),
        "mismatch",
    ),
    "records missing": (
        lambda folder: record_file(folder, "test").unlink(),
        "kmnist-test.array_record-00000-of-00001",
    ),
    "too few records": (
        lambda folder: replace_in_info(folder, '"7"', '"8"'),
        "out of bound",
    ),
    "split missing": (
        lambda folder: replace_in_info(folder, '"test"', '"other"'),
        "Unknown split 'test'",
    ),
    "other format": (
        lambda folder: replace_in_info(folder, '"array_record"', '"tfrecord"'),
        "TFRECORD",
    ),
    "info truncated": (
        lambda folder: truncate(folder / "dataset_info.json", 0.5),
        "JSON",
    ),
    "info empty": (lambda folder: os.truncate(folder / "dataset_info.json", 0), "JSON"),
    "info missing": (
        lambda folder: (folder / "dataset_info.json").unlink(),
        "dataset_info.json",
    ),
    "features truncated": (
        lambda folder: truncate(folder / "features.json", 0.5),
        "JSON",
    ),
    "features missing": (
        lambda folder: (folder / "features.json").unlink(),
        "Cannot restore kmnist",
    ),
    "other shape": (
        lambda folder: (folder / "features.json").write_text(
            json.dumps(FEATURES).replace('"5"', '"6"')
        ),
        "reshape",
    ),
    "all missing": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        "dataset_info.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder(damage: str, folder: Path):
    write(folder)
    do, word = DAMAGE[damage]
    do(folder)
    with pytest.raises(data.DataError) as info:
        data.load("kmnist", 0.1)
    check_error(info.value, f"{folder} can't be read", word, "delete it and prepare")


def test_what_deleting_would_not_mend_is_raised_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    write(folder)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="PIL"):
        data.load("kmnist", 0.1)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers `/<status>`; `/slow` after a second."""

    def do_GET(self):
        if self.path == "/slow":
            time.sleep(1)
        self.send_response(int(self.path[1:]) if self.path[1:].isdigit() else 200)
        self.end_headers()

    def log_message(self, format, *args):
        del format, args


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    """The address of a server on this machine."""
    monkeypatch.setenv("NO_PROXY", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_reachable(server: str):
    assert data._unreachable(f"{server}/200") == ""


@pytest.mark.parametrize(
    ("path", "word"), [("/503", "HTTPError: 503"), ("/slow", "can't be reached")]
)
def test_host_that_fails(path: str, word: str, server: str):
    start = time.monotonic()
    obstacle = data._unreachable(server + path, patience=0.3)
    assert time.monotonic() - start < 0.9
    check_error(RuntimeError(obstacle), server + path, word)


def test_host_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
    obstacle = data._unreachable(url)  # the port is closed by now
    check_error(RuntimeError(obstacle), url, "ConnectionError")


def test_name_that_takes_for_ever_to_look_up(monkeypatch: pytest.MonkeyPatch):
    over = threading.Event()

    def get(*args, **kwargs):
        over.wait(5)
        raise requests.RequestException

    monkeypatch.setattr(requests, "get", get)
    start = time.monotonic()
    obstacle = data._unreachable("http://name.invalid/", patience=0.2)
    assert time.monotonic() - start < 1
    check_error(RuntimeError(obstacle), "http://name.invalid/", "no answer in 0.2 s")
    over.set()


MNIST = Path(os.environ.get("TFDS_DATA_DIR", "")) / "mnist" / VERSION
needs_mnist = pytest.mark.skipif(
    not MNIST.is_dir(),
    reason="no MNIST: TFDS_DATA_DIR does not point at a folder with mnist prepared",
)


@pytest.fixture(scope="module")
def mnist() -> data.Dataset:
    return data.load("mnist", 1 / 12)


@needs_mnist
def test_mnist(mnist: data.Dataset):
    assert mnist.train.images.shape == (55_000, 28, 28, 1)
    assert mnist.validation.images.shape == (5_000, 28, 28, 1)
    assert mnist.test.images.shape == (10_000, 28, 28, 1)
    labels = np.concatenate([mnist.train.labels, mnist.validation.labels])
    # How many there are of each digit is part of what is known about MNIST, and so are
    # the mean and standard deviation that everyone normalises with.
    known = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    np.testing.assert_array_equal(np.bincount(labels), known)
    known = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(mnist.test.labels), known)
    images = np.concatenate([mnist.train.images, mnist.validation.images])
    pixels = np.bincount(images.ravel(), minlength=256) / images.size
    values = np.arange(256) / mnist.scale
    mean = pixels @ values
    np.testing.assert_allclose(mean, 0.1307, atol=5e-5)
    np.testing.assert_allclose(np.sqrt(pixels @ values**2 - mean**2), 0.3081, atol=5e-5)


@needs_mnist
def test_mnist_agrees_with_the_decoder_of_tfds(mnist: data.Dataset):
    source: Any = tfds.data_source("mnist", split="test", data_dir=MNIST.parent.parent)
    for i in range(0, len(source), 97):
        example = source[i]
        np.testing.assert_array_equal(mnist.test.images[i], example["image"])
        assert mnist.test.labels[i] == example["label"]


@needs_mnist
def test_mnist_truncated(data_dir: Path):
    folder = data_dir / "mnist" / VERSION
    shutil.copytree(MNIST, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    truncate(record_file(folder, "train"), 0.5)
    with pytest.raises(data.DataError) as info:
        data.load("mnist", 0.1)
    check_error(info.value, f"{folder} can't be read", "delete it and prepare")


CIFAR = MNIST.parent.parent / "cifar10_jpeg"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.is_dir(), reason="no CIFAR-10 in TFDS_DATA_DIR")
def test_cifar10_jpeg():
    """The mean and the deviation of the colours that everyone normalises with."""
    found = data.load("cifar10_jpeg", 0.1)
    assert found.train.images.shape == (45_000, 32, 32, 3)
    assert found.validation.images.shape == (5_000, 32, 32, 3)
    assert found.test.images.shape == (10_000, 32, 32, 3)
    labels = np.concatenate([found.train.labels, found.validation.labels])
    assert (np.bincount(labels) == 5_000).all()
    assert (np.bincount(found.test.labels) == 1_000).all()
    pixels = found.train.images.reshape(-1, 3)
    mean, deviation = pixels.mean(0) / found.scale, pixels.std(0) / found.scale
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=2e-3)
    np.testing.assert_allclose(deviation, [0.2470, 0.2435, 0.2616], atol=3e-3)


def test_what_is_not_in_the_catalogue_must_be_there(data_dir: Path):
    with pytest.raises(data.DataError) as info:
        data.load("cifar10_jpeg", 0.1)
    check_error(info.value, "cifar10_jpeg is not in", str(data_dir), "TFDS_DATA_DIR")
