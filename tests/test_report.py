"""profile/report.py on invented results, and README.md against the committed ones."""

import csv
import subprocess
import sys

import pytest

from . import results_files
from .readme_numbers import unsupported
from .training import ROOT

sys.path.insert(0, str(ROOT / "profile"))  # its scripts import each other

import report  # noqa: E402
import report_plots  # noqa: E402
import report_style  # noqa: E402

README = "".join(f"<!-- {name}: written by profile/report.py --><!-- end of {name} -->\n" for name in report.TABLES)
PLOTS_OF = {"kernels.csv": {"kernels.png", "bandwidth.png"}, "step.csv": set(), "phases.csv": {"step.png"},
            "epoch.csv": set(), "sweep.csv": {"scaling.png"}, "ceilings.csv": set(),
            "ladder.csv": {"ladder.png"}, "costs.csv": set(), "launches.csv": set(), "torture.csv": set()}  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with an empty README.md, which report.py takes for the project's."""
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "profile" / "results")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def new(project, *files, machine="a-cpu", gpu=False, **values):
    return results_files.write(project / "profile" / "results" / machine, gpu, files, **values)


def change(path, line, **values):
    """Replace values of one row of a CSV file."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[line] |= values
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def refused(arguments, capsys) -> str:
    """The sentence with which report.py refuses."""
    assert report.main(list(map(str, arguments))) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    return sentence


def test_readme_shows_the_committed_results():
    command = [sys.executable, "profile/report.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_every_number_in_the_readme_is_in_a_results_file():
    assert unsupported((ROOT / "README.md").read_text(encoding="utf-8"), ROOT) == []


def test_the_tables_have_every_row_and_no_number_of_their_own(project):
    new(project, "step.csv", "kernels.csv", "epoch.csv", "ladder.csv", "costs.csv", machine="a-gpu", gpu=True)
    new(project, "step.csv", "ladder.csv")
    new(project, "torture.csv", machine="torture")
    assert report.main([]) == 0
    text = report.README.read_text()
    assert unsupported(text, project) == [] and "not measured yet" not in text
    assert text.count("| m1 | 512 | tf32 | fused, CUDA graph |") == 2  # step and epoch
    assert "| m0 | 256 | float32 | GEMMs alone, shared threads | **" in text
    assert "Invented CPU, 2 cores, python 3.11.7, numpy 2.4.6; 54 samples each; 2026-01-31, revision 01" in text
    assert "Invented GPU, driver 570.86, 16 host cores, python 3.11.7, cupy 14.2.0; 40 samples each" in text
    assert "| kill -9: m1 | 50 | 48 | – | – | 0 |" in text and "numpy 2.4.6; 2026-01-31" in text
    assert "ElementwiseKernel: not a pointwise op (bias_act_backward relu, " in text
    for row in results_files.kernels(gpu=True):
        if row["contender"] == "fused" and row["size"] == 2**30:
            time = f"**{row['p50_us']}** ({row['p20_us']}–{row['p80_us']})"
            assert f"| {row['op']} | {row['shape']} | {row['bytes']} | {time} |" in text
            assert f"| {row['speedup']} | {row['share_of_copy']} |" in text
    assert "](profile/results/a-gpu/kernels.png)" in text and "step.png" not in text
    for row in results_files.ladder(gpu=True):
        cells = [row.get(column) or "–" for column in ("predicted_us", "bound", "speedup", "gain")]
        time = f"**{row['p50_us']}** ({row['p20_us']}–{row['p80_us']})"
        launches = row.get("launches") or "–"
        cells = [row["rung"], row["what"], row["precision"], launches, time, *cells]
        assert f"| {' | '.join(map(str, cells))} |" in text
    assert text.count("| fused ops | the change of fused ops | float32 | 23 |") == 2 and text.count("ladder.png)") == 2
    assert "epilogues: all separate." in text and text.count("Predicted from, in the same run: launch 3.71 µs; ") == 1
    assert "torch eager, fused optimizer, torch CUDA graph, fused optimizer: not a rung; its launches are not" in text


@pytest.mark.parametrize(
    "planted",
    ["7.5 ms", "between 2.5 and 3.5 µs", "3.000–3.100 ms", "12 us", "40 s", "1.5×", "2x", "2.5 times as fast",
     "93 %", "31.9 GB/s", "210 GFLOP/s", "63,001 images/s", "a 3-fold gain", "5 minutes", "**7.5** ms", "`7.5` ms"],
)  # fmt: skip
def test_a_planted_number_in_the_prose_is_found(planted, project):
    new(project, *results_files.FILES)
    assert unsupported(README, project) == []
    assert unsupported(f"{README}It takes {planted}, and more.", project)


def test_numbers_of_the_results_pass_in_the_prose(project):
    folder = new(project, "step.csv", "ceilings.csv")
    change(folder / "step.csv", 3, p50_ms="7.525", images_per_second="63001", to_gemm="1.150")
    prose = "28×28 or 28 × 28 images, 2 cores, batch 512, 7.525 ms, 63,001 images/s, 1.150 × the GEMMs, 210.3 GFLOP/s"
    assert unsupported(prose + "\n```sh\nsleep 3 s\n```", project) == []
    assert unsupported("7.525 µs", project) and unsupported("1.150 GB/s", project)  # the number of another unit


def test_a_changed_digit_in_a_table_or_its_caption_is_found(project, capsys):
    folder = new(project, "step.csv")
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    text = report.README.read_text()
    time = report.read(folder)["step.csv"][0]["p50_ms"]
    for old, planted in ((f"**{time}**", "**1.234**"), ("54 samples", "55 samples"), ("revision 01", "revision 02")):
        report.README.write_text(text.replace(old, planted, 1))
        assert unsupported(report.README.read_text(), project)
        assert report.main(["--check"]) == 1 and "differs from the results" in capsys.readouterr().err
        assert planted in report.README.read_text()  # nothing was written
    report.README.write_text(text)
    change(folder / "step.csv", 0, p80_ms="99.999")
    assert report.main(["--check"]) == 1


def test_check_notices_plots_that_are_missing_or_old(project, capsys):
    folder = new(project, "phases.csv")
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    (folder / "step.png").rename(folder / "old.png")
    assert report.main(["--check"]) == 1 and "step.png was not drawn" in capsys.readouterr().err
    (folder / "old.png").rename(folder / "step.png")
    change(folder / "phases.csv", 0, p50_ms="0.125")
    assert report.main(["--check"]) == 1 and "step.png was not drawn" in capsys.readouterr().err


def test_without_results_the_readme_says_so(project):
    assert report.main([]) == 0
    assert report.README.read_text().count("not measured yet") == len(report.TABLES)


def test_uncommitted_changes_are_said(project):
    new(project, "step.csv", revision="0123456789ab+")
    assert report.main([]) == 0
    assert "revision 0123456789ab+ (uncommitted changes)" in report.README.read_text()


@pytest.mark.parametrize("name", report.TABLES)
def test_markers_must_be_there_once(name, project, capsys):
    begin, end = f"<!-- {name}: written by profile/report.py -->", f"<!-- end of {name} -->"
    swapped = README.replace(begin, "?").replace(end, begin).replace("?", end)
    for text in (README.replace(begin, ""), README.replace(end, ""), README + begin, README + end, swapped):
        report.README.write_text(text)
        assert f"markers of the {name}" in refused([], capsys)
        assert report.README.read_text() == text


@pytest.mark.parametrize("column", ["device", "cores", "driver", "versions", "revision"])
def test_results_of_several_runs_are_refused(column, project, capsys):
    folder = new(project, "step.csv", "epoch.csv")
    for name in ("epoch.csv", "step.csv"):  # two files that differ, then a file that differs in itself
        change(folder / name, 1, **{column: "3"})
        assert f"{column} is " in refused([], capsys) and report.README.read_text() == README
        change(folder / name, 1, **{column: results_files.CPU[column]})
    assert report.main([]) == 0


@pytest.mark.parametrize("value", ["nan", "inf", "-1.5", "0", "fast", "", "1.5 ms"])
@pytest.mark.parametrize("file, column", [("step.csv", "p50_ms"), ("kernels.csv", "speedup"), ("sweep.csv", "batch"),
                                          ("ceilings.csv", "value"), ("epoch.csv", "seconds")])  # fmt: skip
def test_what_is_no_number_is_refused(file, column, value, project, capsys):
    folder = new(project, file)
    change(folder / file, 0, **{column: value})
    assert column in refused([folder], capsys)


def test_only_the_batch_sweep_has_no_width(project, capsys):
    path = new(project, "sweep.csv") / "sweep.csv"
    change(path, -1, width="")
    assert "has no width" in refused([path.parent], capsys)


def test_files_of_another_form_are_refused(project, capsys):
    path = new(project, "step.csv") / "step.csv"
    text = path.read_text()
    header, first, *_ = text.splitlines()
    for content, complaint in (
        (text.replace("to_gemm", "gemm"), "lacks the column to_gemm"),
        ("", "lacks the column"),
        (header, "has no rows"),
        (f"{header}\n{first}\n{first}", "there twice"),
        (f"{header}\n{first},1", "does not have"),
        (f"{header}\n{first.rpartition(',')[0]}", "does not have"),
        (text.replace("fused,", ",", 1), "row 3"),
    ):
        path.write_text(content)
        assert complaint in refused([path.parent], capsys)
    path.write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused([path.parent], capsys)
    assert "holds no results" in refused([project / "nowhere"], capsys)


def test_a_contender_without_a_time_needs_a_reason(project, capsys):
    path = new(project, "kernels.csv") / "kernels.csv"
    change(path, 2, **dict.fromkeys(("p20_us", "p50_us", "p80_us", "gb_per_s", "share_of_copy", "speedup"), ""))
    assert "has no p20_us" in refused([path.parent], capsys)
    change(path, 2, note="needs a compiler")
    assert report.main([str(path.parent)]) == 0


def colours_of(path) -> set[str]:
    """The colours of a picture's pixels, as '#rrggbb'."""
    from PIL import Image

    with Image.open(path) as image:
        return {"#%02x%02x%02x" % colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)}


@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
def test_plots_show_every_contender(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "README", tmp_path / "no readme")  # is neither read nor written
    folder = results_files.write(tmp_path / "results", gpu)
    assert report.main([str(folder)]) == 0
    assert {path.name for path in folder.glob("*.png")} == set(report_plots.PLOTS) and not report.README.exists()
    assert set(report_plots.PHASE_COLOURS) <= colours_of(folder / "step.png")
    shown = {"kernels.png": "kernels.csv", "bandwidth.png": "kernels.csv", "scaling.png": "sweep.csv",
             "roofline.png": "sweep.csv"}  # fmt: skip
    for name, file in shown.items():
        contenders = {row["contender"] for row in results_files.FILES[file](gpu)}
        assert {report_style.LOOK[contender][0] for contender in contenders} <= colours_of(folder / name)


def test_a_ladder_is_drawn_without_some_predictions(tmp_path):
    folder = results_files.write(tmp_path / "results", True, ("ladder.csv",))
    change(folder / "ladder.csv", 3, predicted_us="", bound="", note="not predicted")
    assert report.main([str(folder)]) == 0
    rungs = {row["rung"] for row in results_files.ladder(gpu=True)}
    colours = {report_style.LOOK[report_style.rung_look(rung)][0] for rung in rungs}
    assert len(colours) == 5 and colours <= colours_of(folder / "ladder.png")


@pytest.mark.parametrize("column", ["predicted_us", "gain", "launches"])
def test_a_rung_that_lacks_a_figure_needs_a_reason(column, project, capsys):
    folder = new(project, "ladder.csv")
    change(folder / "ladder.csv", 1, **{column: ""})
    assert f"has no {column}" in refused([folder], capsys)


@pytest.mark.parametrize("file", results_files.FILES)
def test_a_folder_may_have_some_of_the_files(file, project):
    folder = new(project, file)
    assert report.main([]) == 0
    assert {path.name for path in folder.glob("*.png")} == PLOTS_OF[file]
    assert all(f"{folder.name}/{name})" in report.README.read_text() for name in PLOTS_OF[file])


@pytest.mark.parametrize(
    "file, values",
    [("kernels.csv", {"contender": "cupy.fused"}), ("sweep.csv", {"contender": "somebody"}),
     ("sweep.csv", {"sweep": "depth", "width": "64"}),
     ("ladder.csv", {"rung": "lift"}), ("phases.csv", {"phase": "lunch"}),
     ("ceilings.csv", {"unit": "TB/s"}), ("ceilings.csv", {"precision": "tf32"})],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(file, values, project, capsys):
    folder = new(project, file, *({"sweep.csv"} - {file}))
    change(folder / file, 0, **values)
    refused([folder], capsys)


@pytest.mark.parametrize("column", ["share_of_copy", "speedup", "to_gemm", "gain"])
def test_compare_tells_eleven_percent_from_nine(column, project, capsys):
    file = {"to_gemm": "step.csv", "gain": "ladder.csv"}.get(column, "kernels.csv")
    a, b = (new(project, file, machine=machine) for machine in "ab")
    change(a / file, 1, **{column: "1.000"})
    for value, status in (("1.090", 0), ("0.920", 0), ("1.110", 1), ("0.900", 1)):
        change(b / file, 1, **{column: value})
        assert report.main(["--compare", str(a), str(b)]) == status
        output = capsys.readouterr().out
        assert (f"{column}: A 1.000, B {value}" in output) == bool(status)
        assert f"{status} differ by more than 10%" in output


def test_compare_refuses_runs_with_nothing_to_compare(project, capsys):
    a, b, c = (new(project, file, machine=file[0]) for file in ("step.csv", "kernels.csv", "phases.csv"))
    assert "no ratio in common" in refused(["--compare", a, b], capsys)
    assert "no ratio in common" in refused(["--compare", c, c], capsys)
    change(a / "step.csv", 0, speedup="nan")
    assert "speedup nan" in refused(["--compare", a, a], capsys)
