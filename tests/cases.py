"""Every kernel on the shapes and in the variants that trip kernels: one list for every way of executing them.

test_sanitizers.py runs it thread by thread and on the host library, under sanitizers; gpu_check.py on a GPU.
`representative()` is small, yet launches every kernel and takes every branch: packs of 4 and single elements,
rows in registers and in memory, one block and a last block that adds what the others left. `every()` goes
through the awkward shapes of checks.py, too.
"""

import itertools

from kernels import ACTIVATIONS, Augment
from kernels.launches import ROW_BLOCKS

from . import references
from .case import (
    ONE_BLOCK, Case, adam, advance, average, bias_act, bias_act_backward, gather, sgd, shuffle,
    softmax_cross_entropy, to_bfloat16,
)  # fmt: skip
from .checks import FEW_SHAPES, OFFSETS
from .norm_case import batch_norm_stats, norm_act, norm_act_backward


AUGMENT = Augment(rotation=20.0, scale=0.3, shear=0.2, shift=1.5)


def _representative():
    for a in ACTIVATIONS:
        yield bias_act(a, 3, 33)
        yield bias_act(a, 5, 7, offset=1)
        yield bias_act_backward(a, 17, 48, with_bias=True, multiprocessors=1)
        yield bias_act_backward(a, 5, 33)
    for case in (bias_act, bias_act_backward):
        for shape in ((0, 5), (1, 1), (4, 3), (9, 1)):  # an empty batch; fewer columns than a pack
            yield case("relu", *shape)
        yield case("relu", 2, 400, in_place=True)
        yield case("identity", 9, 12, in_place=True)  # backward: only the column sums
        yield case("identity", 9, 11, in_place=True, offset=1)
        yield case("relu", 30, 41, multiprocessors=ONE_BLOCK)
        yield case("relu", 30, 40, multiprocessors=ONE_BLOCK)
    # One phase up to 8 rows per thread, and one more, whose partial sums meet in the last block. Then more partial sums
    # than row groups, in each of three column tiles, and without packs.
    for rows, columns, multiprocessors in ((128, 65, 1), (129, 65, 1), (1024, 5, 1), (1025, 4, 1)):
        yield bias_act_backward("relu", rows, columns, multiprocessors=multiprocessors, with_bias=True)
    yield bias_act_backward("gelu", 520, 128, multiprocessors=4)
    yield bias_act_backward("relu", 1025, 128, multiprocessors=25)  # 100 row blocks, of which 6 have no row
    yield bias_act_backward("relu", 70, 150, multiprocessors=1)  # two row blocks
    yield bias_act_backward("relu", 300, 300, multiprocessors=9, with_bias=True)
    yield bias_act_backward("relu", 150, 127, multiprocessors=1, offset=1, with_bias=True)
    yield bias_act("silu", 3, 1031, multiprocessors=ONE_BLOCK)  # two packs, one pack and none; then what is left
    for items in filter(None, ROW_BLOCKS):
        yield softmax_cross_entropy(2, 32 * items)
    for shape in ((2, 1025), (0, 5), (1, 1), (9, 5)):
        yield softmax_cross_entropy(*shape, offset=1)
    yield softmax_cross_entropy(10, 3, multiprocessors=ONE_BLOCK, totals=False, scale=0.5)
    for C in (33, 1030):
        yield softmax_cross_entropy(2, C, in_place=True)
        yield softmax_cross_entropy(7, C, labels="out of range")
        yield softmax_cross_entropy(2, C, logits="nan")
        yield softmax_cross_entropy(7, C, labels="out of range", padding=2, confusion=True)
        yield softmax_cross_entropy(3, C, logits="nan", padding=33, confusion=True, in_place=True, offset=1)
    for items in filter(None, ROW_BLOCKS):
        yield softmax_cross_entropy(2, 32 * items - 1, padding=1, confusion=items < 16)
    yield softmax_cross_entropy(40, 3, padding=1, confusion=True, multiprocessors=ONE_BLOCK, totals=False)
    yield softmax_cross_entropy(0, 5, padding=3, confusion=True)
    for variant in ({"smoothing": 0.1}, {"weighted": True}, {"smoothing": 0.3, "weighted": True}):
        for C in (5, 33, 1030):
            yield softmax_cross_entropy(7, C, labels="out of range", **variant)
        yield softmax_cross_entropy(3, 47, in_place=True, offset=1, padding=1, **variant)
        yield softmax_cross_entropy(3, 1027, in_place=True, logits="nan", **variant)
    for P, decay, step in ((0, 0.9, 1), (1, 0.0, 1), (37, 0.9, 1), (37, 0.9, 1000)):  # early, and late
        yield average(P, decay=decay, step=step)
        yield average(P, decay=decay, step=step, offset=1)
    yield average(1100, multiprocessors=ONE_BLOCK)
    yield average(5, device_scalars=True)
    for step in (adam, sgd):
        for P in (0, 1, 37):
            yield step(P)
        yield step(37, offset=1)
        yield step(1100, multiprocessors=ONE_BLOCK, settings="l2")
        yield step(5, device_scalars=True)
    yield adam(6, settings="decoupled", step=1)
    yield sgd(37, settings="plain", velocity=False)
    yield sgd(6, settings="l2 without momentum", velocity=False, offset=1)
    yield gather(20, 392, index="out of range", multiprocessors=ONE_BLOCK)  # more words than the grid loads at once
    yield from (gather(3, 16, offset=1, batch_offset=4), gather(3, 16, batch_offset=1))
    yield from (gather(0, 5), gather(1, 1, images=1), gather(3, 16), gather(3, 16, offset=1), gather(3, 9))
    yield gather(40, 49, mean=0.25, scale=2.0, multiprocessors=ONE_BLOCK)
    for variant in ({"noise_sigma": 0.5}, {"affine": True}, {"noise_sigma": 0.5, "affine": True}):
        yield gather(3, 9, **variant)
        yield gather(8, 25, index="out of range", **variant)
    for begin in (0, 5, 13, -3, 16, 2**63 - 1, -(2**63)):  # within the 16 positions, beyond either end, far away
        yield gather(8, 9, begin=str(begin))
    yield gather(0, 5, begin="0")
    yield gather(7, 25, index="out of range", begin="4", noise_sigma=0.5, affine=True, offset=1)
    yield gather(7, 25, part=True, index="out of range", begin="4", noise_sigma=0.5, affine=True)
    yield gather(3, 9, part=True, noise_sigma=0.5, offset=1)
    yield gather(3, 16, part=True)
    yield gather(40, 49, begin="30", multiprocessors=ONE_BLOCK)
    for variant in ({"augment": AUGMENT}, {"noise_sigma": 0.5, "noise_uniform": True},
                    {"augment": AUGMENT, "noise_sigma": 0.5, "noise_uniform": True}):  # fmt: skip
        yield gather(3, 9, **variant)
        yield gather(7, 25, part=True, index="out of range", begin="4", draw=3, offset=1, **variant)
        yield gather(30, 16, draw=-1, multiprocessors=ONE_BLOCK, **variant)
    yield gather(3, 1156, augment=AUGMENT, noise_sigma=0.5, draw=2**32 + 5)  # more than a block of the host's
    for N in (0, 1, 2, 5, 127, 255, 256, 257, 1025):
        yield shuffle(N, offset=N % 2)
    yield shuffle(1500, multiprocessors=ONE_BLOCK, seed=2**64 - 1, epoch=2**32 - 1)
    for by in (0, 512, 2**63 - 1):
        yield advance(by, step=4.0)
    yield advance(512, begin=-(2**63), offset=1)
    for n in (0, 1, 3, 4, 37, 1000):
        yield to_bfloat16(n)
    yield to_bfloat16(1000, offset=1)
    yield to_bfloat16(1100, multiprocessors=ONE_BLOCK)


def _normalised():
    """Batch normalisation and dropout: with each, without, and with both."""
    for a in ACTIVATIONS:
        for case in (norm_act, norm_act_backward):
            yield case(a, 9, 12, norm=True, dropout=0.25)
            yield case(a, 5, 33, norm=True)
    for case in (norm_act, norm_act_backward):
        for shape in ((0, 5), (1, 1), (4, 3), (9, 1)):
            yield case("relu", *shape, norm=True, dropout=0.5)
        for norm, dropout, offset in itertools.product((False, True), (0.0, 0.5), OFFSETS):
            yield case("relu", 30, 40, norm=norm, dropout=dropout, offset=offset, multiprocessors=ONE_BLOCK)
            yield case("relu", 6, 41, norm=norm, dropout=dropout, offset=offset, in_place=True)
        yield case("relu", 3, 8, dropout=0.5, device_step=True)
    # Row blocks whose sums meet in the last one, in packs and without; and more of them than row groups, some empty.
    for rows, columns, multiprocessors in ((129, 64, 1), (129, 65, 1), (300, 300, 9), (1025, 128, 25)):
        yield norm_act_backward("relu", rows, columns, norm=True, dropout=0.5, multiprocessors=multiprocessors)
        yield batch_norm_stats(rows, columns, running=True, multiprocessors=multiprocessors)
    yield norm_act_backward("relu", 150, 64, multiprocessors=1)
    for shape in ((0, 5), (1, 1), (2, 3), (17, 48), (33, 31)):
        yield batch_norm_stats(*shape, running=True)
    yield batch_norm_stats(33, 48, offset=1)
    yield batch_norm_stats(17, 8, running=True, momentum=1.0)


def representative() -> list[Case]:
    return [*_representative(), *_normalised()]


def _shapes(shapes, sizes):
    for a, (B, N), offset in itertools.product(ACTIVATIONS, shapes, OFFSETS):
        if a == "relu" or (B, N) in FEW_SHAPES:  # the shape's own branches do not depend on the activation
            yield bias_act(a, B, N, offset=offset)
            yield bias_act_backward(a, B, N, offset=offset)
            yield bias_act_backward(a, B, N, offset=offset, with_bias=True)
    around_registers = [(3, 32 * items + more) for items in filter(None, ROW_BLOCKS) for more in (0, 1)]
    for (B, C), offset in itertools.product([*shapes, *around_registers, (2, 5000)], OFFSETS):
        yield softmax_cross_entropy(B, C, offset=offset)
        yield softmax_cross_entropy(B, C, offset=offset, padding=3, confusion=C < 600)
        yield softmax_cross_entropy(B, C, offset=offset, smoothing=0.1, weighted=True)
    for P, offset in itertools.product(sizes, OFFSETS):
        few = P not in (5, 1023)  # every setting with sizes that fill packs and leave a rest
        for step, settings in itertools.product((1, 1000), references.ADAM_CASES):
            if settings == "defaults" or not few:
                yield adam(P, settings=settings, step=step, offset=offset)
        for settings, options in references.SGD_CASES.items():
            for velocity in (True, False) if not options.get("momentum") else (True,):
                if settings in ("plain", "momentum") or not few:
                    yield sgd(P, settings=settings, velocity=velocity, offset=offset)
    for (B, D), offset in itertools.product([*shapes, (5, 784)], OFFSETS):
        yield gather(B, D, offset=offset, mean=0.17, scale=3.0)
        yield gather(B, D, offset=offset, noise_sigma=0.5)
        yield gather(B, D, offset=offset, begin=str(B // 3))
        if int(D**0.5) ** 2 == D:
            yield gather(B, D, offset=offset, affine=True)
            yield gather(B, D, offset=offset, augment=AUGMENT, noise_sigma=0.5, noise_uniform=True, draw=7)
    for (B, N), offset in itertools.product(shapes, OFFSETS):
        yield batch_norm_stats(B, N, offset=offset, running=True)
        for norm, dropout in itertools.product((False, True), (0.0, 0.3)):
            yield norm_act("relu", B, N, offset=offset, norm=norm, dropout=dropout)
            yield norm_act_backward("relu", B, N, offset=offset, norm=norm, dropout=dropout)
    for N, offset in itertools.product(sizes, OFFSETS):
        yield shuffle(N, offset=offset, seed=1)
        yield to_bfloat16(N, offset=offset)


def _large():
    """Enough for several waves of blocks on a GPU, and for the CPU to share among threads."""
    for a in ACTIVATIONS:
        yield bias_act(a, 4000, 601)
        yield bias_act_backward(a, 4000, 601, with_bias=True)
        yield norm_act(a, 4000, 600, norm=True, dropout=0.5)
        yield norm_act_backward(a, 4000, 600, norm=True, dropout=0.5)
    yield bias_act_backward("identity", 20_000, 47)
    yield batch_norm_stats(20_000, 47, running=True)
    for shape in ((20_000, 47), (3000, 400), (2057, 1), (600, 2000)):
        yield softmax_cross_entropy(*shape)
    yield adam(1_500_001)
    yield sgd(1_500_001)
    yield sgd(1_500_001, settings="plain", velocity=False)
    yield gather(2000, 784)
    yield gather(2000, 784, noise_sigma=0.5, affine=True)
    yield gather(2000, 784, noise_sigma=0.5, augment=AUGMENT, noise_uniform=True, draw=1)
    yield softmax_cross_entropy(20_000, 47, smoothing=0.1, weighted=True)
    yield average(1_500_001)
    yield softmax_cross_entropy(20_000, 47, padding=1, confusion=True)
    yield shuffle(1_048_577)
    yield to_bfloat16(3_000_001)


def shared(least: int) -> list[Case]:
    """What the CPU shares among threads where it shares `least` nanoseconds of work (fast.cpp's costs)."""
    rows = least // 47 + 1
    return [
        bias_act("relu", 6 * rows, 47), bias_act_backward("gelu", 2 * rows, 47, with_bias=True),
        bias_act_backward("identity", 4 * rows, 47, in_place=True),
        softmax_cross_entropy(rows, 47, offset=1), softmax_cross_entropy(rows, 47, labels="out of range"),
        adam(2 * least + 1), sgd(3 * least, offset=1), sgd(3 * least, settings="plain", velocity=False),
        gather(2 * rows, 47, offset=1, index="out of range"), gather(rows, 49, noise_sigma=0.5, affine=True),
        softmax_cross_entropy(rows, 47, padding=1, confusion=True), gather(2 * rows, 47, begin=str(rows)),
        shuffle(least // 8 + 1, seed=2), to_bfloat16(6 * least), average(4 * least + 1),
        gather(rows, 49, noise_sigma=0.5, augment=AUGMENT, noise_uniform=True, draw=1),
        softmax_cross_entropy(rows, 47, smoothing=0.1, weighted=True),
        batch_norm_stats(4 * rows, 47, running=True), norm_act("gelu", rows, 47, norm=True, dropout=0.5),
        norm_act_backward("gelu", 3 * rows, 47, norm=True, dropout=0.5),
    ]  # fmt: skip


def every(shapes, sizes, large: bool) -> list[Case]:
    """The representative list, the awkward shapes and sizes, and where execution is fast the large ones."""
    return [*representative(), *_shapes(shapes, sizes), *(_large() if large else ())]
