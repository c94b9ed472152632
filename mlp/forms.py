"""The forms in which a layer can be computed: which matrix product, and what is fused to it."""

from dataclasses import dataclass

SEPARATE, EPILOGUE, OWN = "separate", "epilogue", "own"
KINDS = ("forward", "weight", "input")  # the products of a layer; the first has no input gradient


@dataclass(frozen=True)
class Form:
    """How one layer is computed. `separate`: a product of the library and an op of ours; `epilogue`: a product of the
    library that ends with what the op does; `own`: our kernel that does both (kernels/gemm.py).

    forward: x w, with the bias and the activation. weight: the gradient of the weight; as an epilogue, with that of the
    bias. input: the gradient of the layer's input, with the activation's derivative and the bias gradient of the layer
    before it.
    """

    forward: str = SEPARATE
    weight: str = SEPARATE
    input: str = SEPARATE


@dataclass(frozen=True)
class Plan:
    """How a model is computed: a form per layer, and whether the last layer's arrays are padded from 47 columns to 48,
    say, so that each of their rows begins on a boundary of 16 bytes."""

    forms: tuple[Form, ...]
    padded: bool = False

    def columns(self, classes: int) -> int:
        """The columns of the last layer's arrays."""
        return -(-classes // 4) * 4 if self.padded else classes


def default(layers: int, own: bool = False) -> Plan:
    """The plan of a model that was not tuned."""
    return Plan((Form(OWN, OWN, OWN) if own else Form(),) * layers)


def candidates(layer: int, layers: int, activation: str, epilogues: bool, own: bool) -> dict[str, list[str]]:
    """The forms worth timing for each product of a layer.

    An epilogue knows relu alone (and no activation at all), and the one of `input` reads the mask that the epilogue of
    the layer before has left. The bias gradient comes from a `weight` epilogue only where nothing else has it: last.
    """
    last = layer == layers - 1
    more = [OWN] if own else []
    relu = epilogues and activation == "relu"
    of = {
        "forward": [SEPARATE, *([EPILOGUE] if relu or epilogues and last else []), *more],
        "weight": [SEPARATE, *([EPILOGUE] if epilogues and last else []), *more],
    }
    if layer:
        of["input"] = [SEPARATE, *([EPILOGUE] if relu else []), *more]
    return of
