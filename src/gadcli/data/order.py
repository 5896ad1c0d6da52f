"""The order in which rows are trained on: a pure function of (seed, epoch, step), at no cost in memory."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from gadcli.errors import DataError

ROUNDS = 8
Words = npt.NDArray[np.uint64]


class Permutation:
    """A pseudo-random permutation of 0..n-1, computed where it is asked for.

    A balanced Feistel network on the smallest even number of bits that holds n; values that fall outside n walk
    on until they are inside (at most 4 tries on average), which keeps it a bijection. Black & Rogaway 2002.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = n
        self.half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * 8).digest()
        self.keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the given positions of the epoch point to, as row indexes."""
        values = self._network(positions.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: Words) -> Words:
        bits, mask = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = values >> bits, values & mask
        for key in self.keys[:ROUNDS]:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << bits) | right


def _mix(x: Words) -> Words:
    """The finaliser of SplitMix64: every input bit reaches every output bit. Wraps at 64 bits on purpose."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class BatchOrder:
    """Which rows each global step trains on. Resuming needs the step alone.

    An epoch visits `steps_per_epoch * batch_size` different rows; the last `n_rows % batch_size` of its order are
    left out (others each epoch, when shuffled). Raises DataError when there is not one full batch.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.n_rows, self.batch_size, self.seed, self.shuffle = n_rows, batch_size, seed, shuffle
        self.steps_per_epoch = n_rows // batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{n_rows} rows are fewer than one batch of {batch_size}: there would be no step",
                f"data.train_batch_size={max(n_rows, 1)}, or more rows",
            )
        self._epoch: tuple[int, Permutation] | None = None

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def rows(self, step: int) -> list[int]:
        """The row indexes of global step `step` (from 0), for all ranks together."""
        epoch, within = divmod(step, self.steps_per_epoch)
        positions = np.arange(within * self.batch_size, (within + 1) * self.batch_size, dtype=np.int64)
        if not self.shuffle:
            return [int(i) for i in positions]
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, Permutation(self.n_rows, self.seed, epoch))
        return [int(i) for i in self._epoch[1](positions)]
