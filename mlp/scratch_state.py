"""What a step of the from-scratch model leaves for the next: flat arrays on the device, and by layer on the host."""

import numpy as np

STEPS = "steps"


class States:
    """judged: the flat arrays by name that make the model what it is, "parameters" and with batch normalisation
    "running"; averages: of those over the steps, by the same names, where they are wanted; arrays: these and all others
    that a step leaves for the next ("m" and "v", or "velocity", and "steps")."""

    def __init__(self, model, optimizer, steps, averages: bool):
        self.model = model
        self.judged = {"parameters": model.parameters} | ({"running": model.running} if model.norm else {})
        self.averages = {name: x.copy() for name, x in self.judged.items()} if averages else {}
        averaged = {f"average_{name}": average for name, average in self.averages.items()}
        self.arrays = self.judged | optimizer.moments | averaged | {STEPS: steps}

    def views(self, name: str, flat):
        """("weight0", view), ... of one of the arrays or of another with its layout; nothing of one without layers."""
        if name.endswith("running"):
            return self.model.named_buffers(flat)
        return self.model.named_parameters(flat) if name in self.arrays and name != STEPS else ()

    def to_host(self, state: dict, device) -> dict[str, np.ndarray]:
        """Arrays on the device by name -> on the host as "parameters/weight0", ...: the same on every device, however
        the layers are padded there."""
        named = {}
        for name, flat in state.items():
            flat = np.array(device.numpy(flat))
            views = {f"{name}/{part}": np.array(view) for part, view in self.views(name, flat)}
            named |= views or {name: flat}
        return named

    def from_host(self, named: dict[str, np.ndarray], device) -> dict:
        """What to_host() was given."""
        state = {}
        for name in dict.fromkeys(part.partition("/")[0] for part in named):
            flat = named.get(name)
            if flat is None:
                flat = np.zeros(self.arrays[name].shape, self.arrays[name].dtype)
                for part, view in self.views(name, flat):
                    view[...] = named[f"{name}/{part}"]
            state[name] = device.xp.asarray(flat)
        return state


def put(arrays: dict, values: dict) -> None:
    """Overwrite those of the arrays that `values` has, by name."""
    for name in arrays.keys() & values.keys():
        arrays[name][...] = values[name]
