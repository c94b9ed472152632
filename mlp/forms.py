"""The forms in which a layer can be computed: which matrix product, and what is fused to it."""

from dataclasses import dataclass
from typing import NamedTuple

SEPARATE, EPILOGUE, MASKED, OWN = "separate", "epilogue", "masked epilogue", "own"
KINDS = ("forward", "weight", "input")  # the products of a layer; the first has no input gradient


@dataclass(frozen=True)
class Form:
    """How one layer is computed. `separate`: a product of the library and an op of ours; `epilogue`: a product of the
    library that ends with what the op does; `own`: our kernel that does both (kernels/gemm.py).

    forward: x w, with the bias and the activation; a masked epilogue also leaves the bits that tell relu's derivative.
    weight: the gradient of the weight; as an epilogue, with that of the bias. input: the gradient of the layer's input,
    with the activation's derivative and the bias gradient of the layer before it, of which an epilogue reads the mask.
    """

    forward: str = SEPARATE
    weight: str = SEPARATE
    input: str = SEPARATE


class Algorithms(NamedTuple):
    """Which algorithm the library takes for each product of a layer, counted from 0: see CublasLt."""

    forward: int = 0
    weight: int = 0
    input: int = 0


@dataclass(frozen=True)
class Plan:
    """How a model is computed: a form per layer, and whether the last layer's arrays are padded from 47 columns to 48,
    say, so that each of their rows begins on a boundary of 16 bytes; and the library's algorithms by layer, which were
    found for batches of `rows` and mean nothing for others."""

    forms: tuple[Form, ...]
    padded: bool = False
    algorithms: tuple[Algorithms, ...] = ()
    rows: int = 0

    def algorithm(self, layer: int, kind: str, rows: int) -> int:
        """Of a product, in a batch of this many rows."""
        return getattr(self.algorithms[layer], kind) if rows == self.rows else 0

    def columns(self, classes: int) -> int:
        """The columns of the last layer's arrays."""
        return -(-classes // 4) * 4 if self.padded else classes


def as_plan(content: dict) -> Plan:
    """The Plan that dataclasses.asdict() and JSON have made this of."""
    forms = tuple(Form(**form) for form in content["forms"])
    return Plan(forms, content["padded"], tuple(Algorithms(*each) for each in content["algorithms"]), content["rows"])


def default(layers: int, own: bool = False) -> Plan:
    """The plan of a model that was not tuned."""
    return Plan((Form(OWN, OWN, OWN) if own else Form(),) * layers)


def candidates(
    layer: int, layers: int, activation: str, epilogues: bool, own: bool, treated: bool = False
) -> dict[str, list[str]]:
    """The forms worth timing for each product of a layer.

    An epilogue knows relu alone (and no activation at all). The bias gradient comes from a `weight` epilogue only where
    nothing else has it: last. treated: hidden layers have a normalisation or dropout, which no form fuses to a product.
    """
    last, relu = layer == layers - 1, epilogues and activation == "relu" and not treated
    more, hidden = [OWN] * own, [OWN] * (own and not treated)
    of = {
        "forward": [SEPARATE]
        + [EPILOGUE] * (relu or epilogues and last)
        + [MASKED] * (relu and not last)
        + (more if last else hidden),
        "weight": [SEPARATE] + [EPILOGUE] * (epilogues and last) + more,
    }
    if layer:
        of["input"] = [SEPARATE] + [EPILOGUE] * relu + hidden
    return of
