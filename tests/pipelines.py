"""Pipelines of the tests, with no more than their worker processes have to import."""

import multiprocessing
import os
import threading

import grain
import numpy as np


class Digits:
    """Images and labels by number."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, at):
        return self.images[at], self.labels[at]


def shifted(example, rng):
    """An image moved by up to a pixel."""
    image, label = example
    return np.roll(image, rng.integers(-1, 2, 2), axis=(0, 1)), label


def end_with_run(worker, workers):
    """Grain's workers outlive a program that is killed, and keep their memory."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def pipeline(source, workers=0, seed=0, size=100, part=slice(None), passes=None):
    data = grain.MapDataset.source(source)[part].seed(seed).shuffle()
    data = data.random_map(shifted).batch(size, drop_remainder=True).repeat(passes)
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    return data.to_iter_dataset(read).mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=2),
        worker_init_fn=end_with_run,
    )
