"""Pretraining runs: losses, metrics, checkpoints, exact resume."""

import dataclasses
import fcntl
import json
import math
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from store import CorruptStore, PatchStore, annotate
from store.settings import to_json
from tests.support.command import run_code
from tests.support.runs import SHAPE, TINY, assert_same_run, read_metrics, tiny
from tests.support.synthetic_store import make_store
from trainer import (
    Ended,
    Event,
    Noticed,
    Saved,
    Started,
    Stepped,
    TrainConfig,
    TrainError,
    Validated,
    pretrain,
)
from trainer.data.dataset import PatchDataset
from trainer.data.plan import draw_patients
from trainer.nets.registry import build_net
from trainer.objective import Objective
from trainer.pretexts import PRETEXTS
from trainer.record import draw_slices
from trainer.transforms.draws import Draws
from trainer.transforms.genesis import perturb_genesis


@pytest.fixture(scope="module")
def cubic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose crops may be cut in eight."""
    folder = tmp_path_factory.mktemp("data")
    return make_store(folder / "cubic.store", shape=(16, 16, 16), num_train=8, num_validation=2)


def of_kind(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


class Interrupted(Exception):
    """Stands for a kill, which would be too slow in tests that need many."""


# Losses


def test_both_losses_fall_and_restoration_beats_returning_the_input(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "learn.store", shape=(8, 16, 16), num_train=16)
    config = TrainConfig(
        width=3, batch_size=12, epochs=8, warmup_epochs=2, learning_rate=3e-3, log_every=8,
        shuffle_blocks=300, validate_every=8,
    )  # fmt: skip
    summary = pretrain(store, tmp_path / "run", config)
    joint = [line for line in read_metrics(tmp_path / "run") if "restoration" in line]
    train = [line for line in joint if line["kind"] == "train"]
    assert train[-1]["restoration"] < 0.9 * train[0]["restoration"]
    assert train[-1]["classification"] < 0.9 * train[0]["classification"]
    assert summary.best["restoration"] < 0.8 * summary.best["identity"]
    assert summary.best["accuracy"] > 0.5  # chance is 1/6


def test_the_warm_up_does_not_change_the_decoder(store: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        pretrain(store, tmp_path / "run", TINY, on_event=stop)
    before = build_net(width=2, num_classes=6, seed=TINY.seed).state_dict()
    after = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith(("up_tr", "out_tr"))} <= same
    assert not {key for key in before if key.endswith("conv1.weight") and "down" in key} & same


def test_losses_are_reported_unweighted_and_summed_weighted(
    whole: tuple[Path, list[Event]],
) -> None:
    for line in read_metrics(whole[0]):
        if "restoration" in line:
            weighed = line["restoration"] + 0.01 * line["classification"]
            assert line["loss"] == pytest.approx(weighed, rel=1e-5)
        else:
            assert line["loss"] == line["classification"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"pretext": "none"}, {"loss", "classification", "accuracy"}),
        ({"classify": False}, {"loss", "restoration", "identity"}),
    ],
)
def test_each_loss_can_be_trained_alone(
    store: Path, tmp_path: Path, changes: dict[str, Any], names: set[str]
) -> None:
    summary = pretrain(store, tmp_path / "run", tiny(steps=2, warmup_epochs=None, **changes))
    assert summary.last.keys() == names


@pytest.mark.parametrize("classify", [True, False])
@pytest.mark.parametrize("pretext", [name for name in PRETEXTS if name != "none"])
def test_every_task_trains_with_and_without_classes(
    cubic: Path, tmp_path: Path, pretext: str, classify: bool
) -> None:
    config = tiny(pretext=pretext, classify=classify, epochs=2, steps=None)
    summary = pretrain(cubic, tmp_path / "run", config)
    assert {"loss", PRETEXTS[pretext].metric} <= summary.last.keys()
    assert ("accuracy" in summary.last) == classify
    assert (tmp_path / "run/samples.png").exists() == PRETEXTS[pretext].decodes


@pytest.mark.parametrize("pretext", ["rubik", "inpainting"])
def test_every_task_resumes_bit_for_bit(cubic: Path, tmp_path: Path, pretext: str) -> None:
    config = tiny(pretext=pretext, epochs=2)
    pretrain(cubic, tmp_path / "whole", config)
    pretrain(cubic, tmp_path / "run", dataclasses.replace(config, steps=7))
    pretrain(cubic, tmp_path / "run", config)
    ours, theirs = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        for name in ("run", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("cache", ["none", "memory", "device", "auto"])
def test_a_cache_changes_nothing(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path, cache: str
) -> None:
    pretrain(store, tmp_path / "run", tiny(cache=cache))
    ours, theirs = (run / "metrics.jsonl" for run in (tmp_path / "run", whole[0]))
    assert ours.read_bytes() == theirs.read_bytes()


def test_accumulated_gradients_are_the_mean_over_the_batch(store: Path, tmp_path: Path) -> None:
    config = tiny(steps=1, accumulate=3, pretext="none")
    pretrain(store, tmp_path / "run", config)
    batch = next(iter(PatchDataset(store, batch_size=16, seed=config.seed)))
    crops, labels = batch.images(), batch.labels
    draws = Draws.keyed(config.seed, "train", 0, rows=batch.rows)
    inputs = perturb_genesis(crops, draws, num_blocks=config.shuffle_blocks)
    net = build_net(width=2, num_classes=6, decoder=False, seed=config.seed).train()
    loss = sum(
        F.cross_entropy(net(part).logits, named, reduction="sum")
        for part, named in zip(inputs.tensor_split(3), labels.tensor_split(3), strict=True)
    )
    (loss / len(labels)).backward()  # type: ignore[union-attr]
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["optimiser"]["state"]
    for parameter, state in zip(net.parameters(), saved.values(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(10 * state["exp_avg"], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_plateau_cuts_the_learning_rate(store: Path, tmp_path: Path) -> None:
    config = tiny(
        pretext="none", epochs=8, lr_schedule="plateau", lr_step_epochs=1, learning_rate=0.5
    )
    pretrain(store, tmp_path / "run", config)
    lines = read_metrics(tmp_path / "run")
    best, waited, rate, seen = math.inf, 0, 0.5, []
    for line in lines:
        if line["kind"] == "train":
            seen.append((line["learning_rate"], rate))
            continue
        waited = 0 if line["loss"] < best else waited + 1
        best = min(best, line["loss"])
        if waited == 1:
            rate, waited = rate / 2, 0
    assert all(ours == pytest.approx(expected) for ours, expected in seen)
    assert rate < 0.5


def test_the_joint_phase_starts_with_the_initial_learning_rate(store: Path, tmp_path: Path) -> None:
    """Cuts of the warm-up do not count in the joint phase."""
    config = tiny(  # at this learning rate nothing improves
        epochs=5, warmup_epochs=4, lr_schedule="plateau", lr_step_epochs=1, learning_rate=1e-30,
        log_every=5,
    )  # fmt: skip
    pretrain(store, tmp_path / "run", config)
    rates = [m["learning_rate"] for m in read_metrics(tmp_path / "run") if m["kind"] == "train"]
    assert min(rates[:4]) < 1e-30
    assert rates[4] == 1e-30


class TestSelection:
    @pytest.fixture
    def seen(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[bool, set[int]]]:
        """Labels that losses are computed of, in training (True) and in validation (False)."""
        seen: dict[bool, set[int]] = {True: set(), False: set()}
        losses = Objective.losses

        def watched(self: Objective, output: Any, example: Any, labels: torch.Tensor) -> Any:
            seen[torch.is_grad_enabled()] |= set(labels.tolist())
            return losses(self, output, example, labels)

        monkeypatch.setattr(Objective, "losses", watched)
        return seen

    def test_crops_of_other_classes_are_used_neither_in_training_nor_in_validation(
        self, store: Path, tmp_path: Path, seen: dict[bool, set[int]]
    ) -> None:
        pretrain(store, tmp_path / "run", tiny(epochs=1, warmup_epochs=0, classes=(0, 2)))
        assert seen == {True: {0, 2}, False: {0, 2}}

    def test_crops_of_excluded_classes_are_used_neither_in_training_nor_in_validation(
        self, store: Path, tmp_path: Path, seen: dict[bool, set[int]]
    ) -> None:
        pretrain(store, tmp_path / "run", tiny(epochs=1, warmup_epochs=0, excluded_classes=(1, 4)))
        assert seen == {True: {0, 2, 3, 5}, False: {0, 2, 3, 5}}

    def test_only_the_wanted_classes_and_scales_are_seen(self, store: Path, tmp_path: Path) -> None:
        events: list[Event] = []
        config = tiny(steps=1, warmup_epochs=0, classes=(0, 2), scales=(0,))
        pretrain(store, tmp_path / "run", config, on_event=events.append)
        split = PatchStore(store).train
        wanted = np.isin(split.label, [0, 2]) & (split.scale == 0)
        assert of_kind(events, Started)[0].num_train == wanted.sum()

    def test_excluded_classes_are_left_out_and_a_resumed_run_keeps_its_own(
        self, store: Path, tmp_path: Path
    ) -> None:
        mine = shutil.copytree(store, tmp_path / "mine.store")
        annotate(mine, {1: {"excluded": True}, 4: {"name": "liver"}})
        config = tiny(steps=2, warmup_epochs=0)
        pretrain(mine, tmp_path / "run", dataclasses.replace(config, steps=1))
        annotate(mine, {2: {"excluded": True}})
        events: list[Event] = []
        pretrain(mine, tmp_path / "run", config, on_event=events.append)
        wanted = (PatchStore(mine).train.label != 1).sum()
        assert of_kind(events, Started)[0].num_train == wanted
        saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["config"]
        assert saved["excluded_classes"] == [1]

    def test_excluded_members_are_left_out_and_a_resumed_run_keeps_its_own(
        self, store: Path, tmp_path: Path
    ) -> None:
        mine = shutil.copytree(store, tmp_path / "mine.store")
        annotate(mine, {1: {"excluded_members": [1, 3]}})
        config = tiny(steps=2, warmup_epochs=0)
        pretrain(mine, tmp_path / "run", dataclasses.replace(config, steps=1))
        annotate(mine, {1: {"excluded_members": []}, 2: {"excluded_members": [0]}})
        events: list[Event] = []
        pretrain(mine, tmp_path / "run", config, on_event=events.append)
        split = PatchStore(mine).train
        wanted = ~((split.label == 1) & (split.scan == 1))
        assert of_kind(events, Started)[0].num_train == wanted.sum()
        saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["config"]
        assert saved["excluded_members"] == ["1=0000000000000001", "1=0000000000000003"]

    def test_a_fraction_is_of_patients_and_a_subset_of_a_larger_one(
        self, store: Path, tmp_path: Path
    ) -> None:
        patients = np.array([1, 1, 2, 3, 4, 5, 6, 7, 8, 8])
        some = {f: set(draw_patients(patients, f, 3).tolist()) for f in (0.01, 0.25, 0.5, 1.0)}
        assert [len(some[f]) for f in some] == [1, 2, 4, 8]
        assert some[0.01] < some[0.25] < some[0.5] < some[1.0]
        events: list[Event] = []
        pretrain(
            store,
            tmp_path / "r",
            tiny(steps=1, warmup_epochs=0, fraction=0.3),
            on_event=events.append,
        )
        opened = PatchStore(store)
        of_row = opened.scans.patient[opened.train.scan]
        chosen = draw_patients(of_row, 0.3, TINY.seed)
        assert of_kind(events, Started)[0].num_train == np.isin(of_row, chosen).sum()

    def test_an_unknown_class_is_refused_by_number(self, store: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainError) as caught:
            pretrain(store, tmp_path / "run", tiny(classes=(3, *range(9, 500))))
        assert str(caught.value) == "classes: the store has classes 0 to 5, not 9-499"


def test_bf16_is_refused_where_the_cpu_gets_gradients_wrong(store: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="bf16 gives wrong gradients on the CPU for crops of 8"):
        pretrain(store, tmp_path / "run", tiny(precision="bf16"))


def test_a_run_can_start_from_the_weights_of_another(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path
) -> None:
    config = tiny(steps=1, init=str(whole[0] / "best.pt"), warmup_epochs=0, learning_rate=1e-9)
    pretrain(store, tmp_path / "run", config)
    theirs = torch.load(whole[0] / "best.pt", weights_only=True)["model"]
    ours = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    torch.testing.assert_close(ours["out_tr.final_conv.weight"], theirs["out_tr.final_conv.weight"])


class TestStartingWeightsOfAResumedRun:
    @pytest.fixture
    def begun(self, whole: tuple[Path, list[Event]], store: Path, tmp_path: Path) -> Path:
        """A run that started from best.pt of another; that file is gone since."""
        file = shutil.copy(whole[0] / "best.pt", tmp_path / "start.pt")
        config = tiny(steps=1, warmup_epochs=0, init=str(file), init_part="encoder")
        run = pretrain(store, tmp_path / "run", config).run
        Path(file).unlink()
        return run

    def recorded(self, run: Path) -> tuple[str, str]:
        config = json.loads((run / "config.json").read_text())["config"]
        return Path(config["init"]).name, config["init_part"]

    def test_the_file_is_not_needed_to_resume(self, begun: Path, store: Path) -> None:
        init = str(begun.parent / "start.pt")
        config = tiny(steps=2, warmup_epochs=0, init=init, init_part="encoder")
        assert pretrain(store, begun, config).steps == 2
        assert self.recorded(begun) == ("start.pt", "encoder")

    def test_the_option_is_not_needed_to_resume(self, begun: Path, store: Path) -> None:
        assert pretrain(store, begun, tiny(steps=2, warmup_epochs=0)).steps == 2
        assert self.recorded(begun) == ("start.pt", "encoder")

    def test_other_starting_weights_are_refused_by_name(
        self, begun: Path, whole: tuple[Path, list[Event]], store: Path
    ) -> None:
        other = tiny(steps=2, warmup_epochs=0, init=str(whole[0] / "last.pt"))
        with pytest.raises(TrainError, match=r"init: .*start\.pt.* -> .*last\.pt"):
            pretrain(store, begun, other)
        assert self.recorded(begun) == ("start.pt", "encoder")

    def test_starting_weights_are_refused_for_a_run_that_started_without(
        self, whole: tuple[Path, list[Event]], store: Path
    ) -> None:
        with pytest.raises(TrainError, match=r"init: None -> .*best\.pt"):
            pretrain(store, whole[0], tiny(init=str(whole[0] / "best.pt")))


# Validation


def test_validation_of_the_same_weights_gives_the_same_numbers(
    whole: tuple[Path, list[Event]], store: Path
) -> None:
    """Measured again, in other batches, and compared with the run's metrics."""
    config = dataclasses.replace(TINY, batch_size=7, excluded_classes=(), precision="fp32")
    device = torch.device("cpu")
    pretext = PRETEXTS[config.pretext](SHAPE, config)
    net = build_net(width=2, num_classes=6)
    net.load_state_dict(torch.load(whole[0] / "last.pt", weights_only=True)["model"])
    objective = Objective(config, pretext, num_classes=6, device=device)
    dataset = PatchDataset(store, "validation", batch_size=7)
    measured = objective.measure(net, dataset, joint=True).metrics
    recorded = read_metrics(whole[0])[-1]
    assert {"loss", "restoration", "identity", "classification", "accuracy"} == measured.keys()
    for name, value in measured.items():
        assert value == pytest.approx(recorded[name], rel=1e-5), name


def test_bf16_trains_and_validation_perturbs_in_full_precision(tmp_path: Path) -> None:
    store = make_store(tmp_path / "deep.store", shape=(32, 16, 16), num_train=2, num_validation=1)
    found = [
        pretrain(
            store, tmp_path / precision, tiny(steps=1, warmup_epochs=0, precision=precision)
        ).last
        for precision in ("fp32", "bf16")
    ]
    assert found[0]["identity"] == found[1]["identity"]
    assert np.isfinite(found[1]["loss"])


def test_validation_is_done_every_validate_every_epochs_and_at_the_end_of_both_phases(
    store: Path, tmp_path: Path
) -> None:
    pretrain(store, tmp_path / "run", tiny(epochs=7, validate_every=3))
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "validation"]
    assert [line["epoch"] for line in lines] == [1, 3, 6, 7]


def test_validation_classifies_unperturbed_crops(
    store: Path, whole: tuple[Path, list[Event]]
) -> None:
    run, _ = whole
    net = build_net(width=2, num_classes=6)
    net.load_state_dict(torch.load(run / "last.pt", weights_only=True)["model"])
    crops = PatchStore(store).validation
    hu = torch.from_numpy(crops.read(range(len(crops))).astype(np.float32))[:, None]
    logits = net.eval()(((hu + 1000) / 2000).clamp(0, 1), pretext=False).logits
    accuracy = (logits.argmax(1) == torch.from_numpy(crops.label)).float().mean()
    assert read_metrics(run)[-1]["accuracy"] == pytest.approx(float(accuracy), abs=1e-6)


def test_without_validation_crops_training_loss_chooses_the_best_with_a_notice(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "bare.store", num_validation=0, shape=SHAPE)
    events: list[Event] = []
    pretrain(store, tmp_path / "run", tiny(warmup_epochs=0), on_event=events.append)
    assert "no validation examples" in of_kind(events, Noticed)[0].text
    chosen = [event.metrics["loss"] for event in of_kind(events, Validated) if event.best]
    assert chosen == sorted(chosen, reverse=True)
    assert (tmp_path / "run/best.pt").exists()


def test_training_stops_early_without_improvement(store: Path, tmp_path: Path) -> None:
    config = tiny(epochs=50, warmup_epochs=0, patience=2, learning_rate=1e-30, classify=False)
    summary = pretrain(store, tmp_path / "run", config)
    assert summary.reason == "patience"
    assert summary.epochs < 50


# Selected crops


def test_excluded_classes_and_scales_are_left_out(store: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    config = tiny(steps=1, warmup_epochs=0, excluded_classes=(1, 4), scales=(0,))
    pretrain(store, tmp_path / "run", config, on_event=events.append)
    started = of_kind(events, Started)[0]
    assert (started.num_train, started.num_validation) == (4 * 4, 4 * 4)


def test_no_crops_left_is_an_error(store: Path, tmp_path: Path) -> None:
    every_class = tuple(range(PatchStore(store).num_classes))
    with pytest.raises(TrainError, match="no train crops left"):
        pretrain(store, tmp_path / "run", tiny(excluded_classes=every_class))


@pytest.fixture
def broken(store: Path, tmp_path: Path) -> Path:
    """The store without its first train shard, rows 0 to 15."""
    copy = shutil.copytree(store, tmp_path / "broken.store")
    (copy / "train/patch/c/0/0/0/0").unlink()
    return copy


def test_corrupt_crops_stop_a_run_and_are_named(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptStore, match="train rows"):
        pretrain(broken, tmp_path / "run", TINY)


def test_corrupt_crops_are_skipped_and_counted_on_request(broken: Path, tmp_path: Path) -> None:
    summary = pretrain(broken, tmp_path / "run", tiny(epochs=1, warmup_epochs=0, skip_corrupt=True))
    assert summary.num_skipped == 16


def test_there_is_no_picture_where_all_its_crops_are_corrupt(broken: Path, tmp_path: Path) -> None:
    shutil.rmtree(broken / "validation/patch/c")
    rows = len(PatchStore(broken).validation)
    summary = pretrain(broken, tmp_path / "run", tiny(epochs=1, warmup_epochs=0, skip_corrupt=True))
    assert summary.num_skipped == 16 + rows
    assert not (tmp_path / "run" / "samples.png").exists()


# Files of a run


def test_a_run_writes_all_its_files(whole: tuple[Path, list[Event]]) -> None:
    run, _ = whole
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json", "metrics.jsonl", "last.pt", "best.pt", "samples.png", "samples",
        "tensorboard",
    }  # fmt: skip


def test_config_json_holds_the_settings_and_the_fingerprint(
    whole: tuple[Path, list[Event]], store: Path
) -> None:
    content = json.loads((whole[0] / "config.json").read_text())
    resolved = {
        "precision": "fp32", "excluded_classes": [], "excluded_members": [], "normalise": "window",
    }  # fmt: skip
    assert content["config"] == to_json(TINY) | resolved
    assert content["store_fingerprint"] == PatchStore(store).fingerprint
    (started,) = of_kind(whole[1], Started)
    assert (content["num_parameters"], content["device"]) == (started.num_parameters, "cpu")


def test_metrics_have_a_line_for_every_logged_step_and_validation(
    whole: tuple[Path, list[Event]],
) -> None:
    lines = read_metrics(whole[0])
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [5, 10, 15]


def test_events_hold_the_same_numbers_as_the_metrics(whole: tuple[Path, list[Event]]) -> None:
    run, events = whole
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Ended)
    told = [(event.step, event.metrics["loss"]) for event in of_kind(events, Stepped)]
    assert told == [(m["step"], m["loss"]) for m in read_metrics(run) if m["kind"] == "train"]


def test_the_share_of_time_spent_waiting_for_data_is_reported(
    whole: tuple[Path, list[Event]],
) -> None:
    assert all(0 < event.wait_share < 1 for event in of_kind(whole[1], Stepped))


def test_tensorboard_holds_curves_and_pictures(whole: tuple[Path, list[Event]]) -> None:
    board = EventAccumulator(str(whole[0] / "tensorboard"))
    board.Reload()
    assert {
        "train/loss",
        "train/learning_rate",
        "validation/accuracy",
        "rate/examples_per_s",
    } <= set(board.Tags()["scalars"])
    assert sorted(board.Tags()["images"]) == [
        "perturbed | restored | original",
        "validation/confusion: rows true class, columns predicted",
    ]


def test_a_picture_shows_middle_slices_side_by_side() -> None:
    crops = torch.zeros(2, 1, 4, 64, 64)
    crops[1, 0, 2] = 1
    picture = draw_slices({"dark, then bright": crops, "half": crops / 2})
    assert picture.size == (2 * 130, 20 + 2 * 130)
    middles = [picture.getpixel((x, y)) for y in (84, 214) for x in (64, 194)]
    assert middles == [0, 0, 255, 128]


def test_the_best_checkpoint_is_that_of_the_lowest_joint_loss(
    whole: tuple[Path, list[Event]],
) -> None:
    run, _ = whole
    joint = [m for m in read_metrics(run) if m["kind"] == "validation" and "restoration" in m]
    best = min(joint, key=lambda m: m["loss"])
    saved = torch.load(run / "best.pt", weights_only=True)["progress"]
    assert (saved["step"], saved["best"]["loss"]) == (best["step"], best["loss"])


def test_the_learning_rate_schedule_starts_again_in_each_phase(store: Path, tmp_path: Path) -> None:
    config = tiny(epochs=4, lr_step_epochs=1, log_every=5, warmup_epochs=2)
    pretrain(store, tmp_path / "run", config)
    rates = [m["learning_rate"] for m in read_metrics(tmp_path / "run") if m["kind"] == "train"]
    assert rates == [1e-3, 5e-4, 1e-3, 5e-4]


# Resume


CHILD = """
import os, signal
import torch
from trainer import Stepped, TrainConfig, pretrain
torch.set_num_threads(1)
def kill(event):
    if isinstance(event, Stepped) and event.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
pretrain({store!r}, {run!r}, TrainConfig(**{config!r}), on_event=kill)
"""


def test_a_run_killed_and_resumed_equals_the_uninterrupted_one(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path
) -> None:
    config = tiny(checkpoint_every=3)  # so the kill loses steps 7 and 8, and a line of metrics
    names = {"store": str(store), "run": str(tmp_path / "run"), "config": to_json(config)}
    killed = run_code(CHILD.format(**names))
    assert killed.returncode == -signal.SIGKILL
    pretrain(store, tmp_path / "run", config)
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("moment", [1, 3, 7, 11, 16, 22])
def test_a_run_stopped_at_any_event_resumes_exactly(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path, moment: int
) -> None:
    seen = 0

    def interrupt(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            raise Interrupted

    with pytest.raises(Interrupted):
        pretrain(store, tmp_path / "run", TINY, on_event=interrupt)
    pretrain(store, tmp_path / "run", TINY)
    assert_same_run(tmp_path / "run", whole[0])


def test_a_run_can_be_made_longer(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path
) -> None:
    pretrain(store, tmp_path / "run", tiny(epochs=2))
    pretrain(store, tmp_path / "run", TINY)
    ours, theirs = (torch.load(run / "last.pt", weights_only=True)["model"]
                    for run in (tmp_path / "run", whole[0]))  # fmt: skip
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_complete_run_is_reported_and_not_changed(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    summary = pretrain(store, run, TINY)
    assert summary.already_complete
    assert (summary.steps, summary.reason) == (15, "epochs")
    assert_same_run(run, whole[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 3}, "width: 2 -> 3"),
        ({"seed": 6}, "seed: 5 -> 6"),
        ({"classify": False}, "classify"),
    ],
)
def test_other_settings_are_refused_by_name(
    whole: tuple[Path, list[Event]], store: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(TrainError, match=f"other settings.*{named}"):
        pretrain(store, whole[0], tiny(**changes))


def test_another_store_is_refused(whole: tuple[Path, list[Event]], tmp_path: Path) -> None:
    other = make_store(tmp_path / "other.store", seed=9, shape=SHAPE)
    with pytest.raises(TrainError, match="trained on data with fingerprint"):
        pretrain(other, whole[0], TINY)


def test_a_refusal_does_not_change_the_run(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(TrainError):
        pretrain(store, run, tiny(width=3))
    for name in ("config.json", "metrics.jsonl", "last.pt"):
        assert (run / name).read_bytes() == (whole[0] / name).read_bytes()


def test_two_writers_on_one_run_are_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TrainError, match="another process is training here"):
            pretrain(store, tmp_path / "run", TINY)


def test_a_broken_checkpoint_is_reported_in_one_line(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    with pytest.raises(TrainError, match="not a readable checkpoint"):
        pretrain(store, run, TINY)


def test_a_truncated_metrics_file_is_refused(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(TrainError, match="shorter than when the checkpoint was saved"):
        pretrain(store, run, tiny(epochs=5))


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_path_that_holds_something_else_is_refused(
    store: Path, tmp_path: Path, as_folder: bool
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("precious")
    run = tmp_path / "thesis" if as_folder else tmp_path / "thesis/chapter.txt"
    with pytest.raises(TrainError, match="give another RUN"):
        pretrain(store, run, TINY)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


# Errors


def test_a_diverged_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    store: Path, tmp_path: Path
) -> None:
    run, events = tmp_path / "run", []
    with pytest.raises(TrainError, match="training diverged"):
        pretrain(
            store,
            run,
            tiny(warmup_epochs=0, learning_rate=1e20, checkpoint_every=1, log_every=1),
            on_event=events.append,
        )
    saved = of_kind(events, Saved)
    weights = torch.load(run / "last.pt", weights_only=True)["model"] if saved else {}
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_warm_up_of_all_epochs_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="warmup_epochs must be less than the epochs"):
        pretrain(store, tmp_path / "run", tiny(steps=4))


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda", "cuda:99"])
def test_a_device_that_is_not_usable_is_refused_and_usable_ones_are_named(
    store: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(TrainError) as caught:
        pretrain(store, tmp_path / "run", tiny(device=device))
    told = str(caught.value)
    assert told.startswith(f"device '{device}' cannot be used here")
    assert told.endswith("give auto or cpu")
    assert ("PyTorch finds no GPU" in told) == device.startswith("cuda")


@pytest.mark.parametrize("existed", [False, True])
def test_a_refused_training_creates_no_files(store: Path, tmp_path: Path, existed: bool) -> None:
    run = tmp_path / "run"
    if existed:
        run.mkdir()
    with pytest.raises(TrainError):
        pretrain(store, run, tiny(device="abacus"))
    assert list(tmp_path.rglob("*")) == ([run] if existed else [])


def test_a_compiled_net_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced forwards and backwards; PyTorch's default would then take a minute for C++ code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    store = make_store(tmp_path / "bare.store", num_validation=0, shape=SHAPE)
    config = tiny(pretext="none", epochs=1, warmup_epochs=0, batch_size=36)
    plain, compiled = (
        pretrain(store, tmp_path / str(chosen), dataclasses.replace(config, compile=chosen))
        for chosen in (False, True)
    )
    assert compiled.last == pytest.approx(plain.last, rel=1e-3)
