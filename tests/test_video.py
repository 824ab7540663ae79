import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import RidgeClassifier
from tensorflow_datasets.core.shuffle import Shuffler

from experiments.tasks import data, motion, video

STEPS = np.array(list(motion.DIRECTIONS.values()))
CLASSES = len(STEPS)


def digits() -> np.ndarray:
    """Scikit-learn's 1,797 digits, in the range of bytes."""
    images = load_digits()["images"]
    return np.round(images * (255 / 16)).astype(np.uint8)[..., None]


def dots(count: int) -> np.ndarray:
    return np.full((count, 1, 1, 1), 255, np.uint8)


def displacements(clips: np.ndarray) -> np.ndarray:
    """Rows and columns by which each frame is moved to give the next: the place of the
    maximum of their circular cross-correlation, `(n, frames - 1, 2)`."""
    seen = np.fft.rfft2(clips[..., 0], axes=(2, 3))
    height, width = clips.shape[2:4]
    product = seen[:, :-1].conj() * seen[:, 1:]
    correlation = np.fft.irfft2(product, s=(height, width), axes=(2, 3))
    place = correlation.reshape(*correlation.shape[:2], -1).argmax(-1)
    moved = np.stack(np.unravel_index(place, (height, width)), -1)
    return (moved + np.array([height, width]) // 2) % [height, width] - [
        height // 2,
        width // 2,
    ]


def directions(clips: np.ndarray) -> np.ndarray:
    """The class that the motion of most frames says."""
    median = np.median(displacements(clips), 1)
    return (np.sign(median)[:, None] == STEPS).all(-1).argmax(-1)


def places(clips: np.ndarray) -> np.ndarray:
    """Row and column of a dot in each frame."""
    flat = clips.reshape(*clips.shape[:2], -1).argmax(-1)
    return np.stack(np.unravel_index(flat, clips.shape[2:4]), -1)


@pytest.fixture(scope="module")
def split() -> tuple[data.Split, data.Split]:
    """Training and test clips, small ones, of different digits."""
    images = digits()
    train = motion.motion(images[:1000], 1000, 0, size=16)
    return train, motion.motion(images[1000:], 797, 1, size=16)


def accuracy(classifier, train, test) -> float:
    """Of a classifier of single images, given `(images, labels)` twice."""
    (x, y), (x_test, y_test) = train, test
    classifier.fit(x.reshape(len(x), -1), y)
    return classifier.score(x_test.reshape(len(x_test), -1), y_test)


@pytest.mark.sweep
@pytest.mark.parametrize("frame", [0, 7, 15, "drawn"])
def test_single_frames_tell_nothing_about_the_class(frame, split):
    rng = np.random.default_rng(0)

    def seen(part):
        at = rng.integers(0, 16, len(part.labels)) if frame == "drawn" else frame
        return part.images[np.arange(len(part.labels)), at] / 255, part.labels

    train, test = seen(split[0]), seen(split[1])
    count = len(test[1])
    # A guess is right with probability 1/8: five standard deviations above that.
    chance = 1 / CLASSES
    bound = chance + 5 * np.sqrt(chance * (1 - chance) / count)
    trees = ExtraTreesClassifier(100, random_state=0)
    for classifier in (RidgeClassifier(100.0), trees):
        assert accuracy(classifier, train, test) < bound


def test_motion_tells_the_class(split):
    for part in split:
        assert (directions(part.images) == part.labels).mean() > 0.99


def test_backwards_is_the_opposite_direction(split):
    opposite = (split[1].labels + CLASSES // 2) % CLASSES
    np.testing.assert_array_equal(STEPS[opposite], -STEPS[split[1].labels])
    assert (directions(split[1].images[:, ::-1]) == opposite).mean() > 0.99


def test_place_is_uniform_in_every_frame_whatever_the_class():
    size, count = 16, 20_000
    clips = motion.motion(dots(count), count, 0, frames=5, size=size)
    for label in range(CLASSES):
        of = places(clips.images[clips.labels == label])
        for axis in (0, 1):
            for frame in range(5):
                found = np.bincount(of[:, frame, axis], minlength=size)
                expected = len(of) / size
                chi2 = ((found - expected) ** 2).sum() / expected
                # Its mean is size - 1 and its variance twice that.
                assert chi2 < size - 1 + 5 * np.sqrt(2 * (size - 1))


def test_speed_is_drawn_whatever_the_class():
    count = 4000
    clips = motion.motion(dots(count), count, 0, frames=3)
    moved = displacements(clips.images)
    np.testing.assert_array_equal(moved[:, 0], moved[:, 1])
    np.testing.assert_array_equal(np.sign(moved[:, 0]), STEPS[clips.labels])
    speed = abs(moved[:, 0]).max(-1)
    for label in range(CLASSES):
        of = speed[clips.labels == label]
        for value in motion.SPEEDS:
            share = 1 / len(motion.SPEEDS)
            sigma = np.sqrt(share * (1 - share) / len(of))
            assert abs((of == value).mean() - share) < 5 * sigma


def test_motion_is_a_shift_of_the_digit():
    images = digits()[:50]
    clips = motion.motion(images, 50, 3, frames=6, size=12)
    # The pixels are the same ones in every frame, and those of one digit.
    pixels = np.sort(clips.images.reshape(50, 6, -1))
    np.testing.assert_array_equal(pixels, np.repeat(pixels[:, :1], 6, 1))
    blank = np.zeros((50, 12 * 12 - 64), np.uint8)
    stored = np.sort(np.concatenate([images.reshape(50, -1), blank], 1))
    found = sorted(map(bytes, pixels[:, 0]))
    assert found == sorted(map(bytes, stored))  # each digit once


def test_no_two_clips_show_the_same_digit():
    images = digits()
    count = len(images)
    # As large as a frame, of which all clips have one: each digit is seen once.
    shown = motion.motion(images, count, 0, frames=1, size=8).images
    found, stored = (np.sort(a.reshape(count, -1)) for a in (shown, images))
    assert sorted(map(bytes, found)) == sorted(map(bytes, stored))


def test_motion_is_drawn_from_the_seed():
    images = digits()
    first, again, other = (motion.motion(images, 80, seed) for seed in (0, 0, 1))
    assert first.images.shape == (80, 16, 32, 32, 1)
    assert (first.images.dtype, first.labels.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.images != other.images).any()
    assert np.bincount(first.labels).tolist() == [10] * CLASSES


def test_motion_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch):
    images = np.tile(digits(), (4, 1, 1, 1))
    part = data.Split(images, np.zeros(len(images), np.int32))
    asked = []
    monkeypatch.setattr(
        data, "_prepared", lambda name: asked.append(name) or (part, part, 10, 255.0)
    )
    dataset = data.load("motion", 0.1)
    assert asked == ["mnist"]
    assert (dataset.name, dataset.classes, dataset.scale) == ("motion", 8, 255.0)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [len(part.labels) for part in parts] == [3600, 400, 2000]
    for part in parts:
        assert part.images.shape == (len(part.labels), 16, 32, 32, 1)


def test_too_few_digits():
    with pytest.raises(ValueError, match=r"40 clips .* 30 digits"):
        motion.motion(digits()[:30], 40, 0)


def test_digits_larger_than_frames():
    with pytest.raises(ValueError, match="8x8 pixels don't fit frames of 7x7: 8"):
        motion.motion(digits()[:30], 30, 0, size=7)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("available", [13, 16, 20])
def test_centre_clip(available: int, stride: int):
    found = video.clip_frames("v", available, 5, stride, rng=None, loop=False)
    assert (np.diff(found) == stride).all()
    before, after = found[0], available - 1 - found[-1]
    assert after - before in (0, 1)


def test_start_is_drawn_uniformly():
    rng, count, starts = np.random.RandomState(0), 6000, 20 - 4 * 3
    found = np.array(
        [video.clip_frames("v", 20, 5, 3, rng=rng, loop=False) for _ in range(count)]
    )
    assert (np.diff(found) == 3).all()
    shares = np.bincount(found[:, 0], minlength=starts) / count
    sigma = np.sqrt(1 / starts * (1 - 1 / starts) / count)
    assert shares.shape == (starts,)
    assert (abs(shares - 1 / starts) < 5 * sigma).all()


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_short_video_is_looped(seed: int | None):
    rng = None if seed is None else np.random.RandomState(seed)
    found = video.clip_frames("v", 4, 7, 3, rng=rng, loop=True)
    assert seed is not None or found[0] == 0
    np.testing.assert_array_equal(found, (found[0] + 3 * np.arange(7)) % 4)


def test_clip_shorter_than_asked():
    with pytest.raises(ValueError, match="video v_Archery_g08_c01") as info:
        video.clip_frames("v_Archery_g08_c01", 29, 16, 2, rng=None, loop=False)
    for words in ("has 29 frames", "16 frames at stride 2", "which span 31"):
        assert words in str(info.value)
    assert "15 frames or fewer, a stride of 1 or less, or loop=True" in str(info.value)


@pytest.mark.parametrize(
    ("available", "frames", "stride"), [(29, 16, 2), (40, 16, 4), (3, 5, 1), (1, 2, 9)]
)
def test_what_would_do_does(available: int, frames: int, stride: int):
    with pytest.raises(ValueError, match=r": use ") as info:
        video.clip_frames("v", available, frames, stride, rng=None, loop=False)
    use = str(info.value).split(": use ")[1]
    fewer = int(use.split(" frames")[0])

    def fits(frames, stride):
        try:
            video.clip_frames("v", available, frames, stride, rng=None, loop=False)
        except ValueError:
            return False
        return True

    assert fits(fewer, stride)
    assert not fits(fewer + 1, stride)
    if "stride of" in use:
        smaller = int(use.split("stride of ")[1].split()[0])
        assert fits(frames, smaller)
        assert not fits(frames, smaller + 1)
    else:
        assert not fits(frames, 1)
    video.clip_frames("v", available, frames, stride, rng=None, loop=True)


@pytest.mark.parametrize("loop", [False, True])
def test_video_without_frames(loop: bool):
    with pytest.raises(ValueError, match=r"video v has 0 frames.*leave it out"):
        video.clip_frames("v", 0, 2, 1, rng=None, loop=loop)


@pytest.mark.parametrize(("frames", "stride"), [(0, 1), (1, 0)])
def test_no_clip(frames: int, stride: int):
    with pytest.raises(ValueError, match="at least 1"):
        video.clip_frames("v", 9, frames, stride, rng=None, loop=False)


ACTIONS = ("Archery", "HandstandPushups", "YoYo")  # their labels are 0, 1, 2
SMALL = {"frames": 4, "stride": 2, "size": 8, "show": False}
HEIGHT, WIDTH = 48, 64


class Stored(NamedTuple):
    """A video: its number, from which it has its colour, and of how many frames."""

    number: int
    action: str
    group: str
    frames: int


def encoded(number: int, frame: int) -> io.BytesIO:
    """A frame whose red is the video's number and whose green is its own, between white
    stripes outside the square at the centre."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[:, 8:-8] = (5 * number, 10 * frame, 0)
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=100, subsampling=0)
    jpeg.seek(0)
    return jpeg


def write(data_dir: Path, shortest: int = 16) -> dict[int, Stored]:
    """UCF101 as TFDS prepares it, cut down; what is in it, by number."""
    folder = data_dir / "ucf101" / "ucf101_1" / "2.0.0"
    folder.mkdir(parents=True)
    lists = data_dir / "downloads" / "extracted" / "ZIP.some_hash" / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    # As Video stores frames, without TensorFlow.
    features = tfds.features.FeaturesDict(
        {
            "video": tfds.features.Sequence(
                tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            ),
            "label": tfds.features.ClassLabel(num_classes=101),
        }
    )
    stored = {}
    for split, groups in {"train": range(8, 14), "test": range(1, 4)}.items():
        shuffler = Shuffler(data_dir, split, disable_shuffling=False)
        lines = []
        for label, action in enumerate(ACTIONS):
            for group in groups:
                for clip in (1, 2) if split == "train" else (1,):
                    number = len(stored)
                    frames = shortest + number % 5
                    key = f"v_{action}_g{group:02d}_c{clip:02d}.avi"
                    # The lists spell one action otherwise than its files.
                    listed = key.replace("Handstand", "HandStand")
                    ending = f" {label + 1}" if split == "train" else ""
                    lines.append(f"{action}/{listed}{ending}\n")
                    jpegs = [encoded(number, frame) for frame in range(frames)]
                    example = {"video": jpegs, "label": label}
                    shuffler.add(key, features.serialize_example(example))
                    stored[number] = Stored(number, action, f"g{group:02d}", frames)
        (lists / f"{split}list01.txt").write_text("".join(lines))
        write_records(folder, split, [record for _, record in shuffler])
    return stored


def write_records(folder: Path, split: str, records: list[bytes]):
    """In two files, as a large split is."""
    for i, part in enumerate((records[:5], records[5:])):
        file = folder / f"ucf101-{split}.array_record-0000{i}-of-00002"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for record in part:
            writer.write(record)
        writer.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    data_dir = tmp_path_factory.mktemp("tfds")
    return data_dir, write(data_dir)


def of_frames(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the video that each clip shows, and of its frames."""
    # Without the columns at the edge, where scaling blends in a little of the stripes.
    edge = clips.shape[3] // 8
    clips = clips[:, :, :, edge:-edge].astype(float)
    red, green = clips[..., 0] / 5, clips[..., 1] / 10
    # One colour: the rest of the stripes is cropped.
    for found in (red, green):
        assert np.ptp(np.round(found), (2, 3)).max() == 0
    numbers = np.round(red[:, :, 0, 0]).astype(int)
    assert np.ptp(numbers, 1).max() == 0
    return numbers[:, 0], np.round(green[:, :, 0, 0]).astype(int)


def check_clips(part: data.Split, stored: dict, stride: int, centre: bool) -> set[int]:
    """Clips are of the videos that their labels say; the videos' numbers."""
    numbers, frames = of_frames(part.images)
    assert (np.diff(frames) == stride).all()
    for number, label, shown in zip(numbers, part.labels, frames, strict=True):
        of = stored[number]
        assert of.action == ACTIONS[label]
        if centre:
            assert of.frames - 1 - shown[-1] - shown[0] in (0, 1)
    assert len(set(numbers)) == len(numbers)
    return {int(number) for number in numbers}


def groups(numbers: set[int], stored: dict) -> set[str]:
    return {stored[number].group for number in numbers}


def test_ucf101_by_name(prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data_dir, stored = prepared
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dataset = data.load("ucf101", 0.3)
    assert (dataset.name, dataset.classes, dataset.scale) == ("ucf101", 101, 255.0)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [len(part.labels) for part in parts] == [24, 12, 9]
    for part in parts:
        assert isinstance(part.images, np.memmap)
        assert part.images.shape == (len(part.labels), 16, 112, 112, 3)
        assert (part.images.dtype, part.labels.dtype) == (np.uint8, np.int32)
    train = check_clips(dataset.train, stored, 1, centre=False)
    validation = check_clips(dataset.validation, stored, 1, centre=True)
    test = check_clips(dataset.test, stored, 1, centre=True)
    assert train | validation | test == set(stored)
    assert not groups(train, stored) & groups(validation, stored)
    assert len(groups(validation, stored)) == 2


def test_smaller_validation_set_is_part_of_the_larger(prepared, tmp_path: Path):
    data_dir, stored = prepared
    sets = []
    for fraction in (0.1, 0.5, 0.9):
        dataset = video.ucf101(data_dir, fraction, cache=tmp_path, **SMALL)
        held_out = check_clips(dataset.validation, stored, 2, centre=True)
        kept = check_clips(dataset.train, stored, 2, centre=False)
        assert not groups(held_out, stored) & groups(kept, stored)
        sets.append(held_out)
    assert [len(numbers) for numbers in sets] == [6, 18, 30]
    assert sets[0] < sets[1] < sets[2]


@pytest.mark.parametrize("fraction", [0.01, 0.99, 1.5])
def test_fraction_that_leaves_no_group(fraction: float, prepared, tmp_path: Path):
    with pytest.raises(ValueError, match="of the 6 groups"):
        video.ucf101(prepared[0], fraction, cache=tmp_path, **SMALL)
    assert not any(tmp_path.iterdir())


def test_starts_are_drawn_from_the_seed(prepared, tmp_path: Path):
    first, again, other = (
        video.ucf101(prepared[0], 0.5, seed=seed, cache=tmp_path / folder, **SMALL)
        for seed, folder in ((0, "a"), (0, "b"), (1, "a"))
    )
    np.testing.assert_array_equal(first.train.images, again.train.images)
    starts, others = (of_frames(d.train.images)[1][:, 0] for d in (first, other))
    assert (starts != others).mean() > 0.5
    assert len(set(starts)) > 3
    np.testing.assert_array_equal(first.validation.images, other.validation.images)


def test_interrupted_call_goes_on(
    prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(folder):
        return video.ucf101(prepared[0], 0.5, cache=tmp_path / folder, **SMALL)

    whole = load("whole")
    square, calls = video._square, []

    def interrupted(encoded, size):
        calls.append(1)
        if len(calls) == 8 * 13 + 1:  # frames of a video's two clips, and videos
            raise KeyboardInterrupt
        return square(encoded, size)

    monkeypatch.setattr(video, "_KEPT_EVERY", 5)
    monkeypatch.setattr(video, "_square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("part")
    calls.clear()
    monkeypatch.setattr(video, "_square", lambda *a: calls.append(1) or square(*a))
    resumed = load("part")
    assert len(calls) == 8 * (36 - 10) + 4 * 9
    for part in ("train", "validation", "test"):
        for found, expected in zip(
            getattr(resumed, part), getattr(whole, part), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    calls.clear()
    load("part")
    assert not calls


def test_short_video_of_ucf101(tmp_path: Path):
    write(tmp_path, shortest=6)
    arguments = SMALL | {"cache": tmp_path / "cache"}
    with pytest.raises(ValueError, match=r"video (\w+)/v_\1_g\d\d_c\d\d.avi has 6 fr"):
        video.ucf101(tmp_path, 0.5, **arguments)
    looped = video.ucf101(tmp_path, 0.5, **arguments, loop=True)
    assert len(looped.train.labels) == 18


def test_ucf101_is_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(data.DataError) as info:
        data.load("ucf101", 0.1)
    for words in ("ucf101_1/2.0.0", "TFDS_DATA_DIR", "file_format='array_record'"):
        assert words in str(info.value)
    assert "\n" not in str(info.value)


def test_lists_are_missing(tmp_path: Path):
    (tmp_path / "ucf101" / "ucf101_1" / "2.0.0").mkdir(parents=True)
    with pytest.raises(data.DataError, match=r"trainlist01\.txt is neither .* unpack"):
        video.ucf101(tmp_path, 0.1, cache=tmp_path)


def remove_records(folder: Path):
    for file in folder.glob("*-train.*"):
        file.unlink()


def read_records(folder: Path) -> list[bytes]:
    paths = sorted(folder.glob("*-train.*"))
    from array_record.python import array_record_data_source

    source = array_record_data_source.ArrayRecordDataSource(paths)
    return [source[i] for i in range(len(source))]


DAMAGE = {
    "no records": (remove_records, "no file of ucf101-train as array_record"),
    "other order": (
        lambda folder: write_records(folder, "train", read_records(folder)[::-1]),
        "not in the order",
    ),
    "too few": (
        lambda folder: write_records(folder, "train", read_records(folder)[:-1]),
        "35 videos of train, and the official list 36",
    ),
    "empty": (
        lambda folder: write_records(folder, "train", [b"no example"] * 36),
        "can't be read",
    ),
}


@pytest.mark.sweep
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_ucf101(damage: str, tmp_path: Path):
    write(tmp_path)
    do, words = DAMAGE[damage]
    do(tmp_path / "ucf101" / "ucf101_1" / "2.0.0")
    with pytest.raises(data.DataError, match=words) as info:
        video.ucf101(tmp_path, 0.5, cache=tmp_path, **SMALL)
    assert "\n" not in str(info.value)
