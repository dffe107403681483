"""The autoencoder: its training, its embeddings, and the files that it loads or refuses."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from pipeline.autoencoder import Autoencoder, load_autoencoder, new_autoencoder, save_autoencoder
from pipeline.config import AutoencoderConfig
from pipeline.errors import PrepareError
from pipeline.stages.embed import encode_scans, make_embeddings, set_centre
from pipeline.training import Training, steps_done, train_autoencoder
from store import PatchStore

CONFIG = AutoencoderConfig(width=4, latent=16, max_steps=24, batch_size=6, threads=1)
NUM_SCANS = 16
TRAIN, VALIDATION = np.arange(12), np.arange(12, 16)
BOX_MM = np.array([[[0.0, 0, 0], [300, 250, 350]]])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bodies() -> NDArray[np.uint8]:
    """Thumbnails of two kinds by turns, a ball high or low in the box, nowhere quite alike."""
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[:64, :128, :128]
    scans = np.empty((NUM_SCANS, 64, 128, 128), np.uint8)
    for number, scan in enumerate(scans):
        centre = np.array([16 if number % 2 else 48, 64, 64]) + rng.uniform(-4, 4, 3)
        radius = rng.uniform(24, 30)
        far = ((z - centre[0]) * 2) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
        scan[...] = np.where(far < radius**2, 200, 30) + rng.integers(0, 20, scan.shape)
    return scans


Read = Callable[[NDArray[Any]], NDArray[np.uint8]]


@pytest.fixture(scope="module")
def read(bodies: NDArray[np.uint8]) -> Read:
    return lambda rows: bodies[rows]


def train(
    read: Read, checkpoint: Path, config: AutoencoderConfig = CONFIG, **options: Any
) -> tuple[Autoencoder, Training]:
    given = {"train": TRAIN, "validation": VALIDATION, "seed": 3, **options}
    return train_autoencoder(read, config=config, checkpoint=checkpoint, **given)


@pytest.fixture(scope="module")
def trained(read: Read, tmp_path_factory: pytest.TempPathFactory) -> tuple[Autoencoder, Training]:
    return train(read, tmp_path_factory.mktemp("trained") / "autoencoder.pt")


def embed(model: Autoencoder, read: Read, num: int = NUM_SCANS) -> NDArray[np.float32]:
    return make_embeddings(encode_scans(model, read, num), model, BOX_MM.repeat(num, axis=0))


@pytest.fixture(scope="module")
def centred(trained: tuple[Autoencoder, Training], read: Read) -> Autoencoder:
    """The trained model with the centre of the training scans."""
    model = copy.deepcopy(trained[0])
    set_centre(model, encode_scans(model, read, NUM_SCANS), np.arange(NUM_SCANS) < len(TRAIN))
    return model


@pytest.fixture(scope="module")
def embeddings(centred: Autoencoder, read: Read) -> NDArray[np.float32]:
    return embed(centred, read)


def assert_same_weights(one: Autoencoder, other: Autoencoder) -> None:
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def validation_loss(model: Autoencoder, read: Read) -> float:
    images = Autoencoder.reduce(torch.from_numpy(read(VALIDATION)).unsqueeze(1).float() / 255)
    with torch.no_grad():
        return float(torch.nn.functional.mse_loss(model(images), images))


# Training ----------------------------------------------------------------------------------------


def test_the_validation_loss_falls(trained: tuple[Autoencoder, Training], read: Read) -> None:
    model, _ = trained
    untrained = new_autoencoder(CONFIG, 3).eval()
    assert validation_loss(model, read) < 0.3 * validation_loss(untrained, read)


def test_the_returned_weights_have_the_returned_loss(
    trained: tuple[Autoencoder, Training], read: Read
) -> None:
    model, training = trained
    assert validation_loss(model, read) == pytest.approx(training.validation_loss, rel=1e-4)


def test_the_nearest_scan_is_of_the_same_kind(embeddings: NDArray[np.float32]) -> None:
    vectors = embeddings.astype(float)
    distance = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (distance.argmin(axis=1) % 2).tolist() == [number % 2 for number in range(NUM_SCANS)]


def test_training_again_gives_the_same_weights_whatever_the_global_seed(
    trained: tuple[Autoencoder, Training], read: Read, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    model, training = train(read, tmp_path / "again.pt")
    assert_same_weights(model, trained[0])
    assert training == trained[1]


def test_the_global_random_state_is_not_changed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    new_autoencoder(CONFIG, 3)
    assert torch.equal(torch.rand(3), expected)


def test_another_seed_begins_with_other_weights() -> None:
    one, other = new_autoencoder(CONFIG, 3), new_autoencoder(CONFIG, 4)
    assert not torch.equal(one.expand.weight, other.expand.weight)


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7])
def test_a_killed_training_ends_with_the_same_weights(
    trained: tuple[Autoencoder, Training],
    read: Read,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    monkeypatch.setattr("pipeline.training._CHECKPOINT_STEPS", 6)  # every third epoch
    steps: list[int] = []

    def die(count: int) -> None:
        steps.append(count)
        if len(steps) == after:
            raise Killed

    with pytest.raises(Killed):
        train(read, tmp_path / "killed.pt", advance=die)
    model, training = train(read, tmp_path / "killed.pt", advance=die)
    assert_same_weights(model, trained[0])
    assert training == trained[1]
    resumed_at = 6 * (after // 3)  # the step of the checkpoint
    assert sum(steps[after:]) == CONFIG.max_steps - resumed_at


def test_the_steps_of_an_interrupted_training_are_known(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training._CHECKPOINT_STEPS", 6)
    assert steps_done(tmp_path / "none.pt") == 0
    train(read, tmp_path / "checkpoint.pt", config=dataclasses.replace(CONFIG, max_steps=14))
    assert steps_done(tmp_path / "checkpoint.pt") == 12


def test_no_more_steps_are_taken_than_allowed(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[None] = []
    step = torch.optim.Adam.step

    def count(self: torch.optim.Adam, *arguments: Any) -> Any:
        steps.append(None)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", count)
    few = dataclasses.replace(CONFIG, max_steps=4, batch_size=2)  # six steps would be an epoch
    train(read, tmp_path / "few.pt", few)
    assert len(steps) == 4


def test_training_stops_when_the_validation_loss_no_longer_falls(
    read: Read, tmp_path: Path
) -> None:
    epochs: list[int] = []
    still = dataclasses.replace(CONFIG, learning_rate=1e-30, patience=3)
    train(read, tmp_path / "still.pt", still, advance=epochs.append)
    assert len(epochs) == 4


def test_without_validation_scans_the_training_scans_count(read: Read, tmp_path: Path) -> None:
    short = dataclasses.replace(CONFIG, max_steps=2)
    _, training = train(read, tmp_path / "alone.pt", short, validation=np.arange(0))
    assert np.isfinite(training.validation_loss)


# Embeddings --------------------------------------------------------------------------------------


def test_the_output_depends_on_the_embedding_alone(
    trained: tuple[Autoencoder, Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = trained
    images = torch.rand(2, 1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(*model(images))
        fixed = model.encode(images[:1]).expand(2, -1)
        monkeypatch.setattr(model, "encode", lambda _: fixed)
        one, other = model(images)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_an_embedding_does_not_depend_on_the_other_scans(
    centred: Autoencoder, embeddings: NDArray[np.float32], read: Read
) -> None:
    for row in (0, 5, 15):
        alone = embed(centred, lambda rows, row=row: read(rows + row), 1)
        np.testing.assert_array_equal(embeddings[row], alone[0])


def test_embeddings_are_unit_vectors_and_two_numbers_more(
    embeddings: NDArray[np.float32],
) -> None:
    assert embeddings.shape == (NUM_SCANS, CONFIG.latent + 2)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings[:, :-2], axis=1), 1, atol=1e-6)


def test_the_last_two_numbers_compare_the_sizes_of_two_boxes(centred: Autoencoder) -> None:
    boxes_mm = BOX_MM.repeat(2, axis=0)
    boxes_mm[1, :, 1] = 40, 40 + 250 * np.e
    boxes_mm[1, :, 2] *= 0.5
    one, other = make_embeddings(np.ones((2, CONFIG.latent), np.float32), centred, boxes_mm)
    np.testing.assert_allclose((other - one)[-2:], [1, np.log(0.5)], atol=1e-6)
    np.testing.assert_array_equal(one[:-2], other[:-2])


def test_a_scan_at_the_centre_has_an_embedding() -> None:
    model = new_autoencoder(CONFIG, 0)
    latent = np.ones((1, CONFIG.latent), np.float32)
    set_centre(model, latent, np.array([True]))
    assert (make_embeddings(latent, model, BOX_MM)[0, :-2] == 0).all()


def test_a_store_has_the_embeddings_that_its_weights_give(
    prepared: Path, patches: PatchStore
) -> None:
    model = load_autoencoder(prepared / "scans/embedding/autoencoder.safetensors")
    latent = encode_scans(model, patches.thumbnails.read, len(patches.scans.id))
    found = make_embeddings(latent, model, patches.scans.frame_mm)
    np.testing.assert_array_equal(found, patches.scans.embedding)


def test_the_centre_is_the_mean_of_the_training_scans(prepared: Path, patches: PatchStore) -> None:
    model = load_autoencoder(prepared / "scans/embedding/autoencoder.safetensors")
    latent = encode_scans(model, patches.thumbnails.read, len(patches.scans.id))
    mean = latent[patches.scans.split == 0].mean(axis=0)
    np.testing.assert_allclose(model.centre.numpy(), mean, rtol=1e-4, atol=1e-6)


# Files -------------------------------------------------------------------------------------------


def test_saved_weights_are_loaded_with_their_shape(centred: Autoencoder, tmp_path: Path) -> None:
    save_autoencoder(centred, tmp_path / "weights.safetensors")
    loaded = load_autoencoder(tmp_path / "weights.safetensors")
    assert (loaded.latent, loaded.width) == (CONFIG.latent, CONFIG.width)
    assert_same_weights(loaded, centred)


def test_the_same_weights_are_the_same_file(
    trained: tuple[Autoencoder, Training], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        save_autoencoder(trained[0], tmp_path / f"{name}.safetensors")
    one, two = tmp_path.iterdir()
    assert one.read_bytes() == two.read_bytes()


def make_text(path: Path) -> None:
    path.write_text("weights")


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_pickle(path: Path) -> None:
    torch.save(new_autoencoder(CONFIG, 0).state_dict(), path)


def make_foreign(path: Path) -> None:
    save_file({"conv.weight": torch.zeros(3)}, path, metadata={"format": "pt"})


def make_lacking(path: Path) -> None:
    shape = '{"version": 2, "latent": 16, "width": 4}'
    save_file({"expand.bias": torch.zeros(3)}, path, metadata={"semgen-autoencoder": shape})


def make_truncated(path: Path) -> None:
    save_autoencoder(new_autoencoder(CONFIG, 0), path)
    path.write_bytes(path.read_bytes()[:-100])


def make_nonsense(path: Path) -> None:
    shape = '{"latent": "many", "width": 4}'
    save_file({"expand.bias": torch.zeros(3)}, path, metadata={"semgen-autoencoder": shape})


@pytest.mark.parametrize(
    "make",
    [
        make_text,
        make_empty,
        make_pickle,
        make_foreign,
        make_lacking,
        make_truncated,
        make_nonsense,
    ],
)
def test_files_of_anything_else_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "weights.file")
    with pytest.raises(PrepareError, match=r"weights\.file: not an autoencoder that semgen wrote"):
        load_autoencoder(tmp_path / "weights.file")


def test_weights_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    weights = new_autoencoder(CONFIG, 0).state_dict()
    del weights["centre"]
    metadata = {"semgen-autoencoder": '{"latent": 16, "width": 4}'}
    save_file(weights, tmp_path / "old.file", metadata=metadata)
    with pytest.raises(PrepareError, match=r"old\.file: autoencoder of another version of semgen"):
        load_autoencoder(tmp_path / "old.file")
