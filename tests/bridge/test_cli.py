"""The command line: that it says what a plan spends, and nothing that could be misread."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbridge import accounting
from dpbridge.cli import main
from dpbridge.cli.report import rounded_down, rounded_up
from dpkernels.execution_plan import BandMFConfig, DPSGDConfig, config_from_dict

POISSON = "--sampling-prob 0.1 --delta 1e-6"
SIZES = "--batch-size 20 --dataset-size 100 --delta 1e-6"
EPSILON = f"epsilon --noise-multiplier 3 --steps 10 {POISSON}"
# A true claim fails for one seed in a million. The truth is 7.9, and 500 trials show 2 or more.
AUDIT = (
    "audit --noise-multiplier 0.5 --steps 2 --sampling-prob 1 --delta 0.05 "
    "--trials 500 --significance 1e-6 --seed 0"
)
RUN = "--noise-multiplier 3 --steps 10"


@pytest.fixture
def ask(capsys):
    def ask(command):
        """Returns the exit code and what is on stdout, as JSON where that was asked for."""
        code = main(command.split())
        out = capsys.readouterr()
        assert out.err == ""
        return code, json.loads(out.out, parse_constant=pytest.fail) if "--json" in command else (
            out.out
        )

    return ask


@pytest.fixture
def refusal(capsys):
    def refusal(command):
        """Returns the one line on stderr with which a command is refused."""
        with pytest.raises(SystemExit) as stopped:
            main(command.split())
        out = capsys.readouterr()
        assert stopped.value.code == 2
        assert out.out == ""
        (line,) = out.err.splitlines()
        assert line.startswith("dpbridge: error: ")
        return line

    return refusal


def row(table, name):
    """Returns the text of the row of this name."""
    (text,) = [line for line in table.splitlines() if line.startswith(f"{name}   ")]
    return text.removeprefix(name).strip()


# -- epsilon --------------------------------------------------------------------------------


def test_epsilon_states_the_golden_number_and_what_it_is_of(ask):
    code, table = ask(f"epsilon --noise-multiplier 3 --steps 512 {POISSON}")
    assert code == 0
    assert row(table, "epsilon (pld)") == "3.76969"
    assert row(table, "neighbouring relation") == "add-or-remove-one"
    assert row(table, "delta") == "1e-06"
    assert row(table, "steps") == "512"


def test_table_is_aligned(ask):
    _, table = ask(EPSILON)
    starts = {len(line) - len(line.split("   ", 1)[1].lstrip()) for line in table.splitlines()}
    assert len(starts) == 1


def test_both_accountants_are_stated(ask):
    _, found = ask(f"{EPSILON} --accountant both --json")
    assert set(found["epsilon"]) == {"pld", "rdp"}
    assert 0 < found["epsilon"]["pld"] < found["epsilon"]["rdp"]


def test_batch_and_dataset_size_stand_for_a_probability(ask):
    _, found = ask(f"epsilon {RUN} --batch-size 10 --dataset-size 100 --delta 1e-6 --json")
    assert found == ask(f"{EPSILON} --json")[1]


def test_json_holds_the_config_that_spends_what_is_stated(ask):
    _, found = ask(f"epsilon {RUN} {SIZES} --truncated-batch-size 30 --json")
    config = config_from_dict(found["config"])
    assert config == DPSGDConfig(
        iterations=10,
        noise_multiplier=3.0,
        sampling_prob=0.2,
        truncated_batch_size=30,
        num_examples=100,
    )
    assert found["epsilon"] == {"pld": config.epsilon(1e-6)}
    assert found["neighboring_relation"] == "REPLACE_SPECIAL"


@pytest.mark.parametrize(
    ("options", "relation"),
    [
        (POISSON, "ADD_OR_REMOVE_ONE"),
        (f"{POISSON} --neighboring-relation zero-out", "REPLACE_SPECIAL"),
        (f"{POISSON} --neighboring-relation replace-one", "REPLACE_ONE"),
        (f"{SIZES} --sampling fixed", "REPLACE_ONE"),
        (f"{SIZES} --truncated-batch-size 30 --neighboring-relation replace-one", "REPLACE_ONE"),
        (f"{SIZES} --num-bands 2", "ADD_OR_REMOVE_ONE"),
        pytest.param(
            *(f"{SIZES} --num-bands 2 --neighboring-relation zero-out", "REPLACE_SPECIAL"),
            marks=pytest.mark.slow,
        ),
        (f"{SIZES} --num-bands 2 --truncated-batch-size 30", "REPLACE_SPECIAL"),
    ],
)
def test_neighboring_relation_is_that_of_the_sampling_or_what_is_asked_for(ask, options, relation):
    _, found = ask(f"epsilon {RUN} {options} --json")
    assert found["neighboring_relation"] == relation
    assert config_from_dict(found["config"]).relation.name == relation


def test_replace_one_says_that_noise_is_over_twice_the_clip_norm(ask):
    _, table = ask(f"{EPSILON} --neighboring-relation replace-one")
    assert row(table, "noise multiplier") == "3.0, over twice the clip norm"
    assert row(ask(EPSILON)[1], "noise multiplier") == "3.0, over the clip norm"


def test_fixed_batches_are_accounted_as_such(ask):
    _, table = ask(f"epsilon {RUN} {SIZES} --sampling fixed --accountant rdp")
    config = DPSGDConfig(iterations=10, noise_multiplier=3.0, batch_size=20, num_examples=100)
    assert row(table, "epsilon (rdp)") == rounded_up(config.epsilon(1e-6, accountant="rdp"))
    assert row(table, "sampling") == "20 of 100 examples, without replacement"


def test_no_noise_is_infinite_also_in_json(ask):
    _, found = ask(f"epsilon --noise-multiplier 0 --steps 2 {POISSON} --accountant both --json")
    assert found["epsilon"] == {"pld": "inf", "rdp": "inf"}
    _, table = ask(f"epsilon --noise-multiplier 0 --steps 2 {POISSON}")
    assert row(table, "epsilon (pld)") == "inf"


# -- BandMF ---------------------------------------------------------------------------------


def test_bands_draw_the_batch_size_from_the_group_whose_turn_it_is(ask):
    # 20 of 100 examples, from groups of 25: not 0.2, which would state a fraction of epsilon.
    _, found = ask(f"epsilon --noise-multiplier 3 --steps 12 {SIZES} --num-bands 4 --json")
    config = config_from_dict(found["config"])
    assert isinstance(config, BandMFConfig)
    assert config.num_bands == 4
    assert config.sampling_prob == pytest.approx(0.8)
    assert config.expected_participations == pytest.approx(12 * 20 / 100)
    assert found["epsilon"] == {"pld": config.epsilon(1e-6)}


def test_bands_of_equal_groups_leave_out_what_is_left_over(ask):
    sizes = "--batch-size 20 --dataset-size 103 --delta 1e-6 --neighboring-relation zero-out"
    _, found = ask(f"epsilon --noise-multiplier 3 --steps 12 {sizes} --num-bands 4 --json")
    config = config_from_dict(found["config"])
    assert config.sampling_prob == pytest.approx(20 / 25)
    assert config.num_examples == 103


def test_expected_participations_stand_for_a_batch_size(ask):
    options = "--num-bands 4 --delta 1e-6 --noise-multiplier 3 --steps 12 --json"
    _, one = ask(f"epsilon {options} --expected-participations 2.4")
    _, other = ask(f"epsilon {options} --batch-size 20 --dataset-size 100")
    assert one["epsilon"]["pld"] == pytest.approx(other["epsilon"]["pld"], rel=1e-6)


# -- calibrate ------------------------------------------------------------------------------


def test_calibrate_finds_the_golden_noise(ask):
    code, found = ask(f"calibrate --epsilon 1 --steps 512 {POISSON} --json")
    assert code == 0
    noise = found["found"]["noise_multiplier"]
    assert noise == pytest.approx(9.66, abs=5e-3)
    assert found["config"]["noise_multiplier"] == noise
    assert 0.999 < found["epsilon"]["pld"] <= 1.0


def test_calibrated_noise_is_what_training_would_use(ask):
    config = DPSGDConfig(iterations=10, sampling_prob=1).calibrate(epsilon=1.0, delta=1e-6)
    _, found = ask("calibrate --epsilon 1 --steps 10 --sampling-prob 1 --delta 1e-6 --json")
    noise = found["found"]["noise_multiplier"]
    assert config.noise_multiplier <= noise <= config.noise_multiplier * (1 + 1e-5)


def test_calibrate_finds_the_golden_number_of_steps(ask):
    _, table = ask(f"calibrate --epsilon 2 --noise-multiplier 3 {POISSON}")
    assert row(table, "found") == "number of steps 155"
    assert row(table, "for an epsilon of") == "2.0"
    assert float(row(table, "epsilon (pld)")) <= 2.0


def test_calibrate_finds_the_batch_size_that_accounting_finds(ask):
    _, found = ask(
        "calibrate --epsilon 1 --noise-multiplier 2 --steps 20 --dataset-size 200 --delta 1e-6 "
        "--accountant rdp --json"
    )
    expected = accounting.calibrate_batch_size(
        epsilon=1.0, delta=1e-6, noise_multiplier=2.0, num_examples=200, steps=20, accountant="rdp"
    )
    assert found["found"] == {"batch_size": expected}
    assert found["config"]["sampling_prob"] == expected / 200


@pytest.mark.parametrize("left_out", ["iterations", "batch_size"])
def test_calibrate_finds_the_largest_run_of_fixed_batches(ask, left_out):
    other = "--batch-size 20" if left_out == "iterations" else "--steps 20"
    _, found = ask(
        f"calibrate --epsilon 2 --noise-multiplier 2 {other} --dataset-size 100 --delta 1e-6 "
        "--sampling fixed --json"
    )
    fields = dict(noise_multiplier=2.0, num_examples=100, batch_size=20, iterations=20)
    count = found["found"][left_out]
    epsilons = [DPSGDConfig(**(fields | {left_out: n})).epsilon(1e-6) for n in (count, count + 1)]
    assert epsilons[0] <= 2.0 < epsilons[1]
    assert found["epsilon"] == {"pld": epsilons[0]}


def test_calibrate_finds_the_noise_of_bands(ask):
    _, found = ask(
        "calibrate --epsilon 2 --steps 6 --batch-size 50 --dataset-size 100 --delta 1e-6 "
        "--num-bands 2 --json"
    )
    config = config_from_dict(found["config"])
    assert config.num_bands == 2
    assert 1.999 < config.epsilon(1e-6) <= 2.0


# -- audit ----------------------------------------------------------------------------------


def test_audit_of_what_a_plan_claims_holds(ask):
    code, found = ask(f"{AUDIT} --json")
    config = DPSGDConfig(iterations=2, sampling_prob=1, noise_multiplier=0.5)
    assert code == 0
    assert found["holds"] is True
    assert found["accountant"] == "pld"
    # More than a quarter is found, so that it was this run that was attacked.
    assert found["epsilon_claimed"] / 4 < found["epsilon_lower_bound"] <= found["epsilon_claimed"]
    assert found["epsilon_claimed"] == config.epsilon(0.05)


def test_audit_refutes_a_claim_with_an_exit_code(ask):
    code, table = ask(f"{AUDIT} --epsilon 0.1")
    assert code == 1
    assert row(table, "holds").startswith("no")
    assert row(table, "epsilon claimed (by you)") == "0.1"
    assert float(row(table, "epsilon found, at least").split(",")[0]) > 0.5


def test_audit_repeats_with_its_seed_alone(ask):
    found = [ask(f"{AUDIT} --json")[1]["epsilon_lower_bound"] for _ in range(2)]
    other = AUDIT.replace("--seed 0", "--seed 1")
    assert found[0] == found[1] != ask(f"{other} --json")[1]["epsilon_lower_bound"]


# -- the picture ----------------------------------------------------------------------------


@pytest.mark.slow
def test_plot_is_a_picture_of_what_is_stated(ask, tmp_path):
    path = tmp_path / "epsilon.png"
    _, table = ask(f"{EPSILON} --accountant both --plot {path}")
    assert row(table, "plot") == str(path)
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pixels = pyplot.imread(path)
    blue, orange = (
        abs(pixels[..., :3] - [c / 255 for c in rgb]).max(axis=2) < 0.02
        for rgb in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E))
    )
    assert min(blue.sum(), orange.sum()) > 1000  # both curves, well beyond the legend
    # From the lower left to the upper right.
    rows, columns = blue.nonzero()
    assert rows[columns.argmax()] < rows[columns.argmin()] - 100


def test_plot_draws_each_accountant_to_the_last_step(ask, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    _, found = ask(f"{EPSILON} --accountant both --json --plot {tmp_path / 'e.svg'}")
    (axes,) = drawn[0].axes
    for line in axes.lines:
        steps, epsilons = line.get_data()
        assert list(steps) == list(range(1, 11))
        assert epsilons[-1] == found["epsilon"][line.get_label()]
    assert axes.get_ylabel() == "epsilon at delta = 1e-06"
    assert "add-or-remove-one" in axes.get_title()


def test_plot_without_matplotlib_names_the_extra(refusal, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refusal(f"{EPSILON} --plot {tmp_path / 'epsilon.png'}")
    assert "--plot must have matplotlib" in line
    assert "dpbridge[examples]" in line


def test_plot_of_an_infinite_epsilon_is_refused(refusal, tmp_path):
    command = f"epsilon --noise-multiplier 0 --steps 2 {POISSON} --plot {tmp_path / 'e.png'}"
    assert "must give a finite epsilon to be drawn" in refusal(command)
    assert not list(tmp_path.iterdir())


# -- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "required: COMMAND"),
        ("train", "invalid choice: 'train'"),
        (f"epsilon --noise-multiplier 3 {POISSON}", "required: --steps"),
        (f"epsilon {RUN} --sampling-prob 0.1", "required: --delta"),
        (f"{EPSILON} --dataset-siz 100", "unrecognized arguments: --dataset-siz"),
        (f"epsilon {RUN} --sampling-prob 1.1 --delta 1e-6", "--sampling-prob must be in (0, 1]"),
        (f"epsilon {RUN} --sampling-prob nan --delta 1e-6", "--sampling-prob must be in (0, 1]"),
        (f"epsilon {RUN} --sampling-prob 0.1 --delta 1", "--delta must be in (0, 1)"),
        (f"epsilon --noise-multiplier -3 --steps 1 {POISSON}", "must be non-negative and finite"),
        (f"epsilon --noise-multiplier 3 --steps 0 {POISSON}", "--steps must be at least 1"),
        (f"epsilon --noise-multiplier 3 --steps 1.5 {POISSON}", "invalid int value"),
        (f"epsilon {RUN} --delta 1e-6", "--batch-size and --dataset-size must be given"),
        (f"epsilon {RUN} --batch-size 5 --delta 1e-6", "--dataset-size must be given"),
        (f"{EPSILON} --batch-size 5", "--batch-size must go with runs without --sampling-prob"),
        (f"{EPSILON} --dataset-size 100", "--dataset-size must be given with"),
        (f"{EPSILON} --sampling fixed", "--sampling-prob must go with Poisson sampling"),
        (f"{EPSILON} --expected-participations 2", "must go with --num-bands"),
        (f"{EPSILON} --num-bands 2", "--sampling-prob must go with runs without --num-bands"),
        (f"epsilon {RUN} {SIZES} --num-bands 0", "--num-bands must be at least 1"),
        (f"epsilon {RUN} {SIZES} --num-bands 2 --sampling fixed", "--sampling must be poisson"),
        (
            f"epsilon {RUN} {SIZES} --num-bands 2 --neighboring-relation replace-one",
            "--neighboring-relation must be add-or-remove-one or zero-out here, got replace-one",
        ),
        (
            f"epsilon {RUN} {SIZES} --num-bands 2 --truncated-batch-size 9 "
            "--neighboring-relation add-or-remove-one",
            "--neighboring-relation must be zero-out here, got add-or-remove-one",
        ),
        (
            f"epsilon {RUN} --expected-participations 2 --delta 1e-6 --num-bands 2 "
            "--neighboring-relation zero-out",
            "--neighboring-relation must be add-or-remove-one here, got zero-out",
        ),
        (
            f"epsilon {RUN} --expected-participations 2 --delta 1e-6 --num-bands 2 "
            "--truncated-batch-size 9",
            "--dataset-size must be given with --truncated-batch-size",
        ),
        (
            f"epsilon {RUN} {SIZES} --num-bands 10 --neighboring-relation zero-out",
            "--batch-size must be at most --dataset-size // --num-bands, 10, got 20",
        ),
        (
            f"epsilon {RUN} --delta 1e-6 --num-bands 2 --expected-participations 9",
            "--expected-participations must be at most --steps // --num-bands, 5",
        ),
        (
            f"epsilon {RUN} --delta 1e-6 --num-bands 2 --expected-participations 2 "
            "--dataset-size 100",
            "--dataset-size must go with --batch-size or zero-out",
        ),
        (
            f"epsilon {RUN} {SIZES} --sampling fixed --neighboring-relation add-or-remove-one",
            "--neighboring-relation must be one of replace-one, got add-or-remove-one",
        ),
        (
            f"{EPSILON} --neighboring-relation replace-one --accountant both",
            "--accountant must be one of 'pld', got 'rdp'",
        ),
        (f"epsilon {RUN} {SIZES} --truncated-batch-size 0", "--truncated-batch-size must be at"),
        (f"{EPSILON} --plot e.txt", "must end in one of .png, .pdf, .svg"),
        (f"{EPSILON} --plot no/such/folder/e.png", "must be in a folder that exists"),
        (f"calibrate --epsilon 1 {POISSON}", "got --noise-multiplier and --steps"),
        (f"calibrate --epsilon 1 {RUN} {POISSON}", "must be left out, to be found, got none"),
        (f"calibrate --epsilon 0 --steps 1 {POISSON}", "--epsilon must be positive and finite"),
        (f"calibrate --epsilon 1 {RUN} --delta 1e-6", "--dataset-size must be given"),
        (f"calibrate --epsilon 0.1 --noise-multiplier 1 {POISSON}", "--epsilon must be at least 2"),
        (
            f"calibrate --epsilon 1 --noise-multiplier 1 {SIZES} --num-bands 2",
            "--steps must be given with --num-bands",
        ),
        (f"calibrate --epsilon 1 --steps 1 {POISSON} --accountant both", "invalid choice: 'both'"),
        (f"{AUDIT} --trials 1", "--trials must be at least 2"),
        (f"{AUDIT} --significance 0.5", "must be in (0, 0.5)"),
        (f"{AUDIT} --epsilon -1", "--epsilon must be non-negative"),
        (f"{AUDIT} --epsilon 1 --accountant pld", "--accountant must be left out with --epsilon"),
        (f"{AUDIT} --trials 100000000", "to fit into memory"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_in_one_line(refusal, command, message):
    assert message in refusal(command)


# -- numbers in tables ----------------------------------------------------------------------


@given(st.floats(1e-12, 1e12))
def test_rounding_up_is_never_below_and_hardly_above(number):
    assert number <= float(rounded_up(number)) <= number * (1 + 2e-5)


@given(st.floats(1e-12, 1e12))
def test_rounding_down_is_never_above_and_hardly_below(number):
    assert number * (1 - 2e-5) <= float(rounded_down(number)) <= number


@pytest.mark.parametrize("number", ["1.1", "3", "0.5", "1e-06", "inf", "0"])
def test_rounding_leaves_short_numbers_alone(number):
    assert rounded_up(float(number)) == rounded_down(float(number)) == number


def test_rounding_up_keeps_infinity():
    assert math.isinf(float(rounded_up(math.inf)))


# -- the program ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "epsilon", "calibrate", "audit"])
def test_help_names_the_options(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    expected = ["--noise-multiplier", "--delta", "--json"] if command else ["calibrate", "audit"]
    assert all(word in text for word in expected)


def test_module_runs_as_a_program():
    words = [sys.executable, "-P", "-m", "dpbridge.cli"]
    done = subprocess.run(
        [*words, *f"{EPSILON} --json".split()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    config = DPSGDConfig(iterations=10, noise_multiplier=3.0, sampling_prob=0.1)
    assert json.loads(done.stdout)["epsilon"] == {"pld": config.epsilon(1e-6)}
