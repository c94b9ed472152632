"""Time every op at every size: array code, other ways to fuse, torch, our kernels, and a copy of the same bytes.

    python profile/bench_kernels.py                      # on the GPU where there is one, else on the CPU
    python profile/bench_kernels.py --ops adam_step --sizes 1MB,64MB --out folder

Every contender computes the same result on the same arrays, and is compared with float64 before it is timed. On a
GPU a sample is the replay of a CUDA graph of many launches, on sets of arrays that together exceed the L2 cache; on
a CPU it is the mean of calls from Python. Bytes are those that must move: each input read once, each output written
once. The ceiling is the fastest copy that moves as many bytes, half of them read and half written.
"""

import argparse
import collections
import itertools
import sys
from functools import partial
from pathlib import Path

import kernel_ops
import machine
import measure
import numpy as np
from measure import Contender
from tqdm import tqdm

from kernels import BackendError
from mlp import InputError
from mlp.device import Device, select

MB = 2**20
SIZES = {"cpu": "64KB,256KB,1MB,4MB,16MB,64MB", "cuda": "64KB,1MB,4MB,16MB,64MB,256MB,1024MB"}
UNITS = {"KB": 2**10, "MB": MB, "GB": 2**30}
MAX_SETS, MAX_BYTES = 1024, 3 * 2**30  # of sets of arrays, and of what one graph's launches move


def parse_size(text: str) -> int:
    """'64KB' -> 65536."""
    number, unit = text[:-2], UNITS.get(text[-2:])
    if not number.isdecimal() or not int(number) or unit is None:
        raise InputError(f"--sizes {text} is not a size; give whole numbers with KB, MB or GB, such as 64KB,1MB")
    return int(number) * unit


def copies(xp, torch, size: int, sets: int) -> dict:
    """Name -> the calls that copy size / 2 bytes, on as many pairs of arrays as there are sets."""
    n = max(1, size // 8)
    source, target = (xp.ones((sets, n), np.float32) for _ in range(2))
    pairs = list(zip(target, source))
    if xp is not np:
        table = {"cudaMemcpyAsync": [lambda to=to, of=of: to.data.copy_from_device_async(of.data, of.nbytes)
                                     for to, of in pairs]}  # fmt: skip
        if n % 4 == 0:
            table["16 bytes per thread"] = [partial(copy_by_kernel, xp, to, of) for to, of in pairs]
        return table
    table = {"np.copyto": [lambda to=to, of=of: np.copyto(to, of) for to, of in pairs]}
    if torch:
        table["torch copy_"] = [
            lambda to=to, of=of: to.copy_(of) for to, of in map(partial(map, torch.from_numpy), pairs)
        ]
    return table


def copy_by_kernel(xp, to, of) -> None:
    """Up to 256 MB faster than cudaMemcpyAsync is in a graph."""
    kernel = xp.ElementwiseKernel("complex128 x", "complex128 y", "y = x", "copy_by_kernel")
    kernel(of.view(np.complex128), to.view(np.complex128))


def methods(op, kind: str) -> dict:
    """Name of the contender -> the method of `op` that computes it, for those that this device can have."""
    return {
        name: method
        for name, attribute in kernel_ops.METHODS.items()
        if (method := getattr(op, attribute, None))
        and (kind == "cuda" or name not in kernel_ops.GPU_ONLY)
        and (op.torch or not name.startswith("torch"))
    }


def check(op, method, argument, arrays, pristine, reference) -> None:
    """Raise unless the contender computes the reference from the pristine arrays."""
    if op.xp is not np:  # the graph of the contender before, on its own stream, may still work on them
        op.xp.cuda.Device().synchronize()
    for name, array in pristine.items():
        arrays[name][...] = array
    for name in op.outputs:
        arrays[name][...] = np.nan
    results = method(argument)
    assert len(results) == len(reference)
    for result, expected in zip(results, reference):
        error = abs(op.xp.asarray(result).astype(np.float64) - expected).max()
        if not float(error) <= op.tolerance * float(abs(expected).max()):
            raise ArithmeticError(f"wrong result: largest error {float(error):.3g}")


def ready(calls: list, size: int, stream, capture=measure.cupy_graph, shared=False) -> Contender:
    """What makes the calls, one per set of arrays: on a CPU the first, on a GPU a graph of all, 8 if memory allows."""
    if stream is None:
        return Contender(lambda _: calls[0](), shared)
    count = max(len(calls), min(8, MAX_BYTES // size))
    return Contender(capture([calls[k % len(calls)] for k in range(count)], stream), repeats=count)


def checked(op, name, method, sets, size, stream, pristine, reference) -> Contender:
    """The contender `name` of an op, if its result is right, which is seen where there is a reference."""
    torch = name.startswith("torch")
    given = [op.tensors(a) for a in sets] if torch else sets
    if reference:
        check(op, method, given[0], sets[0], pristine, reference)
    capture = measure.torch_graph if torch else measure.cupy_graph
    return ready([partial(method, a) for a in given], size, stream, capture, shared=name == "fused")


def sets_of(op, size: int, device: Device) -> list:
    """Sets of arrays: one on a CPU; on a GPU as many as exceed its L2 cache."""
    count = 1
    if device.kind == "cuda":
        cache = device.xp.cuda.Device().attributes["L2CacheSize"]
        count = min(MAX_SETS, 2 + int(1.2 * cache) // size)
    return [op.arrays(op.rows(size)) for _ in range(count)]


def builders(op, size, device, stream, check_results=True) -> dict:
    """Name -> what makes the contender ready."""
    sets = sets_of(op, size, device)
    reference = op.reference(sets[0]) if check_results else None
    pristine = {name: sets[0][name].copy() for name in op.mutable}
    table = {name: partial(checked, op, name, method, sets, size, stream, pristine, reference)
             for name, method in methods(op, device.kind).items()}  # fmt: skip
    for name, calls in copies(device.xp, op.torch, op.rows(size) * op.bytes_per_row, len(sets)).items():
        table[name] = partial(ready, calls, size, stream)
    return table


def rows(op, size, samples, failed, facts):
    """The rows of the result file, the ceiling last."""
    count = op.rows(size)
    moved = count * op.bytes_per_row
    common = {"op": op.name, "size": size, "shape": op.shape(count), "dtype": op.dtype, "bytes": moved}
    copy_names = [name for name in samples if name not in kernel_ops.METHODS]
    ceiling = min(copy_names, key=lambda name: measure.quiet(samples[name]), default=None)  # None: all failed
    for name in [name for name in samples if name in kernel_ops.METHODS or name == ceiling]:
        times, plain = samples[name], samples.get("plain")
        yield common | measure.percentiles(times, "us") | {
            "contender": "copy" if name == ceiling else name,
            "gb_per_s": measure.significant(moved / np.median(times) / 1e9),
            "share_of_copy": measure.ratio(samples[ceiling], times) if ceiling else "",
            "speedup": "" if plain is None else measure.ratio(plain, times),
            "note": name if name == ceiling else "",
        } | facts  # fmt: skip
    for name, reason in failed.items():
        yield common | {"contender": name, "note": reason} | facts


def print_rows(part) -> None:
    first = part[0]
    print(f"{first['op']}, {first['shape']}, {first['bytes'] / MB:.3g} MB")
    for row in part:
        if "p50_us" in row:
            print(f"  {row['contender']:24}{row['p50_us']:>12} us{row['gb_per_s']:>9} GB/s"
                  f"{row['share_of_copy']:>8} of copy{row['speedup']:>9} x plain", flush=True)  # fmt: skip


def measured(args, device: Device, facts: dict):
    """The rows of kernels.csv, by op and size; again after every measurement, with what has been measured so far."""
    torch = None
    if measure.has_torch():
        import torch
    xp, on_cpu = device.xp, device.kind == "cpu"
    rng = (np if on_cpu else xp).random.default_rng(0)
    stream = None if on_cpu else xp.cuda.Stream(non_blocking=True)
    clock = measure.host_clock(device) if on_cpu else measure.event_clock(stream)
    passes, rounds = args.passes or (20 if on_cpu else 1), args.rounds or (1 if on_cpu else 5)
    times = {"rounds": rounds, "blocks": args.blocks, "block": args.block, "settle": args.settle}
    sizes = list(map(parse_size, (args.sizes or SIZES[device.kind]).split(",")))
    ops = [op for name in args.ops.split(",") for op in kernel_ops.OPS[name](xp, rng, torch)]
    samples, parts = collections.defaultdict(dict), {}
    for op, size in tqdm(passes * list(itertools.product(ops, sizes)), unit=" turns", disable=None):
        try:
            first = (op.name, size) not in parts
            table, failed = measure.built(builders(op, size, device, stream, first), f"{op.name} {size}")
        except MemoryError:  # CuPy's OutOfMemoryError is one too
            print(f"{op.name}: arrays for {size / MB:g} MB do not fit into memory and are left out", file=sys.stderr)
            continue
        measure.merge(samples[op.name, size], measure.in_turns(table, clock, **times))
        parts[op.name, size] = list(rows(op, size, samples[op.name, size], failed, facts))
        yield parts
        if not on_cpu:
            del table
            xp.get_default_memory_pool().free_all_blocks()
            if torch and torch.cuda.is_available():
                torch.cuda.empty_cache()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ops", default=",".join(kernel_ops.OPS), help="separated by commas (default: all)")
    parser.add_argument("--sizes", help=f"bytes that must move (default: {SIZES['cpu']}; on a GPU {SIZES['cuda']})")
    parser.add_argument("--passes", type=int, help="times that all is measured (default: 20, on a GPU 1)")
    parser.add_argument("--rounds", type=int, help="turns of each contender in a pass (default: 1, on a GPU 5)")
    parser.add_argument("--blocks", type=int, default=2, help="samples in a turn (default: 2)")
    parser.add_argument("--block", type=float, default=0.002, help="seconds of a sample, at least (default: 0.002)")
    parser.add_argument("--settle", type=float, default=0.01, help="untimed seconds before a turn (default: 0.01)")
    parser.add_argument("--out", type=Path, help="folder of kernels.csv (default: profile/results/<device>)")
    return parser


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        if unknown := set(args.ops.split(",")) - set(kernel_ops.OPS):
            raise InputError(f"--ops {', '.join(sorted(unknown))} is unknown; choose of {', '.join(kernel_ops.OPS)}")
        measure.check_times(args)
        list(map(parse_size, (args.sizes or SIZES["cpu"]).split(",")))
        device = select(args.device, fused=True)
    except (InputError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = machine.facts(device.name, device.kind)
    cores = facts["cores"] if device.kind == "cpu" else None
    path = (args.out or machine.results_folder(device.name, cores)) / "kernels.csv"
    for parts in measured(args, device, facts):
        results = [row for part in parts.values() for row in part]
        machine.write_csv(path, results)  # each time, so that a run that is cut short leaves what it had
    for part in parts.values():
        print_rows(part)
    print(f"written to {path}")
    return int(any("p50_us" not in row for row in results))


if __name__ == "__main__":
    sys.exit(main())
