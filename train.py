"""Train an MLP on 28x28 character images: python train.py --model m1 --fused"""

import sys
from pathlib import Path

from mlp import InputError, configs
from mlp.cli import Parser


def build_parser() -> Parser:
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--list", action="store_true", help="print the presets and leave")
    add("--model", default="m1", help="preset, one of those of --list (default: m1)")
    add("--fused", action="store_true", help="use the fused kernels instead of plain array code")
    add("--device", help="auto (default: the GPU where there is one), cpu or cuda")
    add("--data", help="auto (default: EMNIST, else glyphs), emnist, glyphs[:N], or a folder of IDX or .npy files")
    add("--precision", help="of the factors of matrix products: fp32 (default), or on a GPU tf32 or bf16")
    add("--gemm", help="matrix products on a GPU: auto (default), cublaslt, cupy or own")
    add("--memory-limit", type=configs.parse_bytes, help="device memory to use at most, such as 4GB")
    add("--tune", action="store_true", help="time the forms of every layer on this GPU, and remember the fastest")
    add("--explain", action="store_true", help="print what a step does and how, and leave")
    add("--nvtx", action="store_true", help="mark the phases for Nsight Systems")
    add("--out", type=Path, help="folder for the results (default: a new one under runs/)")
    change = parser.add_argument_group("what to change in the preset").add_argument
    change("--epochs", type=int, help="at most so many passes over the training images")
    change("--batch-size", type=configs.parse_batch_size, help="images per step, or 'full': exact full-batch descent")
    change("--lr", type=float, help="learning rate of the first epoch, for a loss that is the mean over the batch")
    change("--hidden", type=configs.parse_hidden, help="widths of the hidden layers, such as 400,240,120")
    change("--activation", help=", ".join(configs.ACTIVATIONS))
    change("--optimizer", help=", ".join(configs.OPTIMIZERS))
    change("--momentum", type=float, help="of sgd")
    change("--schedule", help=", ".join(configs.SCHEDULES))
    change("--decay", type=float, help="linear schedule: taken from the learning rate every epoch")
    change("--gamma", type=float, help="exponential schedule: factor of the learning rate every epoch")
    change("--l2", type=float, help="weight decay, added to the gradient as in torch.optim")
    change("--decoupled", action="store_true", default=None, help="adam: decay the parameters directly, as AdamW")
    change("--patience", type=int, help="stop after so many epochs without a lower validation loss")
    change("--seed", type=int, help="of the weights, the batches and the noise")
    return parser


def main(argv=None) -> int:
    try:
        args = vars(build_parser().parse_args(argv))
        if args.pop("list"):
            for name, config in configs.PRESETS.items():
                print(f"{name:5} {configs.describe(config)}")
            return 0
        model, settings = args.pop("model"), {name: args.pop(name) for name in ("out", "nvtx", "tune", "explain")}
        config = configs.from_flags(model, **{name: value for name, value in args.items() if value is not None})
        from mlp import run  # NumPy and the rest: only when there is something to compute

        return run.train(config, **settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # not while training, which ends in order
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
