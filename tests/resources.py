"""What the GPU kernels use: registers, shared memory, stack and spills, as the compilers report them.

`python -m tests.resources` prints the table: NVRTC's, and nvcc's where there is one. Budgets are in budget.toml.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from kernels import cuda, source
from kernels.launches import THREADS

VERBOSE = "--ptxas-options=-v"
REGISTERS = 65536  # of a multiprocessor, on every architecture here; a warp gets a multiple of 256
# Threads and bytes of shared memory that a multiprocessor holds (CUDA C++ Programming Guide, compute capabilities).
THREAD_LIMIT = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
SHARED_LIMIT = {arch: kib * 1024 for arch, kib in
                {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}.items()}  # fmt: skip
SHARED_RESERVED = 1024  # per block, by the system, from 8.0 on

_REPORT = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel on one architecture: registers per thread, the others in bytes."""

    kernel: str
    architecture: int
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int

    def resident_blocks(self) -> int:
        """Blocks of THREADS threads that a multiprocessor holds at once."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // per_warp // (THREADS // 32)
        shared = self.shared + (SHARED_RESERVED if self.architecture >= 80 else 0)
        by_shared = SHARED_LIMIT[self.architecture] // max(1, shared)
        return min(room(self.architecture), by_registers, by_shared)


def room(architecture: int) -> int:
    """Blocks of THREADS threads that a multiprocessor holds, whatever they use."""
    return THREAD_LIMIT[architecture] // THREADS


def allowed_registers(blocks: int) -> int:
    """Registers per thread with which a multiprocessor holds so many blocks."""
    return min(255, REGISTERS // (blocks * THREADS) // 8 * 8)


def parse(log: str) -> list[Usage]:
    """The kernels in a report of ptxas -v, which NVRTC puts into its log."""
    usages = []
    for kernel, architecture, stack, stores, loads, registers, rest in _REPORT.findall(log):
        shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", rest)
        numbers = map(int, (architecture, stack, stores, loads, registers, shared[1] if shared else 0))
        usages.append(Usage(kernel, *numbers))
    return usages


def warnings(log: str) -> str:
    """What a compiler's log says beyond that report."""
    report = re.compile(r"ptxas info\b|(ptxas +\.)? *\d+ bytes stack frame")
    lines = (line for line in log.strip("\0\n ").splitlines() if not report.match(line))
    return "\n".join(line for line in lines if line.strip())


def budgets() -> dict:
    """The tables of budget.toml."""
    return tomllib.loads((Path(__file__).parent / "budget.toml").read_text())


def budget_name(kernel: str) -> str | None:
    """The name of the kernel's table in budget.toml."""
    return max((name for name in budgets() if kernel.startswith(name)), key=len, default=None)


def faults(usage: Usage, budget: dict) -> list[str]:
    """A sentence for everything in which a kernel exceeds its budget."""
    blocks = min(budget["blocks"], room(usage.architecture))
    bounds = {
        "registers per thread": (usage.registers, allowed_registers(blocks)),
        "bytes of static shared memory": (usage.shared, budget["shared"]),
        "bytes of stack": (usage.stack, 0),
        "bytes of spill stores": (usage.spill_stores, 0),
        "bytes of spill loads": (usage.spill_loads, 0),
    }
    where = f"{usage.kernel} on sm_{usage.architecture}"
    found = [
        f"{where} uses {used} {what}, and budget.toml allows {most}"
        for what, (used, most) in bounds.items()
        if used > most
    ]
    resident = usage.resident_blocks()
    if not found and resident < blocks:
        found = [f"{where} leaves room for {resident} resident blocks, and budget.toml counts on {blocks}"]
    return found


def compile_nvrtc(text: str, *options: str) -> tuple[bytes, str]:
    """The PTX or cubin of a program, and the log; RuntimeError with the log where it does not compile."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(text, "module.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(nvrtc.getProgramLog(program) or str(error)) from None
        return nvrtc.getPTX(program), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def nvrtc_log(text: str, architecture: int) -> str:
    """NVRTC's log, report included, of compiling as cuda.py does."""
    options = cuda.OPTIONS + cuda.CUPY_OPTIONS
    return compile_nvrtc(text, *options, f"-arch=sm_{architecture}", VERBOSE)[1]


def cmake() -> str | None:
    """The path of CMake: that of this environment, else the system's."""
    return shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def nvcc_log(folder: Path) -> str:
    """nvcc's log, report included, of building folder/module.fatbin ahead of time as CMakeLists.txt does."""
    definitions = [f"-DNVCC={shutil.which('nvcc')}", f"-DOUTPUT={folder / 'module.fatbin'}"]
    environment = os.environ | {"NVCC_APPEND_FLAGS": f"-Xptxas -v {os.environ.get('NVCC_APPEND_FLAGS', '')}"}
    result = subprocess.run(
        [cmake(), *definitions, "-P", str(source.DIRECTORY / "fatbin.cmake")],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(result.stdout)
    return result.stdout


def _print_table(compiler: str, usages: list[Usage]) -> None:
    print(f"\n{compiler}: registers / bytes of shared memory / of stack / of spills / resident blocks")
    print("kernel".ljust(28), *(f"sm_{a}".rjust(16) for a in cuda.ARCHITECTURES))
    cells = {(u.kernel, u.architecture): f"{u.registers}/{u.shared}/{u.stack}/{u.spill_stores + u.spill_loads}/"
             f"{u.resident_blocks()}" for u in usages}  # fmt: skip
    for kernel in sorted({u.kernel for u in usages}):
        print(kernel.ljust(28), *(cells.get((kernel, a), "").rjust(16) for a in cuda.ARCHITECTURES))


def main() -> None:
    """Print the table of every compiler on this machine, and what exceeds its budget."""
    from cupy_backends.cuda.libs import nvrtc

    text = source.inlined("module.cu")
    known = [a for a in cuda.ARCHITECTURES if a in nvrtc.getSupportedArchs()]
    tables = {"NVRTC {}.{}".format(*nvrtc.getVersion()): [u for a in known for u in parse(nvrtc_log(text, a))]}
    if cmake() and shutil.which("nvcc"):
        with tempfile.TemporaryDirectory() as folder:
            tables["nvcc"] = parse(nvcc_log(Path(folder)))
    for compiler, usages in tables.items():
        _print_table(compiler, usages)
    found = [f for usages in tables.values() for u in usages for f in faults(u, budgets()[budget_name(u.kernel)])]
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
