"""Train an MLP on 28x28 character images: python train.py --model m1 --fused"""

import argparse
import sys
from pathlib import Path

from mlp import InputError, config_file, configs, flags
from mlp.cli import Parser, accept_any_text, complain


def build_parser() -> Parser:
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--list", action="store_true", help="print the presets and leave")
    add("--model", help="preset, one of those of --list (default: m1)")
    add("--config", type=Path, help="file of fields that replace the preset's, as a search's best.json; flags go first")
    add("--backend", help="scratch (NumPy or CuPy) or torch; default: the preset's")
    add("--fused", action="store_true", default=None, help="the fused kernels instead of plain array code or torch's")
    add("--compile", action="store_true", default=None, help="torch: let torch.compile make one graph of a step")
    add("--device", help="auto (default: the GPU where there is one), cpu or cuda")
    add("--data", help="auto (default: EMNIST, else glyphs), emnist, glyphs[:N], or a folder of IDX or .npy files")
    add("--precision", help="of the factors of matrix products: fp32 (default), or on a GPU tf32 or bf16")
    add("--gemm", help="matrix products on a GPU: auto (default), cublaslt, cupy or own")
    add("--memory-limit", type=flags.parse_bytes, help="device memory to use at most, such as 4GB")
    add("--tune", action="store_true", help="time the forms of every layer on this GPU, and remember the fastest")
    add("--explain", action="store_true", help="print what a step does and how, and leave")
    add("--nvtx", action="store_true", help="mark the phases for Nsight Systems")
    add("--out", type=Path, help="folder for the results (default: a new one under runs/)")
    add("--checkpoint-every", type=flags.parse_interval, metavar="EVERY",
        help="write a checkpoint at most every 30s, 5min, 2 (epochs), or never by itself (default: 60s)")  # fmt: skip
    add("--resume", type=Path, metavar="FOLDER", help="go on with the run in FOLDER, as if it had not been interrupted")
    change = parser.add_argument_group("what to change in the preset").add_argument
    change("--epochs", type=int, help="at most so many passes over the training images")
    change("--batch-size", type=flags.parse_batch_size, help="images per step, or 'full': exact full-batch descent")
    change("--lr", type=float, help="learning rate of the first epoch, for a loss that is the mean over the batch")
    change("--hidden", type=flags.parse_hidden, help="widths of the hidden layers, such as 400,240,120")
    change("--activation", help=", ".join(configs.ACTIVATIONS))
    change("--batch-norm", action=argparse.BooleanOptionalAction, default=None, help="in the hidden layers")
    change("--dropout", type=float, help="probability that an output of a hidden layer is dropped")
    change("--optimizer", help=", ".join(configs.OPTIMIZERS))
    change("--momentum", type=float, help="of sgd")
    change("--schedule", help=", ".join(configs.SCHEDULES))
    change("--decay", type=float, help="linear schedule: taken from the learning rate every epoch")
    change("--gamma", type=float, help="exponential schedule: factor of the learning rate every epoch")
    change("--warmup", type=int, help="epochs in which the learning rate rises to its value")
    change("--l2", type=float, help="weight decay, added to the gradient as in torch.optim")
    change("--decoupled", action="store_true", default=None, help="adam: decay the parameters directly, as AdamW")
    change("--label-smoothing", type=float, help="share of the target that is spread over all classes")
    change("--class-balance", type=float, help="0: images count the same; towards 1: classes do (0.999, say)")
    change("--ema", type=float, help="decay of an average of the parameters, which is kept in their place (0.999, say)")
    change("--train-noise", type=float, help="Gaussian noise on training images, of a sigma in [0, this] each")
    change("--augment", type=float, nargs="?", const=1.0, help="random affine maps of training images (strength 1)")
    change("--patience", type=int, help="stop after so many epochs without a lower validation loss")
    change("--seed", type=int, help="of the weights, the batches and the noise")
    find = parser.add_argument_group("a search; what flags and --config decide is not searched").add_argument
    find("--search", type=int, metavar="N", help="try configurations around the preset until N trials are finished")
    find("--study", type=Path, help="SQLite file of the trials, begun or gone on with (default: one under runs/)")
    find("--jobs", type=int, help="processes that search at once (default: 1)")
    return parser


def main(argv=None) -> int:
    try:
        accept_any_text()
        args = vars(build_parser().parse_args(argv))
        if args.pop("list"):
            for name, config in configs.PRESETS.items():
                print(f"{name:5} {configs.describe(config)}")
            return 0
        every, nvtx, folder = args.pop("checkpoint_every"), args.pop("nvtx"), args.pop("resume")
        if folder:
            _refuse_with_resume(args)
            from mlp import run

            return run.resume(folder, run.Options(nvtx=nvtx, interval=every or flags.Interval()))
        return _begin(args, nvtx, every)
    except InputError as error:
        return complain(error)
    except KeyboardInterrupt:  # not while training, which ends in order
        print("error: interrupted", file=sys.stderr)
        return 130


def _begin(args, nvtx, every) -> int:
    """A new run, or a search."""
    model, settings = args.pop("model") or "m1", {name: args.pop(name) for name in ("tune", "explain")}
    search = {name: value for name in ("search", "study", "jobs") if (value := args.pop(name)) is not None}
    file, out = args.pop("config"), args.pop("out")
    given = {name: value for name, value in args.items() if value is not None}
    given = config_file.with_file(file, given) if file else given
    config = configs.from_flags(model, **given)
    if search:
        from mlp.search import run as search_for

        return search_for(config, given, **search, out=out, nvtx=nvtx, checkpoint_every=every, **settings)
    from mlp import run  # NumPy and the rest: only when there is something to compute

    return run.train(config, out, run.Options(nvtx=nvtx, interval=every or flags.Interval(), **settings))


def _refuse_with_resume(args) -> None:
    """InputError for flags that would make the run another one."""
    given = [f"--{name.replace('_', '-')}" for name, value in args.items() if value not in (None, False)]
    if given:
        raise InputError(f"{given[0]} cannot be given with --resume, which goes on with the run as it was begun")


if __name__ == "__main__":
    sys.exit(main())
