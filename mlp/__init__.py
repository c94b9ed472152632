"""A multilayer perceptron for 28x28 character images, written from scratch on NumPy and CuPy."""


class InputError(Exception):
    """Something the user gave cannot be used; the message is one sentence: what, expected, what to do."""


class LostProcess(InputError):
    """Another process of the same job is gone, so this one cannot go on."""
