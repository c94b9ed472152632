"""Look at training with NVIDIA's profilers; profile/README.md says how to read what they show.

    python profile/nsight.py nsys --contender plain    # Nsight Systems: the timeline of one epoch
    python profile/nsight.py nsys --contender fused
    python profile/nsight.py ncu                       # Nsight Compute: every kernel of ours in one fused step

The tool runs this script again, which trains on synthetic bytes of ByMerge's shape: first to warm up, unrecorded, then
between cudaProfilerStart and cudaProfilerStop. Its steps are launched op by op, as with train.py --nvtx, because phases
and kernels have no names in the launch of a CUDA graph. The contender `own` is fused with our own matrix products, in
TF32. The folder gets the tool's report <model>-<contender>.nsys-rep or .ncu-rep, and its figures as nsys_kernels.csv
and nsys_ranges.csv or ncu.csv, a file for all models and contenders.
"""

import argparse
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import machine
import nsight_tables as tables
import step_contenders

from kernels import BackendError, cuda
from mlp import InputError, configs, ranges
from mlp.data import stratified_split
from mlp.device import select
from mlp.loop import fit
from mlp.run import make_learner

IMAGES = 809_555  # of which 70 % are trained on
WARM_UP = 20  # steps before the one that ncu records
NAMES = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}
CUDA_BIN, OPT = Path("/usr/local/cuda/bin"), Path("/opt/nvidia")  # where NVIDIA's installers put them
IN_OPT = {"nsys": ("nsight-*/*/bin/nsys", "nsight-*/*/host/target-linux-*/nsys"), "ncu": ("nsight-*/*/ncu",)}
OURS = (  # the kernels of kernels/src/module.cu
    "regex:^((bias|norm)_act_[a-z_]+|batch_norm_stats|norm_input_gradient|softmax_xent_[0-9]+|adam|sgd|average"
    "|gather(_augmented)?|shuffle|advance|to_bfloat16|gemm_(forward|input_gradient|weight_gradient)_[a-z0-9_]+)$"
)
CONTENDERS = {  # what differs from the preset
    "plain": {}, "fused": {"fused": True}, "own": {"fused": True, "gemm": "own", "precision": "tf32"}, "torch": {},
}  # fmt: skip


def switch(device, on: bool) -> None:
    """cudaProfilerStart or cudaProfilerStop, when the GPU has done what it was given; nothing on a CPU."""
    if device.kind == "cuda":
        runtime = device.xp.cuda.runtime
        runtime.deviceSynchronize()
        (runtime.profilerStart if on else runtime.profilerStop)()


def one_epoch(learner, split, config, device) -> None:
    """Train and validate two epochs, of which the second is recorded, with its NVTX ranges."""
    annotate = ranges.nvtx_annotate()
    ranges.attach(learner, annotate)  # launches op by op

    def after_epoch(history):
        switch(device, on=len(history.rows) == 1)

    history = fit(learner, split, config, on_epoch=after_epoch, annotate=annotate)
    if history.outcome != "finished":
        raise InputError(f"the training {history.outcome} before the epoch was over; profile again")


def one_step(learner, split, config, device) -> None:
    """Train WARM_UP steps and one more, which is recorded."""
    ranges.attach(learner, lambda name: nullcontext())  # launches op by op
    batch = learner.batch_size
    learner.begin_epoch(split.train, 1)
    for k in range(WARM_UP + 1):
        start = k * batch % (len(split.train) - batch + 1)
        if k == WARM_UP:
            switch(device, on=True)
        learner.train_step(start, start + batch, config.lr)
    switch(device, on=False)


def child(args) -> None:
    """What the tool runs."""
    config = configs.preset(args.model, epochs=2, device=args.device, **CONTENDERS[args.contender])
    device, data = select(args.device, config.fused), step_contenders.synthetic_data(args.images)
    split = stratified_split(data.labels)
    if args.contender == "torch":
        learner = step_contenders.learner(step_contenders.EAGER, config, data, device)
    else:
        learner, _ = make_learner(config, data, device, len(split.train))
    {"nsys": one_epoch, "ncu": one_step}[args.tool](learner, split, config, device)


def find(tool: str) -> str | None:
    """The program: from the PATH, else where NVIDIA's installers put it, the newest version first."""
    in_opt = [path for pattern in IN_OPT[tool] for path in OPT.glob(pattern)]
    in_opt.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", str(path))], reverse=True)
    return shutil.which(tool) or next((str(path) for path in (CUDA_BIN / tool, *in_opt) if path.exists()), None)


def record_command(tool: str, args, report: Path) -> list[str]:
    """The command that writes `report`. The tools add its suffix themselves."""
    child = [sys.executable, str(Path(__file__).resolve()), args.tool, "--child", "--model", args.model]
    child += ["--contender", args.contender, "--device", args.device, "--images", str(args.images)]
    if args.tool == "nsys":
        return [tool, "profile", "--trace=cuda,nvtx,cublas", "--cuda-graph-trace=node", "--sample=none",
                "--cpuctxsw=none", "--capture-range=cudaProfilerApi", "--capture-range-end=stop",
                "--force-overwrite=true", f"--output={report.with_suffix('')}", *child]  # fmt: skip
    kernels = [] if args.all_kernels else ["--kernel-name", OURS]
    metrics = ",".join(metric for metric, _ in tables.METRICS.values())
    as_in_training = ["--clock-control", "none", "--cache-control", "none"]
    return [tool, "--profile-from-start", "off", *as_in_training, *kernels, "--metrics", metrics,
            "--force-overwrite", "--export", str(report.with_suffix("")), *child]  # fmt: skip


def export_command(tool: str, args, report: Path, scratch: Path) -> list[str]:
    """The command that prints the figures of `report` as CSV."""
    if args.tool == "nsys":
        reports = "cuda_gpu_kern_sum,nvtx_sum,nvtx_gpu_proj_sum"
        return [tool, "stats", "--report", reports, "--format", "csv", "--output", "-", "--force-export=true",
                "--sqlite", str(scratch / f"{report.stem}.sqlite"), str(report)]  # fmt: skip
    return [tool, "--import", str(report), "--csv", "--page", "raw", "--print-units", "base",
            "--print-kernel-base", "function"]  # fmt: skip


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run a tool; InputError with what it, or the child under it, said last where it failed."""
    print("$", shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise InputError(
            "the driver shows its performance counters to administrators only (ERR_NVGPUCTRPERM); have yours load it "
            "with the option NVreg_RestrictProfilingToAdminUsers=0, or run this as root (in a container: SYS_ADMIN)"
        )
    if done.returncode:
        raise InputError(f"{Path(command[0]).name} ended with status {done.returncode}: {reason(done)}")
    return done


def reason(done: subprocess.CompletedProcess) -> str:
    """Why nothing came of it: what the child said last where it failed, else the tool's last error or line."""
    child = [line for line in done.stderr.splitlines() if done.returncode and not line.startswith("==")]
    lines = (done.stdout + "\n" + done.stderr).splitlines()
    errors = [line for line in lines if line.startswith("==ERROR==")]
    said = machine.last_line(child) or machine.last_line(errors) or machine.last_line(lines) or "it said nothing"
    return re.sub("^(==[A-Z]+==|error:) ", "", said)


def profile(args) -> None:
    """Record, keep the report, and write its figures."""
    tool = find(args.tool)
    if tool is None and not args.print:
        raise InputError(
            f"{args.tool} is neither on the PATH nor in {CUDA_BIN} nor below {OPT}; it is {NAMES[args.tool]}, which "
            "comes with the CUDA toolkit and by itself from NVIDIA"
        )
    tool, batch = tool or args.tool, configs.preset(args.model).batch_size
    folder = args.out or machine.results_folder(device_name(args))
    report = folder / f"{args.model}-{args.contender}.{args.tool}-rep"
    if args.print:
        print(shlex.join(record_command(tool, args, report)))
        print(shlex.join(export_command(tool, args, report, folder)))
        return
    what, about = {"model": args.model, "contender": args.contender, "batch": batch}, facts(args, tool)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nsight-", dir=folder) as scratch:
        fresh = Path(scratch) / report.name
        done = run(record_command(tool, args, fresh))
        if not fresh.exists():
            raise InputError(f"{args.tool} recorded nothing and wrote no report; it said: {reason(done)}")
        fresh.replace(report)
        print(f"written to {report}")
        text = run(export_command(tool, args, report, Path(scratch))).stdout
    for file, read in tables.FILES[args.tool].items():
        tables.write(folder / file, [what | row | about for row in read(text)])


def device_name(args) -> str:
    """The GPU's name; InputError where there is none. Makes no CUDA context: the GPU may allow one process only."""
    if args.device == "cpu":
        return platform.machine()
    try:
        cuda.check()
    except BackendError as error:
        raise InputError(f"there is no GPU to profile: {error}") from None
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()


def facts(args, tool: str) -> dict:
    """The last columns of every result file: what was measured, and with what."""
    version = re.search(r"ersion ([\d.]*\d)", machine.said(tool, "--version"))
    about = {"data": f"synthetic bytes, {args.images} images", "tool": f"{args.tool} {version[1] if version else ''}"}
    return about | machine.facts(device_name(args), args.device)


def arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tool", choices=tuple(NAMES), help="nsys: timeline of an epoch; ncu: counters of a step's kernels")
    add("--model", default="m1", help="a preset of train.py (default: m1)")
    add("--contender", choices=tuple(CONTENDERS), default="fused", help="who trains (default: fused)")
    add("--all-kernels", action="store_true", help="ncu: not only ours; the matrix products, too")
    add("--out", type=Path, help="folder of the reports (default: profile/results/<gpu>)")
    add("--print", action="store_true", help="print the commands that would be run, and leave")
    add("--child", action="store_true", help=argparse.SUPPRESS)  # this is the process that is profiled
    add("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)  # cpu: for the tests
    add("--images", type=int, default=IMAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.all_kernels and args.tool != "ncu":
        parser.error("--all-kernels belongs to ncu; nsys records every kernel")
    if args.tool == "ncu" and args.contender in ("plain", "torch") and not (args.all_kernels or args.child):
        parser.error(f"--contender {args.contender} launches no kernel of ours; give --all-kernels, too")
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    try:
        child(args) if args.child else profile(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
