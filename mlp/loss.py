"""What is descended beside the cross-entropy itself: how classes are weighted, how training images are altered."""

import numpy as np

from kernels import Augment

from .configs import Config


def class_weights(labels: np.ndarray, config: Config, train_rows: int) -> np.ndarray | None:
    """float32 (C,): the weight of a row's loss by its label, or None where all are 1.

    (1 - b) / (1 - b^n) for a class of n training images, which is 1 / n for b towards 1 (Cui et al., "Class-balanced
    loss based on effective number of samples", 2019), scaled so that the mean over the training images is 1. labels
    (M,): of all images, of which train_rows are trained on, class by class the same share.
    """
    beta = config.class_balance
    if not beta:
        return None
    counts = np.bincount(labels)
    weights = (1.0 - beta) / (1.0 - beta ** (counts * (train_rows / len(labels))))
    return (weights * (counts.sum() / (weights * counts).sum())).astype(np.float32)


def altered_images(config: Config) -> dict:
    """What kernels.gather_batch is told to make of training images: noise, and random affine maps, which at strength 1
    are up to 10 degrees, 10 % in either direction, a shear of 0.1 and 2 pixels."""
    altered, s = {}, config.augment
    if config.train_noise:
        altered |= {"noise_sigma": config.train_noise, "noise_uniform": True}
    if s:
        altered |= {"augment": Augment(rotation=10.0 * s, scale=0.1 * s, shear=0.1 * s, shift=2.0 * s)}
    return altered
