"""Look at data, at pictures of your own and at finished runs: python -m mlp explore | predict | compare | verify | study"""

import sys
from importlib import import_module
from pathlib import Path

from . import InputError
from .cli import Parser, accept_any_text, complain


def build_parser() -> Parser:
    parser = Parser(prog="python -m mlp", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False).add_argument

    add = command("explore", "what a data set consists of: classes, samples, means, pixels, split")
    add("--data", default="auto", help="auto (default), emnist, glyphs[:N], or a folder of IDX or .npy files")
    add("--out", type=Path, help="folder for the results (default: runs/explore-<data>)")
    add = command("predict", "which characters are on pictures, by a trained model")
    add("pictures", nargs="+", type=Path, metavar="picture", help="a file with one character, of any size and colours")
    add("--checkpoint", type=Path, required=True, help="checkpoint.npz of a run")
    add("--frame", choices=("emnist", "mnist", "glyphs"), help="how to frame (default: as the model's data set)")
    add("--json", action="store_true", help="print JSON")
    add("--show", type=Path, help="write a picture of what the network saw, beside its answers")
    add = command("compare", "runs side by side, and beside published results")
    add("runs", nargs="+", type=Path, metavar="run", help="a folder that train.py wrote")
    add("--out", type=Path, default=Path("runs/compare"), help="folder for the results (default: runs/compare)")
    add = command("verify", "make a finished run again, and compare the results bit by bit")
    add("run", type=Path, metavar="run", help="a folder that train.py wrote")
    add = command("study", "every model, plain and fused, with several seeds, and what each refinement is worth")
    add("--data", default="glyphs:30000", help="as of train.py (default: glyphs:40000)")
    add("--also", nargs="*", default=[], help="further data sets, for robustness and refinements")
    add("--seeds", type=int, default=3, help="runs of each (default: 3)")
    add("--runs", type=Path, default=Path("runs/study"), help="folder for the runs (default: runs/study)")
    add("--out", type=Path, default=Path("runs/study/report"), help="folder of the report (default: runs/study/report)")
    return parser


def main(argv=None) -> int:
    try:
        accept_any_text()
        args = build_parser().parse_args(argv)
        return import_module(f"mlp.{args.command}").run(args)  # NumPy and the rest: only when there is work
    except InputError as error:
        return complain(error)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
