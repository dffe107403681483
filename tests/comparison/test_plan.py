"""Plans of comparisons: the list of trials, and what is refused before any training."""

from pathlib import Path

import pytest

from tests.support.comparison import PLAN
from tests.support.finetuning import write_manifest
from trainer import TrainError
from trainer.comparison.plan import list_trials, read_plan


def test_trials_differ_in_seed_and_share_the_split(folder: Path) -> None:
    plan = read_plan(folder / "plan.toml")
    trials = list_trials(plan)
    assert len(trials) == 2 * 2 * 2
    assert {trial.config.seed for trial in trials} == {0, 1}
    assert {trial.config.split_seed for trial in trials} == {0}
    assert {t.config.learning_rate for t in trials if t.start == "faster"} == {0.01}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[tasks.balls]", "[task.balls]", "unknown setting task; did you mean tasks"),
        ("trials = 2", "trials = 1.5", "trials must be a whole number, got 1.5"),
        ("trials = 2", 'trials = "many"', "trials must be a whole number, got 'many'"),
        ("trials = 2", "trials = 0", "trials must be >= 1"),
        ("trials = 2", "label_fractions = 0.5", "label_fractions must be a list of numbers"),
        ("trials = 2", "label_fractions = []", "label_fractions must be in"),
        ("trials = 2", "label_fractions = [0.5, 1.5]", "label_fractions must be in"),
        ("trials = 2", "label_fractions = [0.5, 0.5]", "label_fractions must differ"),
        ("trials = 2", 'keep_weights = "no"', "keep_weights must be true or false, got 'no'"),
        ("trials = 2", "trails = 2", "unknown setting trails; did you mean trials"),
        (
            '[tasks.balls]\npath = "balls.csv"\nfolds = 2',
            "[tasks]\nballs = 3",
            "tasks.balls must be a table",
        ),
        ('path = "balls.csv"', "path = 3", "task balls: path must be text, got 3"),
        ('path = "balls.csv"', "", "task balls: needs a path"),
        (
            'path = "balls.csv"',
            'path = "balls.csv"\ninit = "x"',
            r"init cannot be set here: .* \[starts.NAME\]",
        ),
        ("folds = 2", "folds = 2\nfold = 1", "fold cannot be set here: every fold is run"),
        ("width = 2", f"seed = {2**63 - 1}", r"seed \+ trials must be at most 2\^63"),
        ("folds = 2", "split_seed = -1", "split_seed must be >= 0"),
        ("folds = 2", "test_fraction = 0", "there are no test cases"),
        (
            "[starts.scratch]",
            '[starts.scratch]\ninit = "runs/no"',
            "start scratch: init: .*runs/no: no such file",
        ),
        ("width = 2", "widht = 2", "unknown setting widht; did you mean width"),
        ("width = 2", 'mirror = "no"', "mirror must be true or false, got 'no'"),
        ("width = 2", "threads = 1.5", "threads must be a whole number, got 1.5"),
        (
            "width = 2",
            "seed = 1.5",
            "task balls, start scratch: seed must be a whole number, got 1.5",
        ),
        ("width = 2", 'seed = "a"', "seed must be a whole number, got 'a'"),
        ("width = 2", "window_hu = [1]", "window_hu must be a list of 2 numbers, got"),
        ("width = 2", 'window_hu = [1, "a"]', "window_hu must be a list of 2 numbers, got"),
        ("width = 2", 'label_fraction = "half"', "label_fraction must be a number, got 'half'"),
        ("folds = 2", 'folds = "two"', "folds must be a whole number, got 'two'"),
        ("width = 2", "width = 0", "task balls, start scratch: width must be >= 1"),
        ('adds_to = "scratch"', 'adds_to = "none"', "adds_to 'none' is not a starting point"),
        ('path = "balls.csv"', 'path = "no.csv"', "no such task"),
        ("trials = 2", "trials = ", "cannot be read as TOML"),
        ("folds = 2", 'folds = 2\nmetric = "size"', "metric must be one of dice, iou"),
        ("folds = 2", 'folds = 2\nmetric = "auc"', "segmentation: metric must be one of dice, iou"),
    ],
)
def test_an_invalid_plan_is_refused(folder: Path, old: str, new: str, message: str) -> None:
    file = folder / "broken.toml"
    file.write_text(PLAN.replace(old, new))
    with pytest.raises(TrainError, match=f"broken.toml.*{message}"):
        read_plan(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks = 3\n[starts.scratch]", "tasks must be a table, got 3"),
        ("defaults = 3\n[starts.scratch]", "defaults must be a table, got 3"),
        ('[tasks.balls]\npath = "balls.csv"', "has no starts"),
        ("[starts.scratch]", "has no tasks"),
    ],
)
def test_a_plan_without_its_tables_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(TrainError, match=message):
        read_plan(tmp_path / "plan.toml")


@pytest.mark.parametrize("name", ["", ".", "..", "...", "../x", "a/b", "a b", "-"])
@pytest.mark.parametrize("table", ["[tasks.balls]", "[starts.faster]"])
def test_names_that_cannot_name_a_folder_are_refused(folder: Path, table: str, name: str) -> None:
    file = folder / "named.toml"
    file.write_text(PLAN.replace(table, f'{table.partition(".")[0]}."{name}"]'))
    with pytest.raises(TrainError, match="must be a plain name"):
        read_plan(file)


@pytest.mark.parametrize(
    ("labels", "metric", "message"),
    [
        ("ababab", "dice", "classification: metric must be one of auc, accuracy, got 'dice'"),
        ("aaaabb", "auc", "all test cases have the same label"),
    ],
)
def test_a_metric_that_the_test_cases_cannot_give_is_refused(
    folder: Path, labels: str, metric: str, message: str
) -> None:
    splits = ["test", "test", "train", "train", "train", "train"]
    write_manifest(
        folder / "kinds.csv",
        [
            {"image": f"{number}_image.nii.gz", "label": label, "split": split}
            for number, (label, split) in enumerate(zip(labels, splits, strict=True))
        ],
    )
    file = folder / "kinds.toml"
    file.write_text(
        PLAN.replace("balls.csv", "kinds.csv").replace("folds = 2", f'metric = "{metric}"')
    )
    with pytest.raises(TrainError, match=message):
        read_plan(file)
