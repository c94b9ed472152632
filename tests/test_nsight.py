"""profile/nsight.py without a GPU: tools that record how they are called and print what the real ones do."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from mlp import InputError, ranges
from mlp.scratch import ScratchLearner

from .test_compile import entry_points
from .training import ROOT, tree

sys.path.append(str(ROOT / "profile"))
import nsight  # noqa: E402
import nsight_tables as tables  # noqa: E402

# What `ncu --import ... --csv --page raw` of 2024.1 prints, with the lines that a profiling run has around it.
NCU_UNITS = ["byte", "byte/second", "%", "nsecond", "register/thread", "byte/block", "%", "%"]
NCU = """\
==PROF== Connected to process 3662198 (/usr/bin/python3.11)
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes.sum","dram__bytes.sum.per_second","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"gpu__time_duration.sum","launch__registers_per_thread","launch__shared_mem_per_block",\
"sm__maximum_warps_per_active_cycle_pct","sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","","","","","","","","","{}","{}","{}","{}","{}","{}","{}","{}"
"0","3662198","python3.11","127.0.0.1","gather","1","7","(256, 1, 1)","(528, 1, 1)","0","9.0",{}
"1","3662198","python3.11","127.0.0.1","bias_act_relu","1","7","(256, 1, 1)","(200, 2, 1)","0","9.0",{}
==PROF== Disconnected from process 3662198
"""
PLAIN = ('"268457472","376116573951.04","31.10","1420832","24","5120","100","93.89"',
         '"4096","1000000000","0.5","4096","32","1024","100","12.5"')  # fmt: skip
# `nsys stats` of 2023.4; the kernels were put into its database by hand.
NSYS = """\
Generating SQLite file m0.sqlite from m0.nsys-rep
Processing [m0.sqlite] with [/opt/nvidia/nsight-systems/2023.4.4/target-linux-x64/reports/cuda_gpu_kern_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
50.1,36430,10,3643.0,3643.0,3526,3760,78.7,"void Kernel2<sgemm, 8>(T1::Params)"
49.9,36300,10,3630.0,3630.0,3513,3747,78.7,adam

Processing [m0.sqlite] with [/opt/nvidia/nsight-systems/2023.4.4/target-linux-x64/reports/nvtx_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Style,Range
47.4,9559979,3,3186659.7,3170302.0,3166316,3223361,31846.7,PushPop,mlp:step
5.6,1123776,1,1123776.0,1123776.0,1123776,1123776,0.0,PushPop,mlp:idle

Processing [m0.sqlite] with [/opt/nvidia/nsight-systems/2023.4.4/target-linux-x64/reports/nvtx_gpu_proj_sum.py]...
Range,Style,Total Proj Time (ns),Total Range Time (ns),Range Instances,Proj Avg (ns),Proj Med (ns),Proj Min (ns)
mlp:step,PushPop,6347144,9559979,3,2115714.7,2100416.0,2095231
"""
DENIED = """\
==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters on the target \
device 0. For instructions on enabling permissions and to get more information see \
https://developer.nvidia.com/ERR_NVGPUCTRPERM
"""

FAKE = """#!{python}
import json, os, pathlib, subprocess, sys
words, tool, how = sys.argv[1:], pathlib.Path(sys.argv[0]).name, json.loads(os.environ["FAKE"])
if words == ["--version"]:
    sys.exit(print("NVIDIA Nsight Something version 2024.1.1.0-x (build 1)"))
with open(os.environ["FAKE_LOG"], "a") as file:
    file.write(json.dumps(words) + chr(10))
if "--import" in words or words[0] == "stats":
    sys.exit(print(how["table"], end=""))
child = words[words.index(sys.executable):]
if how.get("run"):
    print("==PROF== Connected to process 7")
    assert subprocess.call(child) == 0
print(how.get("out", ""))
print(how.get("err", ""), file=sys.stderr)
if how.get("report", True):
    words = [word.removeprefix("--output=") for word in words if word.startswith("--output=")] or [
        words[words.index("--export") + 1]]
    pathlib.Path(words[0] + "." + tool + "-rep").write_text(how.get("text", "a report"))
sys.exit(how.get("code", 0))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(tool, **behaviour) puts such a tool ahead on the PATH; the words of its calls are in fake.calls()."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(log))

    def install(tool, **how):
        how = {"table": NSYS if tool == "nsys" else NCU.format(*NCU_UNITS, *PLAIN)} | how
        monkeypatch.setenv("FAKE", json.dumps(how))
        (folder / tool).write_text(FAKE.format(python=sys.executable))
        (folder / tool).chmod(0o755)

    install.calls = lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return install


@pytest.fixture
def main(tmp_path):
    """Profile a small m0 on the CPU into tmp_path / "out"."""
    return lambda *arguments: nsight.main(
        [*arguments, "--model", "m0", "--device", "cpu", "--images", "2000", "--out", str(tmp_path / "out")]
    )


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_timeline_through_every_process(tmp_path, fake, main):
    fake("nsys", run=True)
    assert main("nsys") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["m0-fused.nsys-rep", "nsys_kernels.csv", "nsys_ranges.csv"]
    gemm, adam = read(out / "nsys_kernels.csv")
    assert gemm["kernel"] == "void Kernel2<sgemm, 8>(T1::Params)" and adam["kernel"] == "adam"
    assert (adam["calls"], adam["total_us"], adam["median_us"]) == ("10", "36.3", "3.63")
    step, idle = read(out / "nsys_ranges.csv")
    assert step["range"] == "mlp:step" and step["calls"] == "3"
    assert (step["total_us"], step["median_us"]) == ("9559.979", "3170.302")
    assert (step["gpu_total_us"], step["gpu_median_us"]) == ("6347.144", "2100.416")
    assert (idle["range"], idle["gpu_total_us"], idle["gpu_median_us"]) == ("mlp:idle", "", "")
    for row in (adam, step):
        assert (row["model"], row["contender"], row["batch"]) == ("m0", "fused", "256")
        assert row["data"] == "synthetic bytes, 2000 images" and row["device"] and row["date"] and row["revision"]
        assert row["tool"] == "nsys 2024.1.1.0" and "numpy " in row["versions"]
    record, export = fake.calls()
    assert record[0] == "profile" and export[0] == "stats"
    assert {"--trace=cuda,nvtx,cublas", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--sample=none",
            "--cpuctxsw=none", "--cuda-graph-trace=node", "--force-overwrite=true"} <= set(record)  # fmt: skip
    assert pairs(export) >= {("--report", "cuda_gpu_kern_sum,nvtx_sum,nvtx_gpu_proj_sum"), ("--format", "csv"),
                             ("--output", "-")}  # fmt: skip
    assert export[-1] == str(out / "m0-fused.nsys-rep")


def test_counters_through_every_process(tmp_path, fake, main):
    fake("ncu", run=True)
    assert main("ncu") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["m0-fused.ncu-rep", "ncu.csv"]
    gather, relu = read(tmp_path / "out" / "ncu.csv")
    assert [gather[name] for name in ("launch", "kernel", "grid", "block")] == ["1", "gather", "528x1x1", "256x1x1"]
    assert [relu[name] for name in ("launch", "kernel", "grid")] == ["2", "bias_act_relu", "200x2x1"]
    assert [gather[column] for column in tables.METRICS] == [
        "1420.832", "376.116573951", "31.1", "268457472", "93.89", "100", "24", "5120",
    ]  # fmt: skip
    assert gather["tool"] == "ncu 2024.1.1.0"
    record, export = fake.calls()
    metrics = ",".join(metric for metric, _ in tables.METRICS.values())
    assert pairs(record) >= {("--profile-from-start", "off"), ("--clock-control", "none"), ("--metrics", metrics),
                             ("--cache-control", "none"), ("--kernel-name", nsight.OURS)}  # fmt: skip
    assert "--force-overwrite" in record and "--csv" in export
    assert pairs(export) >= {("--import", str(tmp_path / "out" / "m0-fused.ncu-rep")), ("--page", "raw")}


def pairs(words):
    return set(zip(words, words[1:]))


def test_all_kernels_lifts_the_filter(fake, main):
    fake("ncu")
    assert main("ncu", "--contender", "plain", "--all-kernels") == 0
    assert "--kernel-name" not in fake.calls()[0]


def test_the_filter_names_our_kernels_and_no_others():
    ours = set(entry_points())
    assert {"gather", "shuffle", "advance", "to_bfloat16"} < ours
    ours |= {"gemm_forward_tf32_64", "gemm_input_gradient_bf16_128", "gemm_weight_gradient_tf32_64"}
    pattern = re.compile(nsight.OURS.removeprefix("regex:"))
    assert [name for name in ours if not pattern.search(name)] == []
    for stranger in ("ampere_sgemm_128x64_nn", "gemmSN_NN_kernel", "sm80_xmma_gemm_forward", "cupy_shuffle",
                     "cupy_copy__float32_float32", "gather_kernel", "multi_tensor_adam"):  # fmt: skip
        assert not pattern.search(stranger)


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_print_shows_what_would_be_run(tmp_path, fake, main, capsys, tool):
    fake(tool)
    assert main(tool, "--print") == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert fake.calls() == [] and not (tmp_path / "out").exists()
    assert main(tool) == 0
    scratch = re.compile("/nsight-[^/]+(?=/m0-fused)")
    called = [[scratch.sub("", word) for word in words] for words in fake.calls()]
    assert printed == [[str(tmp_path / "bin" / tool), *words] for words in called]
    assert nsight.main([tool, "--out", str(tmp_path), "--print"]) == 0  # without a GPU, too


def test_rows_of_other_contenders_stay(tmp_path, fake, main):
    fake("ncu")
    for contender in ("fused", "plain", "fused"):
        assert main("ncu", "--contender", contender, "--all-kernels") == 0
    rows = read(tmp_path / "out" / "ncu.csv")
    assert [row["contender"] for row in rows] == ["plain", "plain", "fused", "fused"]


SAME = ("1420.832", "376.116573951", "31.1", "268457472", "93.89", "100", "24", "5120")


@pytest.mark.parametrize(
    ("units", "values"),
    [
        (NCU_UNITS, '"268,457,472","376,116,573,951","31.10","1,420,832","24","5,120","100","93.89"'),
        (["Mbyte", "Gbyte/second", "%", "msecond", "register/thread", "Kbyte/block", "%", "%"],
         '"268.457472","376.116573951","31.10","1.420832","24.000000","5.120000","100.000000","93.890000"'),
        (["Kbyte", "Gbyte/s", "%", "us", "register/thread", "Kbyte/block", "%", "%"],
         '"268,457.472","376.116573951","31.10","1,420.832","24","5.12","100","93.89"'),
        (["Gbyte", "Tbyte/s", "%", "s", "register/thread", "byte/block", "%", "%"],
         '"0.268457472","0.376116573951","31.1","0.001420832","24","5120","100","93.89"'),
    ],
)  # fmt: skip
def test_ncu_values_are_converted_by_the_row_of_units(units, values):
    row = tables.ncu_rows(NCU.format(*units, values, values))[1]
    assert tuple(row[column] for column in tables.METRICS) == SAME


@pytest.mark.parametrize("missing", ["n/a", "", "nan", "inf"])
def test_a_value_that_ncu_has_not_stays_empty(missing):
    values = f'"{missing}","{missing}","{missing}","4096","32","1024","100","12.5"'
    row = tables.ncu_rows(NCU.format(*NCU_UNITS, values, values))[0]
    assert (row["dram_bytes"], row["dram_gb_per_s"], row["dram_percent"], row["duration_us"]) == ("", "", "", "4.096")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NCU.format(*NCU_UNITS[:3], "fortnight", *NCU_UNITS[4:], *PLAIN), "cannot read '1420832' 'fortnight'"),
        (NCU.format(*NCU_UNITS, '"x","1","1","1","1","1","1","1"', PLAIN[1]), "cannot read 'x' 'byte'"),
        (NCU.replace("gpu__time_duration.sum", "other").format(*NCU_UNITS, *PLAIN), "printed no kernel launches"),
        (re.sub('\n"[01]".*', "", NCU).format(*NCU_UNITS), "printed no kernel launches"),
        ("==WARNING== No kernels were profiled.\n", "printed no kernel launches"),
    ],
)
def test_what_ncu_should_not_print_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        tables.ncu_rows(text)


def test_nsys_times_are_converted_by_the_unit_in_the_header():
    in_ms = NSYS.replace("(ns)", "(ms)").replace("36300,10,3630.0,3630.0", "0.0363,10,0.00363,0.00363")
    assert tables.nsys_kernels(in_ms)[1] == {"kernel": "adam", "calls": "10", "total_us": "36.3", "median_us": "3.63"}


def test_a_timeline_without_ranges_is_refused_and_leaves_its_kernels(tmp_path, fake, main, capsys):
    fake("nsys", table=re.sub(".*mlp:.*\n", "", NSYS))
    assert main("nsys") == 2
    assert "printed no NVTX ranges, as happens where Nsight Systems is older" in capsys.readouterr().err
    assert len(read(tmp_path / "out" / "nsys_kernels.csv")) == 2
    assert (tmp_path / "out" / "m0-fused.nsys-rep").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"out": DENIED, "code": 1}, "(ERR_NVGPUCTRPERM); have yours load it with the option NVreg_RestrictProfiling"),
        ({"err": DENIED, "report": False}, "administrators only (ERR_NVGPUCTRPERM)"),
        ({"err": "a line\nerror: no room", "out": "==ERROR== The application returned an error code (2).", "code": 1},
         "ncu ended with status 1: no room"),
        ({"out": "==ERROR== Failed to find metric x\n==WARNING== No kernels were profiled.", "code": 1},
         "ncu ended with status 1: Failed to find metric x"),
        ({"code": 9}, "ncu ended with status 9: it said nothing"),
        ({"out": "==WARNING== No kernels were profiled.", "report": False},
         "ncu recorded nothing and wrote no report; it said: No kernels were profiled."),
    ],
)  # fmt: skip
def test_a_failure_is_one_sentence_and_costs_nothing(tmp_path, fake, main, capsys, how, message):
    fake("ncu", text="the first")
    assert main("ncu") == 0
    before = tree(tmp_path / "out")
    fake("ncu", text="the second", **how)
    capsys.readouterr()
    assert main("ncu") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert tree(tmp_path / "out") == before


def test_a_report_whose_figures_cannot_be_read_is_kept(tmp_path, fake, main, capsys):
    fake("ncu")
    assert main("ncu") == 0
    fake("ncu", text="the second", table="nonsense")
    assert main("ncu") == 2 and "printed no kernel launches" in capsys.readouterr().err
    assert (tmp_path / "out" / "m0-fused.ncu-rep").read_text() == "the second"
    assert len(read(tmp_path / "out" / "ncu.csv")) == 2


def test_a_file_with_other_columns_is_not_touched(tmp_path, fake, main, capsys):
    fake("ncu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ncu.csv").write_text("model,contender\nm1,fused\n")
    assert main("ncu") == 2 and "ncu.csv has other columns" in capsys.readouterr().err
    assert (tmp_path / "out" / "ncu.csv").read_text() == "model,contender\nm1,fused\n"


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without the tools; returns the folder that stands for /opt/nvidia."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(nsight, "CUDA_BIN", tmp_path / "cuda")
    monkeypatch.setattr(nsight, "OPT", tmp_path / "opt")
    return tmp_path / "opt"


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_a_missing_tool(tmp_path, nowhere, main, capsys, tool):
    assert main(tool) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tool} is neither on the PATH nor in {tmp_path / 'cuda'} nor below {nowhere};")
    assert error.count("\n") == 1 and "comes with the CUDA toolkit" in error and not (tmp_path / "out").exists()
    assert main(tool, "--print") == 0  # the command can be shown all the same


def test_the_newest_version_is_found_where_nvidia_installs_it(tmp_path, nowhere):
    def install(path):
        path.parent.mkdir(parents=True)
        path.touch()
        return str(path)

    inside = install(nowhere / "nsight-compute" / "2024.1.1" / "host" / "target-linux-x64" / "nsys")
    assert nsight.find("nsys") == inside and nsight.find("ncu") is None
    install(nowhere / "nsight-systems" / "2024.6.2" / "bin" / "nsys")
    newest = install(nowhere / "nsight-systems-cli" / "2024.10.1" / "bin" / "nsys")
    ncu = install(nowhere / "nsight-compute" / "2025.3.0" / "ncu")
    assert nsight.find("nsys") == newest and nsight.find("ncu") == ncu
    first = install(tmp_path / "cuda" / "nsys")
    assert nsight.find("nsys") == first


def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path, fake):
    fake("ncu")
    command = [sys.executable, str(ROOT / "profile" / "nsight.py"), "ncu", "--out", str(tmp_path / "out")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and fake.calls() == [] and not (tmp_path / "out").exists()
    assert result.stderr.startswith("error: there is no GPU to profile: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [("ncu", "--contender", "plain"), ("nsys", "--all-kernels"), ("perf",), ("nsys", "--model", "m99")]
)
def test_what_it_cannot_do_is_refused(fake, capsys, arguments):
    fake("nsys")
    try:
        code = nsight.main([*arguments, "--device", "cpu"])
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and "error: " in capsys.readouterr().err and fake.calls() == []


@pytest.fixture
def events(monkeypatch):
    """What a child does, in order: True and False for the profiler's start and stop, ranges attached, which launches
    steps op by op, training, validations, epochs."""
    happened, attach = [], ranges.attach
    monkeypatch.setattr(ranges, "attach", lambda *args: happened.append("attach") or attach(*args))
    monkeypatch.setattr(nsight, "switch", lambda device, on: happened.append(on))
    for name in ("train", "train_step", "evaluate"):
        method = getattr(ScratchLearner, name)
        monkeypatch.setattr(
            ScratchLearner, name, lambda *args, name=name, method=method: happened.append(name) or method(*args)
        )

    @contextmanager
    def annotate(name):
        if name == "epoch":
            happened.append("epoch")
        yield

    monkeypatch.setattr(ranges, "nvtx_annotate", lambda: annotate)
    return happened


def run_child(tool, contender="fused"):
    arguments = ["--model", "m0", "--contender", contender, "--device", "cpu", "--images", "2000", "--child"]
    return nsight.main([tool, *arguments])


@pytest.mark.parametrize("contender", ["plain", "fused"])
def test_the_child_records_one_step_after_the_warm_up(events, contender):
    assert run_child("ncu", contender) == 0
    assert events == ["attach", *["train_step"] * nsight.WARM_UP, True, "train_step", False] and nsight.WARM_UP > 2


def test_the_child_records_the_second_epoch(events):
    assert run_child("nsys") == 0
    epoch = ["epoch", *["train"] * 6, "evaluate"]  # 70 % of 2000 images in batches of 256
    assert events == ["attach", *epoch, True, *epoch, False]


def test_our_own_products_need_a_gpu(events, capsys):
    assert run_child("ncu", "own") == 2 and events == []
    assert "--precision tf32 needs a GPU" in capsys.readouterr().err


def test_a_training_that_diverges_is_no_timeline(events, monkeypatch, capsys):
    monkeypatch.setattr(ScratchLearner, "totals", lambda learner: (float("nan"), 0))
    assert run_child("nsys") == 2
    assert "the training diverged before" in capsys.readouterr().err and False not in events


def test_the_child_trains_the_torch_contender(monkeypatch):
    from mlp.torch_models import TorchLearner

    steps, train_step = [], TorchLearner.train_step
    monkeypatch.setattr(TorchLearner, "train_step", lambda *args: steps.append(1) or train_step(*args))
    assert run_child("ncu", "torch") == 0
    assert len(steps) == nsight.WARM_UP + 1


def test_the_switch_waits_for_the_gpu_and_does_nothing_on_a_cpu():
    calls = []
    names = ("deviceSynchronize", "profilerStart", "profilerStop")
    runtime = SimpleNamespace(**{name: lambda name=name: calls.append(name) for name in names})
    gpu = SimpleNamespace(kind="cuda", xp=SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    nsight.switch(gpu, on=True)
    nsight.switch(gpu, on=False)
    nsight.switch(SimpleNamespace(kind="cpu"), on=True)
    assert calls == ["deviceSynchronize", "profilerStart", "deviceSynchronize", "profilerStop"]


def test_the_commands_of_the_page_are_understood():
    page = (ROOT / "profile" / "README.md").read_text()
    commands = re.findall(r"^python profile/nsight\.py ([^#\n]+)", page, re.MULTILINE)
    assert {"nsys", "ncu"} <= {command.split()[0] for command in commands}
    for command in commands:
        nsight.arguments(shlex.split(command))
