"""What a model is judged by: cross-entropy, accuracy, macro F1, confusion, and accuracy under noise."""

from dataclasses import dataclass

import numpy as np

NOISE_SIGMA = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # standard deviations, in units of the [0, 1] pixel


@dataclass(frozen=True)
class Evaluation:
    cross_entropy: float  # mean over the images, in nats
    confusion: np.ndarray  # int64 (classes, classes): rows are labels, columns predictions

    @property
    def n(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.n)

    @property
    def macro_f1(self) -> float:
        """Mean over the classes of 2 TP / (2 TP + FP + FN); 0 for a class neither present nor predicted."""
        hits = np.diag(self.confusion)
        total = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return float(np.mean(2.0 * hits / np.maximum(total, 1)))

    def summary(self) -> dict:
        """The numbers of metrics.json; accuracy and macro F1 as fractions."""
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "cross_entropy": self.cross_entropy,
            "n": self.n,
        }
