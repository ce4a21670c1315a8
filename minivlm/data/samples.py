"""From a user's lines to the batches of each training step, in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from minivlm.data.lines import Sample
from minivlm.errors import InputError
from minivlm.processing import Processor, load_picture, to_rgb

Inputs = dict[str, Tensor]  # what the processor gives and the model takes


class SampleBatches(Dataset[list[Inputs] | InputError]):
    """Item number n: the batches of step n, a function of (seed, n) alone.

    The rows of a run are all examples in random order, then all of them in another one, and so on. Steps cut
    them into equal pieces, of which only the last one of the run may be smaller.

    Args:
        rows: of the whole run.
        batch_size: rows of a batch.
        accumulate: batches of a step.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Processor,
        *,
        seed: int,
        rows: int,
        batch_size: int,
        accumulate: int,
    ) -> None:
        self.samples, self.processor = samples, processor
        self.seed, self.rows, self.batch_size, self.accumulate = seed, rows, batch_size, accumulate
        self._order: tuple[int, list[int]] = (-1, [])  # the epoch asked for last, and its order

    def __len__(self) -> int:
        return -(-self.rows // (self.batch_size * self.accumulate))

    def __getitem__(self, step: int) -> list[Inputs] | InputError:
        first = step * self.batch_size * self.accumulate
        last = min(first + self.batch_size * self.accumulate, self.rows)
        samples = [self.sample(row) for row in range(first, last)]
        pieces = [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
        try:
            return [make_inputs(self.processor, piece) for piece in pieces]
        except InputError as error:  # handed over: raised in a worker process it would come with a traceback
            return error

    def sample(self, row: int) -> Sample:
        """The example in a row of the run."""
        epoch, place = divmod(row, len(self.samples))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, rng.permutation(len(self.samples)).tolist())
        return self.samples[self._order[1][place]]


def make_inputs(processor: Processor, samples: Sequence[Sample]) -> Inputs:
    """A batch with labels, padded on the right.

    Raises InputError: a picture turns out to be damaged, or has gone since it was looked at.
    """
    return processor(
        [_open(sample) for sample in samples],
        [sample.prefix for sample in samples],
        suffixes=[sample.suffix for sample in samples],
        padding_side="right",
    )


def _open(sample: Sample) -> Image.Image:
    try:
        return to_rgb(load_picture(sample.path))
    except InputError as error:
        raise InputError(f"line {sample.line}: {error}") from error
