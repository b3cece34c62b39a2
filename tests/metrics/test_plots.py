"""`fasttr plot`: what is drawn from which metrics, and what is refused."""

import json
import re
import sys

import pytest

from fasttr.cli import main
from fasttr.errors import FasttrError
from fasttr.metrics import plots
from fasttr.metrics.panels import RUN_PANELS
from tests.runs import error_line

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def preference_lines(steps=100, every=20, gold=True):
    lines = []
    for step in range(steps + 1):
        if step:
            train = {"loss": 0.69 - step / 1000, "logps/chosen": -20.0, "logps/rejected": -21.0}
            rewards = {
                f"rewards/{k}": step / 100 for k in ("chosen", "rejected", "margins", "accuracies")
            }
            lines.append({"step": step, **train, **rewards})
        if step % 25 == 0:
            anchor = {
                "eval_anchor/logratios/chosen": -step / 10,
                "eval_anchor/rewards/margins": step / 10,
                "eval_anchor/rewards/accuracies": 0.55 + step / 1000,
            }
            lines.append({"step": step, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7, **anchor})
            if gold:
                measured = {
                    "eval_gold_reward": 0.5,
                    "eval_gold_reward_stderr": 0.01,
                    "eval_kl_to_initial": step / 50,
                }
                lines.append({"step": step, **measured})
        if every and step and step % every == 0:
            lines.append({"step": step, "event": "reference_update", "ref/updates": step // every})
    return lines


def drawn(panel_name, lines):
    """The axes of one panel of a run."""
    (panel,) = [panel for panel in RUN_PANELS if panel.name == panel_name]
    return plots.panel_figure(panel, lines).axes[0]


def test_a_preference_run_gives_every_picture(tmp_path):
    paths = plots.plot_run(write_run(tmp_path / "run", preference_lines()))
    names = ["loss", "rewards", "accuracies", "logps", "gold_reward", "initial_policy"]
    assert paths == [tmp_path / "run" / "plots" / f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 5000 for path in paths)


def test_what_was_not_recorded_is_not_drawn(tmp_path):
    lines = [{"step": step, "loss": 2.0} for step in range(1, 9)] + [{"step": 8, "eval_loss": 2.1}]
    assert [p.name for p in plots.plot_run(write_run(tmp_path / "sft", lines))] == ["loss.png"]


def test_pyplot_and_its_global_state_are_untouched(tmp_path):
    import matplotlib

    # Reading rcParams["backend"] would import pyplot; a copy does not resolve it.
    before, loaded = matplotlib.rcParams.copy(), "matplotlib.pyplot" in sys.modules
    plots.plot_run(write_run(tmp_path / "run", preference_lines()))
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert dict(matplotlib.rcParams.copy().items()) == dict(before.items())


def test_every_move_of_the_reference_is_a_vertical_line():
    ax = drawn("rewards", preference_lines(every=20))
    label = [line for line in ax.lines if line.get_label() == "reference update"]
    vertical = [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert len(label) == 1
    assert vertical == [20, 40, 60, 80, 100]


def test_hundreds_of_moves_are_thinned_and_said_to_be():
    ax = drawn("rewards", preference_lines(steps=400, every=2))
    vertical = [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert len(vertical) == plots.MAX_MARKS
    assert vertical[:2] == [10, 20]
    assert "every 5th reference update" in ax.get_legend_handles_labels()[1]


def test_a_mean_never_reaches_over_a_move():
    lines = [{"step": step, "rewards/margins": float(step > 50)} for step in range(1, 101)]
    moved = [*lines, {"step": 50, "event": "reference_update"}]
    means = {
        len(case): drawn("rewards", case).get_legend_handles_labels()[0][0].get_ydata()
        for case in (lines, moved)
    }
    assert any(0 < value < 1 for value in means[100])
    assert set(means[101]) == {0.0, 1.0}


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": float("inf")},
    ]
    assert plots.series(plots.read_metrics(write_run(tmp_path / "run", lines)), "loss") == (
        [1],
        [1.0],
    )


def test_comparison_draws_gold_against_kl_and_an_overview(tmp_path):
    runs = {
        "DPO": write_run(tmp_path / "dpo", preference_lines(every=0)),
        "TR-DPO": write_run(tmp_path / "tr", preference_lines()),
    }
    paths = plots.plot_comparison(runs, tmp_path / "out")
    names = [path.stem for path in paths]
    assert names[0] == "comparison"
    assert {
        "gold_reward",
        "gold_against_kl",
        "kl_to_initial",
        "anchor_margins",
        "accuracies",
        "loss",
    } <= set(names)
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_comparison_of_runs_without_gold_leaves_it_out(tmp_path):
    runs = {name: write_run(tmp_path / name, preference_lines(gold=False)) for name in "ab"}
    names = {path.stem for path in plots.plot_comparison(runs, tmp_path / "out")}
    assert "accuracies" in names
    assert not names & {"gold_reward", "gold_against_kl", "kl_to_initial"}


def test_a_torn_last_line_of_a_live_run_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert plots.read_metrics(run) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("broken", ["{", "[1]", '{"loss": 1}', '{"step": "a"}', "nonsense"])
def test_a_broken_line_is_named(broken, tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(broken + '\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(FasttrError, match=r"metrics\.jsonl, line 2") as caught:
        plots.plot_run(run)
    assert "\n" not in str(caught.value)


def test_missing_runs_and_runs_with_nothing_to_draw_are_refused(tmp_path):
    with pytest.raises(FasttrError, match="is no folder"):
        plots.plot_run(tmp_path / "none")
    with pytest.raises(FasttrError, match="no metrics"):
        plots.plot_run(tmp_path)
    empty = write_run(tmp_path / "empty", [{"step": 1, "other": 1.0}])
    with pytest.raises(FasttrError, match="no metric that is drawn"):
        plots.plot_run(empty)
    with pytest.raises(FasttrError, match="metric to compare"):
        plots.plot_comparison({"a": empty}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (empty / "plots").exists()


def compared(name, data):
    """The axes of one picture of several runs."""
    return plots.comparison_figures(data)[name].axes[0]


def curve(ax, label):
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return dict(zip(found.get_xdata(), found.get_ydata(), strict=True))


def test_where_policy_and_reference_are_equal_no_accuracy_is_drawn():
    tied = {"eval_ref/distance": 0.0, "eval_rewards/accuracies": 0.0, "eval_loss": 0.69}
    later = {"eval_ref/distance": 1.0, "eval_rewards/accuracies": 0.7, "eval_loss": 0.6}
    lines = [{"step": 0, **tied}, {"step": 5, **later}, {"step": 9, **later}]
    ax = drawn("accuracies", lines)
    assert curve(ax, "held out, against the reference") == {5: 0.7, 9: 0.7}
    assert curve(drawn("loss", lines), "held out") == {0: 0.69, 5: 0.6, 9: 0.6}


def test_a_comparison_draws_the_accuracy_that_compares():
    """Against the initial policy, as the table of the demo and the report have it."""
    ax = compared("accuracies", {"a": preference_lines(), "b": preference_lines(every=0)})
    assert ax.get_title(loc="left") == "Held-out accuracy against the initial policy"
    assert curve(ax, "a")[100] == pytest.approx(0.65)


def test_gold_against_drift_has_crosses_and_no_band_that_could_fold_back():
    lines = preference_lines()
    for line in lines:
        if "eval_kl_to_initial" in line:  # it goes out and comes back
            line["eval_kl_to_initial"] = 4 - abs(line["step"] - 50) / 20
    ax = compared("gold_against_kl", {"a": lines})
    assert {type(one).__name__ for one in ax.collections} == {"LineCollection"}
    over_steps = compared("gold_reward", {"a": lines})
    assert all("Poly" in type(one).__name__ for one in over_steps.collections)
    assert len(over_steps.collections) == 1


def test_moves_of_the_reference_do_not_stretch_a_comparison():
    still = compared("accuracies", {"a": preference_lines(every=0)})
    moving = compared("accuracies", {"a": preference_lines(every=2)})
    assert still.get_ylim() == moving.get_ylim()
    assert "reference updates" in moving.get_legend_handles_labels()[1]


def test_standard_errors_are_bands():
    lines = [
        {"step": step, "eval_rewards/accuracies": 0.6, "eval_rewards/accuracies_stderr": 0.05}
        for step in (1, 2, 3)
    ]
    (band,) = drawn("accuracies", lines).collections
    low, high = band.get_datalim(band.axes.transData).intervaly
    assert (low, high) == pytest.approx((0.55, 0.65))


def test_every_picture_of_a_run_has_its_name():
    figures = plots.run_figures(preference_lines(), "tr-dpo-soft")
    assert len(figures) == 6
    for figure in figures.values():
        assert "tr-dpo-soft" in [text.get_text() for text in figure.texts]


def test_a_legend_has_as_many_columns_as_fit():
    long = ["held out, against the initial policy"] * 5
    assert 5 * len(long[0]) > 83
    assert plots.legend_columns(long, characters=83) == 1
    assert plots.legend_columns(["train", "held out"], characters=83) == 2


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert list(plots.run_names(folders)) == ["a/run", "b/run"]
    assert list(plots.run_names([tmp_path / "dpo", tmp_path / "ipo"])) == ["dpo", "ipo"]
    with pytest.raises(FasttrError, match="is given twice"):
        plots.run_names([tmp_path / "a", tmp_path / "x" / ".." / "a"])


def test_the_command_draws_one_run_or_several(tmp_path, capsys):
    a = write_run(tmp_path / "a", [{"step": step, "loss": 1.0 / step} for step in range(1, 5)])
    b = write_run(tmp_path / "b", [{"step": step, "loss": 2.0 / step} for step in range(1, 5)])
    main(["plot", str(a)])
    assert capsys.readouterr().out.split() == [str(a / "plots" / "loss.png")]
    main(["plot", str(a), str(b), "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--output_dir", "x"], "got no run; wanted one or more"),
        (["a", "--outputdir", "x"], "unknown key 'outputdir' .did you mean 'output_dir'"),
        (["a", "b", "--output_dir"], "output_dir: got no value"),
        (["a", "--output_dir", "x"], "pictures of one run go into RUN/plots"),
    ],
)
def test_mistakes_of_the_command_are_one_line(words, answer, capsys):
    assert re.search(answer, error_line(capsys, ["plot", *words]))


def test_of_two_held_out_curves_that_are_one_the_last_is_drawn():
    key = "rewards/accuracies"
    fixed = [
        {"step": step, f"eval_{key}": 0.6 + step / 50, f"eval_anchor/{key}": 0.6 + step / 50}
        for step in (1, 2, 3)
    ]
    moving = [*fixed[:2], {**fixed[2], f"eval_{key}": 0.5}]
    labels = [
        drawn("accuracies", lines).get_legend_handles_labels()[1] for lines in (fixed, moving)
    ]
    assert [label for label in labels[0] if "held" in label] == [
        "held out, against the initial policy"
    ]
    assert len([label for label in labels[1] if "held" in label]) == 2
