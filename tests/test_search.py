"""A search: trials until there are enough, resumed, shared, cut short, refused, and its result as a configuration."""

import csv
import json
import math
import signal
from concurrent.futures import ThreadPoolExecutor

import matplotlib.image
import optuna
import pytest
from optuna.trial import TrialState

import train as command
from mlp import configs, search, search_study
from mlp.optim import learning_rate
from mlp.search_space import Space, as_flags

from .training import script_after, train, write_npy

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SMALL = ("--device", "cpu", "--epochs", "2", "--hidden", "16", "--data")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_npy(tmp_path_factory.mktemp("search") / "good", rows=300)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Lost trials are noticed after seconds."""
    monkeypatch.setattr(search_study, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(search_study, "GRACE_SECONDS", 2)


def run(*arguments) -> int:
    return command.main([str(argument) for argument in arguments])


def trials(file):
    return optuna.load_study(study_name="search", storage=f"sqlite:///{file}").trials


def counted(file):
    return [trial for trial in trials(file) if trial.state in search_study.FINISHED]


def rows(file):
    with open(file, newline="") as text:
        return list(csv.DictReader(text))


def test_a_search_leaves_its_results_goes_on_and_its_best_can_be_trained(good, tmp_path, capsys):
    file, out = tmp_path / "deep" / "s.db", tmp_path / "out"
    arguments = ("--model", "m1", "--device", "cpu", "--epochs", 2, "--data", good, "--study", file, "--out", out)
    assert run(*arguments, "--search", 3) == 0
    first = trials(file)
    assert len(counted(file)) == 3
    assert run(*arguments, "--search", 7) == 0
    assert len(counted(file)) == len(trials(file)) == 7
    assert [t.datetime_complete for t in trials(file)[:3]] == [t.datetime_complete for t in first]
    text = capsys.readouterr().out
    assert [line.split()[1] for line in text.splitlines() if line.startswith("trial ")] == list("0123456")
    written = json.loads((out / "best.json").read_text())
    best = max(t.value for t in trials(file) if t.state == TrialState.COMPLETE)
    assert written["val_accuracy"] == best and written["data"] == "good"
    assert as_flags(trials(file)[written["trial"]].user_attrs["fields"]) in text
    table = rows(out / "trials.csv")
    assert [int(row["trial"]) for row in table] == list(range(7))
    assert float(table[written["trial"]]["val_accuracy"]) == best
    assert all(matplotlib.image.imread(out / name).size for name in ("history.png", "importance.png"))
    trained = ("--model", "m1", "--device", "cpu", "--data", good, "--config", out / "best.json", "--out")
    assert run(*trained, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val"]["accuracy"] == best
    assert run(*trained, tmp_path / "shorter", "--epochs", 1, "--hidden", 8) == 0
    config = json.loads((tmp_path / "shorter" / "config.json").read_text())
    assert (config["epochs"], config["hidden"], config["lr"]) == (1, [8], written["config"]["lr"])


def test_a_process_killed_in_a_trial_is_noticed_and_its_trial_made_again(good, tmp_path):
    file = tmp_path / "s.db"
    arguments = (*SMALL, good, "--study", file, "--search", 4)
    killed = script_after(
        "import os, mlp.search, mlp.search_study as s; s.HEARTBEAT_SECONDS = 1; "
        "mlp.search.TrialReporter.end_epoch = lambda self, *_: self._trial.number == 2 and os.kill(os.getpid(), 9)"
    )
    assert train(*arguments, cwd=tmp_path, python=killed).returncode == -signal.SIGKILL
    before = trials(file)
    assert [t.state for t in before] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
    assert run(*arguments) == 0
    after = trials(file)
    assert [t.state.name for t in after].count("FAIL") == 1 and after[2].state == TrialState.FAIL
    assert len(counted(file)) == 4
    assert [t.datetime_complete for t in after[:2]] == [t.datetime_complete for t in before[:2]]


def test_a_process_that_dies_before_its_first_heartbeat_is_noticed(good, tmp_path):
    file = tmp_path / "s.db"
    assert run(*SMALL, good, "--study", file, "--search", 1) == 0
    optuna.load_study(study_name="search", storage=f"sqlite:///{file}").ask()
    assert run(*SMALL, good, "--study", file, "--search", 2) == 0
    assert [t.state.name for t in trials(file)] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_two_processes_share_the_trials(good, tmp_path):
    result = train(*SMALL, good, "--study", "s.db", "--search", 5, "--jobs", 2, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    shown = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("trial ")]
    done = counted(tmp_path / "s.db")
    assert len(done) == 5 and sorted(shown) == sorted(str(t.number) for t in done)
    assert len({str(t.params) for t in done}) == 5


def test_processes_that_begin_a_study_at_once_agree(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(search_study._storage, [tmp_path / "s.db"] * 8))) == 8


def test_a_trial_that_another_process_has_made_needless_is_withdrawn():
    study, optimize, called = optuna.create_study(direction="maximize"), optuna.Study.optimize, []

    def overtaken(*args, **kwargs):
        study.add_trial(optuna.create_trial(value=0.5))
        optimize(study, *args, **kwargs)

    study.optimize = overtaken
    search_study.add_trials(study, 1, called.append, search.silent, search.silent)
    assert not called and [t.state.name for t in study.trials] == ["COMPLETE", "FAIL"]


@pytest.mark.parametrize("report", [True, False])
def test_a_trial_that_another_process_has_given_up_is_made_again(tmp_path, report):
    study, numbers = optuna.create_study(direction="maximize", storage=f"sqlite:///{tmp_path / 's.db'}"), []

    def objective(trial):
        numbers.append(trial.number)
        if trial.number == 0:
            study.tell(0, state=TrialState.FAIL)
            if report:
                trial.report(0.5, 1)
        return 0.5

    search_study.add_trials(study, 1, objective, search.silent, search.silent)
    assert numbers == [0, 1] and [t.state.name for t in study.trials] == ["FAIL", "COMPLETE"]
    with pytest.raises(ValueError, match="own"):  # no other's doing
        search_study.add_trials(study, 2, lambda trial: int("own"), search.silent, search.silent)


def test_a_trial_behind_the_median_is_cut_short(good, tmp_path):
    config = configs.preset("m1", data=str(good), device="cpu", epochs=4, batch_size=64)
    space, dataset = Space.around(config, {"batch_size"}), search.data.load(config.data)
    study = search_study.open_study(tmp_path / "s.db", space, dataset)
    epochs = {epoch: 2.0 for epoch in range(1, 5)}  # better than any accuracy
    for _ in range(5):
        study.add_trial(optuna.create_trial(value=2.0, intermediate_values=epochs))
    search_study.add_trials(study, 6, search.Objective(space, dataset), search.silent, search.silent)
    assert study.trials[-1].state == TrialState.PRUNED and list(study.trials[-1].intermediate_values) == [1]


def test_trials_that_diverge_are_results(good, tmp_path, capsys):
    status = run("--model", "m0", *SMALL, good, "--lr", 1e30, "--study", tmp_path / "s.db", "--search", 2)
    assert status == 1 and "no trial is complete" in capsys.readouterr().err
    assert [row["outcome"] for row in rows(tmp_path / "s-results" / "trials.csv")] == ["diverged"] * 2
    assert not (tmp_path / "s-results" / "best.json").exists()


def test_ctrl_c_keeps_what_there_is(good, tmp_path, monkeypatch):
    begin = search.TrialReporter.begin_epoch

    def pressed(self, epoch, epochs, images):
        begin(self, epoch, epochs, images)
        if self._trial.number == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(search.TrialReporter, "begin_epoch", pressed)
    assert run(*SMALL, good, "--study", tmp_path / "s.db", "--search", 3) == 130
    assert [t.state.name for t in trials(tmp_path / "s.db")] == ["COMPLETE", "FAIL"]
    assert json.loads((tmp_path / "s-results" / "best.json").read_text())["trial"] == 0


@pytest.fixture(scope="module")
def begun(good, tmp_path_factory):
    file = tmp_path_factory.mktemp("begun") / "s.db"
    assert run(*SMALL, good, "--study", file, "--search", 1) == 0
    return file


@pytest.mark.parametrize(
    "changes, word",
    [
        (("--data", "OTHER"), "--data"), (("--epochs", 3), "--epochs 2"), (("--hidden", "8"), "--hidden"),
        (("--model", "m0"), "--model m1"), (("--lr", 0.001), "the searched space"), (("--study", "DAMAGED"), "--study"),
        (("--study", "FOLDER"), "--study"), (("--jobs", 0), "--jobs 0"), (("--search", 0), "--search 0"),
        (("--explain",), "--explain"), (("--out", "DAMAGED"), "--out"),
        (("--lr", 1, "--l2", 0, "--schedule", "constant", "--batch-size", 64), "nothing to choose"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(good, begun, tmp_path, capsys, changes, word):
    (tmp_path / "DAMAGED").write_text("this is no database, and it is long enough to be seen as one" * 20)
    (tmp_path / "FOLDER").mkdir()
    write_npy(tmp_path / "OTHER", rows=90)
    before = begun.read_bytes()
    changes = [tmp_path / value if str(value).isupper() else value for value in changes]
    assert run(*SMALL, good, "--study", begun, "--search", 2, *changes) == 2
    text = capsys.readouterr()
    assert text.out == "" and text.err.count("\n") == 1 and word in text.err
    assert begun.read_bytes() == before


@pytest.mark.parametrize("flag", ["--study", "--jobs"])
def test_flags_of_a_search_need_one(flag, capsys):
    assert run(flag, 1) == 2 and "--search" in capsys.readouterr().err


def test_what_flags_give_is_not_searched():
    names = {"depth", "width", "taper", "lr", "schedule", "final", "l2", "log2_batch"}
    base = configs.preset("m1f")
    for fixed, gone in (
        ((), set()), (("hidden",), {"depth", "width", "taper"}), (("lr",), {"lr"}), (("activation", "fused"), set()),
        (("l2", "batch_size"), {"l2", "log2_batch"}), (("gamma",), {"schedule", "final"}),
        (("schedule",), {"schedule"}),
    ):  # fmt: skip
        assert set(Space.around(base, fixed).ranges) == names - gone
    assert "final" not in Space.around(configs.preset("m1"), ("schedule",)).ranges


@pytest.mark.parametrize("schedule", configs.SCHEDULES)
def test_a_point_becomes_fields(schedule):
    space = Space.around(configs.preset("m1", epochs=11), ())
    point = {"depth": 3, "width": 400, "taper": 0.6, "lr": 0.00123456, "final": 0.25, "log2_batch": 8, "l2": 9e-7}
    config = space.config(space.fields(point | {"schedule": schedule}))
    assert (config.hidden, config.lr, config.l2, config.batch_size) == ((400, 240, 144), 0.00123, 0.0, 256)
    assert space.fields({"l2": 1.234e-5}) == {"l2": 1.23e-5}
    if schedule in ("linear", "exponential"):
        assert math.isclose(learning_rate(config, 10) / config.lr, 0.25, rel_tol=5e-3)


def test_numbers_follow_from_the_seed_and_the_number_of_the_trial():
    def sampled(seed):
        space = Space.around(configs.preset("m1"), ())
        study = optuna.create_study(sampler=search_study.NumberedTPE(seed), direction="maximize")
        study.optimize(lambda trial: space.suggest(trial)["lr"], n_trials=12)
        return [trial.params for trial in study.trials]

    assert sampled(3) == sampled(3) != sampled(4)
    assert len({str(point) for point in sampled(3)}) == 12
