"""Video data sets: moving digits, where the motion is the class, and UCF101.

Clips are arrays of bytes, frames first: (clips, frames, height, width, channels).
`data.load` knows both data sets by name.
"""

import io
import os
import re
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Int32, UInt8

from experiments.harness.progress import bar
from experiments.tasks.dataset import DataError, Dataset, Split

UCF101_CLASSES = 101
_LISTS = "ucfTrainTestlist"
_LISTS_URL = (
    "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip"
)
_KEPT_EVERY = 50  # videos

# What a video is made into: which of its frames, once or twice.
_Kind = Literal["drawn", "centre"]
_KINDS: dict[str, tuple[_Kind, ...]] = {
    "train": ("drawn", "centre"),
    "test": ("centre",),
}


def clip_frames(
    video: str,
    available: int,
    frames: int,
    stride: int,
    *,
    rng: np.random.RandomState | None,
    loop: bool,
) -> Int[np.ndarray, " frames"]:
    """The numbers of the frames of a clip: every `stride`-th one.

    Args:
        video: its name.
        available: how many frames the video has.
        frames: how many the clip has.
        stride: frames of the video from one frame of the clip to the next.
        rng: draws the start, uniformly among those that fit; None for the centre clip.
        loop: whether a video that is too short starts again at its end.

    Raises:
        ValueError: if the video is too short and not to be looped, has no frame, or
            if less than one frame or stride is asked for.
    """
    if frames < 1 or stride < 1:
        raise ValueError(
            f"{frames} frames at stride {stride} are asked for; both are at least 1"
        )
    span = (frames - 1) * stride + 1
    spare = available - span
    if spare < 0 and not (loop and available):
        raise ValueError(_too_short(video, available, frames, stride, span))
    if rng is not None:
        start = rng.randint(spare + 1 if spare >= 0 else available)
    else:
        start = max(spare, 0) // 2
    return (start + stride * np.arange(frames)) % available


def _too_short(video: str, available: int, frames: int, stride: int, span: int) -> str:
    found = (
        f"video {video} has {available} frames, and {frames} frames at stride {stride} "
        f"are asked for, which span {span}"
    )
    if not available:
        return f"{found}: leave it out"
    would_do = [f"{(available - 1) // stride + 1} frames or fewer"]
    if frames <= available:
        would_do.append(f"a stride of {(available - 1) // (frames - 1)} or less")
    return f"{found}: use {', '.join(would_do)}, or loop=True"


def ucf101(
    data_dir: Path,
    validation: float,
    *,
    config: str = "ucf101_1",
    frames: int = 16,
    stride: int = 1,
    size: int = 112,
    seed: int = 0,
    loop: bool = False,
    cache: Path | None = None,
    show: bool = True,
) -> Dataset:
    """UCF101 (Soomro, Zamir & Shah, 2012): 13,320 videos of 101 human actions.

    One clip of each video: from a start drawn uniformly in training, from the middle in
    validation and test. Frames are scaled so that the shorter side has `size` pixels,
    and cropped to the square at the centre. The first call writes the clips of all
    videos to `cache`, some 14 GB; a call that was interrupted goes on where it ended.
    The arrays of the data set are memory maps of those files.

    The videos of an action and a group (g01 to g25) show the same people and scenes.
    Validation holds out whole groups, of all actions, as the official test sets do:
    those of a smaller fraction are among those of a larger one. Examples are in the
    order in which groups are held out, and in stored order within a group.

    TFDS stores no names, from which the groups are read. They are found from the
    official lists, put in the order in which TFDS stores examples: that of a hash.

    Args:
        data_dir: the folder of TFDS. It holds `ucf101/<config>/2.0.0` as array_record
            (reading it needs no TensorFlow), and the lists in `ucf101` or where TFDS
            unpacks them.
        validation: fraction of the groups of the training set to hold out, in (0, 1).
        config: `ucf101_1`, `_2` and `_3` are the three official splits.
            `ucf101_1_256` has all videos at 256x256, whatever they were.
        frames: of a clip.
        stride: frames of the video from one frame of the clip to the next.
        size: height and width of a frame.
        seed: of the starts of training clips.
        loop: whether a video that is too short starts again at its end.
        cache: folder for the clips, `$XDG_CACHE_HOME/l0jax`, by default.
        show: whether to show a progress bar.

    Raises:
        ValueError: if a video is too short, or if the fraction leaves no group on
            either side.
        DataError: if the data set or its lists are not there, or don't agree.
    """
    folder = data_dir / "ucf101" / config / "2.0.0"
    if not folder.is_dir():
        raise DataError(
            f"ucf101 is not prepared (no folder {folder}): point TFDS_DATA_DIR at a "
            "folder that holds it prepared, or prepare it once where there are "
            "TensorFlow, ffmpeg and a network, by "
            f"`tfds.builder('ucf101/{config}', file_format='array_record')"
            ".download_and_prepare()`"
        )
    names = {split: _stored_names(data_dir, config, split) for split in _KINDS}
    group_of = [_group(name) for name in names["train"]]
    groups = sorted(set(group_of))
    held_out = round(validation * len(groups))
    if not 0 < held_out < len(groups):
        raise ValueError(
            f"validation is {validation}, which holds out {held_out} of the "
            f"{len(groups)} groups of training videos of ucf101; at least one is "
            "wanted on either side"
        )
    # Groups that are held out first come first: any fraction is a slice of the file.
    turn = {groups[i]: n for n, i in enumerate(_order(len(groups)))}
    orders = {
        "train": sorted(range(len(group_of)), key=lambda i: turn[group_of[i]]),
        "test": list(range(len(names["test"]))),
    }
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "l0jax"
    looped = "-loop" if loop else ""
    of = f"{config}-{frames}x{stride}-{size}px-seed{seed}{looped}"
    # Another folder's videos are other ones, or the same: written again, in doubt.
    place = (
        cache.expanduser() / f"{of}-{zlib.crc32(str(folder.resolve()).encode()):08x}"
    )
    found = {
        split: _written(
            place, folder, split, names[split], orders[split],
            frames=frames, stride=stride, size=size, seed=seed, loop=loop, show=show,
        )
        for split in _KINDS
    }  # fmt: skip
    clips, labels = found["train"]
    count = sum(turn[group] < held_out for group in group_of)
    return Dataset(
        "ucf101",
        train=Split(clips[count:, 0], labels[count:]),
        validation=Split(clips[:count, 1], labels[:count]),
        test=Split(found["test"][0][:, 0], found["test"][1]),
        classes=UCF101_CLASSES,
        scale=255.0,
    )


def _order(count: int) -> Int[np.ndarray, " count"]:
    return np.random.RandomState(0).permutation(count)


def _group(name: str) -> str:
    """g08, of `Archery/v_Archery_g08_c01.avi`."""
    found = re.search(r"_(g\d\d)_c\d\d\.avi$", name)
    if not found:
        raise DataError(f"{name!r} is no name of a video of ucf101, v_…_gNN_cNN.avi")
    return found[1]


def _stored_names(data_dir: Path, config: str, split: str) -> list[str]:
    """The names of the videos of a split, `action/file`, in stored order.

    Raises:
        DataError: if the official list is not there.
    """
    from tensorflow_datasets.core.hashing import Hasher

    number = config.split("_")[1]
    file = f"{_LISTS}/{split}list{int(number):02d}.txt"
    folders = [data_dir / "ucf101", *data_dir.glob("downloads/extracted/*")]
    path = next((path for f in folders if (path := f / file).is_file()), None)
    if path is None:
        raise DataError(
            f"{file} is neither in {data_dir / 'ucf101'} nor in a folder of "
            f"{data_dir / 'downloads' / 'extracted'}: unpack {_LISTS_URL} there"
        )
    names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    # As TFDS names them, which mends a name of the lists that is not that of the file.
    names = [
        f"{action}/{file.replace('HandStandPushups', 'HandstandPushups')}"
        for action, file in (name.split("/") for name in names)
    ]
    hasher = Hasher(split)
    return sorted(names, key=lambda name: hasher.hash_key(name.split("/")[1]))


def _written(
    place: Path,
    folder: Path,
    split: str,
    names: list[str],
    order: list[int],
    *,
    frames: int,
    stride: int,
    size: int,
    seed: int,
    loop: bool,
    show: bool,
) -> tuple[UInt8[np.ndarray, "n kinds frames s s 3"], Int32[np.ndarray, " n"]]:
    """Clips and labels of all videos of a split, in the given order; written if need
    be, from where an interrupted call ended."""
    path, path_of_labels = place / f"{split}.npy", place / f"{split}_labels.npy"
    partial, progress = place / f"{split}.partial.npy", place / f"{split}.done"
    if not path.exists():
        place.mkdir(parents=True, exist_ok=True)
        videos = _Videos(folder, split, names)
        begun = partial.exists() and progress.exists()
        done = int(progress.read_text()) if begun else 0
        mode: Any = "r+" if done else "w+"
        open_memmap = np.lib.format.open_memmap
        shape = (len(names), len(_KINDS[split]), frames, size, size, 3)
        clips = open_memmap(partial, mode, np.uint8, None if done else shape)
        labels = open_memmap(
            path_of_labels, mode, np.int32, None if done else shape[:1]
        )
        with bar(len(names), "video", done=done, name=split, show=show) as shown:
            for row in range(done, len(names)):
                video = order[row]
                encoded, labels[row] = videos[video]
                for clip, kind in zip(clips[row], _KINDS[split], strict=True):
                    # Of the video alone, so that resuming changes nothing.
                    drawn = np.random.RandomState([seed, video])
                    chosen = clip_frames(
                        names[video], len(encoded), frames, stride,
                        rng=drawn if kind == "drawn" else None, loop=loop,
                    )  # fmt: skip
                    clip[...] = [_square(encoded[i], size) for i in chosen]
                if (row + 1) % _KEPT_EVERY == 0 or row + 1 == len(names):
                    clips.flush()
                    labels.flush()
                    # Renamed, for a file that is being written may be cut short.
                    progress.with_suffix(".next").write_text(str(row + 1))
                    progress.with_suffix(".next").replace(progress)
                shown.update()
        del clips, labels
        partial.rename(path)
        progress.unlink()
    return np.load(path, mmap_mode="r"), np.load(path_of_labels)


class _Videos:
    """The stored videos of a split: encoded frames and label, by number.

    Raises:
        DataError: if they are not there, or other ones than the names say.
    """

    def __init__(self, folder: Path, split: str, names: list[str]):
        import tensorflow_datasets as tfds
        from array_record.python import array_record_data_source

        paths = sorted(folder.glob(f"*-{split}.array_record-*"))
        if not paths:
            raise DataError(
                f"{folder} has no file of ucf101-{split} as array_record: prepare it "
                "with file_format='array_record'"
            )
        self._records = array_record_data_source.ArrayRecordDataSource(paths)
        if len(self._records) != len(names):
            raise DataError(
                f"{folder} has {len(self._records)} videos of {split}, and the "
                f"official list {len(names)}: without those that are missing, "
                "the groups of the others are not known; prepare it again"
            )
        # TFDS' own Video needs TensorFlow, and decodes all frames. Stored are bytes.
        self._features = tfds.features.FeaturesDict(
            {
                "video": tfds.features.Sequence(tfds.features.Text()),
                "label": tfds.features.ClassLabel(num_classes=UCF101_CLASSES),
            }
        )
        self._folder, self._names = folder, names
        self._label_of: dict[str, int] = {}
        self._action_of: dict[int, str] = {}

    def __getitem__(self, number: int) -> tuple[list[bytes], int]:
        try:
            example: Any = self._features.deserialize_example_np(self._records[number])
        # array_record and protobuf: each raises types of its own.
        except Exception as error:
            raise DataError(
                f"video {number} in {self._folder} can't be read "
                f"({type(error).__name__}: {' '.join(str(error).split())}): prepare it "
                "again"
            ) from error
        label, action = int(example["label"]), self._names[number].split("/")[0]
        # That names are in stored order is inferred. In another order, an action would
        # soon meet a second label.
        known = self._label_of.setdefault(action, label)
        named = self._action_of.setdefault(label, action)
        if (known, named) != (label, action):
            raise DataError(
                f"video {number} in {self._folder} has label {label}, of {named}, "
                f"where the official list has {self._names[number]}: the examples "
                "are not in the order in which TFDS stores them; prepare it again"
            )
        return list(example["video"]), label


def _square(encoded: bytes, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """A frame with its shorter side scaled to `size`, cropped to the central square."""
    from PIL import Image, ImageOps

    frame = Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")).convert("RGB")
    return np.asarray(ImageOps.fit(frame, (size, size), Image.Resampling.BILINEAR))
