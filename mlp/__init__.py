"""A multilayer perceptron for 28x28 character images, written from scratch on NumPy and CuPy."""


def printable(text: str) -> str:
    """`text` on one line that every terminal and file can take: the names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """What an exception says, or where it says nothing its name."""
    return " ".join(str(error).split()) or type(error).__name__


class InputError(Exception):
    """Something the user gave cannot be used; the message is one sentence: what, expected, what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class LostProcess(InputError):
    """Another process of the same job is gone, so this one cannot go on."""
