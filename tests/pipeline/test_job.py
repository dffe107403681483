"""Which store, which catalogue, which archive: one job each, and others refused by name."""

import contextlib
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
import zarr

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.lookup import DATABASE, catalogue_folder, read_archive, read_sources
from pipeline.archive.selection import number_scans
from pipeline.audit import audit
from pipeline.config import AutoencoderConfig, PrepareConfig
from pipeline.errors import PrepareError
from pipeline.job import _Staged, prepare
from pipeline.preflight import check_job
from pipeline.stages.discover import check_crops_fit
from store import PatchStore, SemgenError, StoreError
from store.errors import ConfigError
from store.settings import to_json
from store.writer import StoreWriter
from tests.support.command import Semgen, assert_refused, run
from tests.support.progress import CountedProgress
from tests.support.stores import contents, copy_with_catalogue, unseal


@pytest.fixture
def complete(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared store and its catalogue."""
    return copy_with_catalogue(prepared, tmp_path / "mine.store")


@pytest.fixture
def unfinished(complete: Path) -> Path:
    (complete / "train/patch/c/0/0/0/0").unlink()
    return unseal(complete)


# A catalogue that a killed process left half-written ---------------------------------------------


def test_the_catalogue_of_a_killed_job_is_read(
    unfinished: Path, phantoms: Path, config: PrepareConfig
) -> None:
    folder = catalogue_folder(unfinished)
    before = read_sources(unfinished)
    with contextlib.closing(sqlite3.connect(folder / DATABASE)) as killed:
        killed.execute("PRAGMA cache_size = 1")  # so that changed pages reach the file early
        killed.execute("UPDATE series SET files = hex(randomblob(100000))")
        for file in list(folder.glob(f"{DATABASE}*")):
            shutil.copy(file, folder / f"copy-{file.name}")
    for file in list(folder.glob("copy-*")):
        file.replace(folder / file.name.removeprefix("copy-"))
    assert (folder / f"{DATABASE}-journal").stat().st_size > 0
    assert read_sources(unfinished) == before


# However STORE is spelled ------------------------------------------------------------------------


def test_a_job_on_the_same_store_by_another_path_is_refused(
    phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "link.store").symlink_to(tmp_path / "busy.store")
    first = Catalogue(catalogue_folder(tmp_path / "busy.store"))
    try:
        done = run("prepare", phantoms, tmp_path / "link.store", "--config", config_file)
        assert_refused(done, "another prepare is running on this store")
    finally:
        first.close()


@pytest.mark.parametrize("spelled", [".", "../mine.store/", "../link.store", "{store}/classes/.."])
def test_a_store_is_recognised_by_every_path(
    complete: Path, phantoms: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    (complete.parent / "link.store").symlink_to(complete)
    before = sorted(complete.parent.iterdir())
    monkeypatch.chdir(complete)
    store = spelled.format(store=complete)
    done = run("prepare", phantoms, store, "--config", config_file, "--json")
    assert (done.exit_code, '"archive_checked": true' in done.stdout) == (0, True)
    assert run("inspect", store, "--paths").exit_code == 0
    assert sorted(complete.parent.iterdir()) == before


def test_the_store_may_be_given_as_the_parent_folder(
    complete: Path, phantoms: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(complete / "classes")
    assert run("prepare", phantoms, "..", "--config", config_file).exit_code == 0


def test_the_working_folder_can_become_a_store(
    prepared: Path, phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    done = semgen(
        *("prepare", phantoms, ".", "--config", config_file, "--workers", 1), cwd=tmp_path / "here"
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "here") == contents(prepared)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "here",
        "here.catalogue",
        "here.quality.json",
    ]


def test_a_folder_that_was_there_before_stays_when_there_is_nothing_to_prepare(
    semgen: Semgen, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "archive").mkdir()
    done = semgen("prepare", "../archive", ".", "--workers", 1, cwd=tmp_path / "here")
    assert "no usable CT series" in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "here"]
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "archive", "s3://bucket/chest.store"],
        ["prepare", "https://host/scans", "store"],
        ["prepare", "archive", "s3:/bucket/chest.store"],
        ["prepare", "archive", "store", "--extend", "s3://bucket/chest.store"],
        ["browse", "s3://bucket/chest.store"],
        ["report", "store", "s3://bucket/out.html"],
        ["demo", "s3://bucket/demo"],
    ],
    ids=" ".join,
)
def test_a_url_is_refused_and_no_folder_is_created(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*arguments), "is a URL", "only files and folders")
    assert list(tmp_path.iterdir()) == []


def test_a_url_that_became_a_path_is_refused(phantoms: Path, config: PrepareConfig) -> None:
    with pytest.raises(SemgenError, match="is a URL"):
        prepare(phantoms, "s3://bucket/s", config, workers=1)


def test_prepare_takes_paths_as_text_and_shows_nothing_by_default(
    complete: Path, phantoms: Path, config: PrepareConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    one, several = (
        prepare(archive, str(complete), config) for archive in (str(phantoms), [phantoms])
    )
    assert one == several
    assert one.already_complete
    assert one.fingerprint == PatchStore(complete).fingerprint
    assert capfd.readouterr() == ("", "")


# A store and its catalogue -----------------------------------------------------------------------


def test_a_store_that_moved_with_its_catalogue_is_finished_where_it_lies(
    unfinished: Path, prepared: Path, phantoms: Path, config_file: Path, semgen: Semgen
) -> None:
    moved = unfinished.rename(unfinished.parent / "other name")
    catalogue_folder(unfinished).rename(catalogue_folder(moved))
    done = semgen("prepare", phantoms, moved, "--config", config_file, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert contents(moved) == contents(prepared)


def test_an_unfinished_store_that_moved_without_its_catalogue_is_refused(
    unfinished: Path, phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    moved = unfinished.rename(tmp_path / "moved.store")
    before = contents(moved)
    done = run("prepare", phantoms, moved, "--config", config_file)
    assert_refused(done, "moved.store.catalogue", "is missing", "move it back")
    assert contents(moved) == before
    assert not catalogue_folder(moved).exists()


def test_a_complete_store_without_its_catalogue_is_complete_but_its_archive_unknown(
    complete: Path, phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    moved = complete.rename(tmp_path / "moved.store")
    done = run("prepare", phantoms, moved, "--config", config_file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "is complete; nothing to do" in done.stdout
    assert "Whether it was made from this archive cannot be checked" in done.stdout
    assert PatchStore(moved).state == "complete"
    assert not catalogue_folder(moved).exists()


@pytest.fixture
def strange(prepared: Path, phantoms: Path, tmp_path: Path) -> Path:
    """The catalogue of a store of fewer scans under the same settings."""
    folder = shutil.copytree(catalogue_folder(prepared), tmp_path / "strange")
    catalogue = Catalogue(folder)
    catalogue.db.execute("UPDATE series SET reason = 'other' WHERE scan_row = 2")
    number_scans(catalogue)
    catalogue.close()
    return folder


@pytest.mark.parametrize("state", ["complete", "building"])
def test_the_catalogue_of_a_store_of_other_scans_is_refused(
    complete: Path, strange: Path, phantoms: Path, config_file: Path, state: str
) -> None:
    shutil.rmtree(catalogue_folder(complete))
    strange.rename(catalogue_folder(complete))
    if state == "building":
        unseal(complete)
    done = run("prepare", phantoms, complete, "--config", config_file)
    assert_refused(done, "mine.store.catalogue", "the catalogue of another store")
    assert PatchStore(complete, allow_building=True).state == state


@pytest.mark.parametrize(
    "command", [["inspect", "--paths"], ["inspect", "--class", "0", "--paths"]], ids=" ".join
)
def test_inspect_refuses_another_stores_catalogue(
    complete: Path, strange: Path, command: list[str]
) -> None:
    shutil.rmtree(catalogue_folder(complete))
    strange.rename(catalogue_folder(complete))
    assert_refused(run(*command, complete), "the catalogue of another store")


def test_audit_refuses_another_stores_catalogue(complete: Path, strange: Path) -> None:
    shutil.rmtree(catalogue_folder(complete))
    strange.rename(catalogue_folder(complete))
    with pytest.raises(StoreError, match="the catalogue of another store"):
        list(audit(complete, sample=1))


def test_extend_refuses_another_stores_catalogue(
    complete: Path, strange: Path, phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    shutil.rmtree(catalogue_folder(complete))
    strange.rename(catalogue_folder(complete))
    done = run("prepare", phantoms, tmp_path / "s", "--config", config_file, "--extend", complete)
    assert_refused(done, "the catalogue of another store")
    assert not (tmp_path / "s").exists()


def begin(store: Path, config: PrepareConfig) -> None:
    """A store as it is before anything was surveyed."""
    StoreWriter.create(store, config=to_json(config), software={})


def test_the_catalogue_of_a_store_of_other_settings_is_refused(
    prepared: Path, phantoms: Path, config_file: Path, config: PrepareConfig, tmp_path: Path
) -> None:
    begin(tmp_path / "s", PrepareConfig(**{**_fields(config), "frame": "scan"}))
    shutil.copytree(catalogue_folder(prepared), tmp_path / "s.catalogue")
    done = run("prepare", phantoms, tmp_path / "s", "--config", config_file, "--frame", "scan")
    assert_refused(done, "the catalogue of another store")


def _fields(config: PrepareConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in PrepareConfig.__dataclass_fields__}


def test_a_finished_catalogue_beside_a_store_that_is_not_surveyed_is_refused(
    prepared: Path, phantoms: Path, config_file: Path, config: PrepareConfig, tmp_path: Path
) -> None:
    begin(tmp_path / "s", config)
    shutil.copytree(catalogue_folder(prepared), tmp_path / "s.catalogue")
    done = run("prepare", phantoms, tmp_path / "s", "--config", config_file)
    assert_refused(done, "the catalogue of another store")


def test_a_damaged_catalogue_is_reported_in_one_line(
    complete: Path, phantoms: Path, config_file: Path
) -> None:
    (catalogue_folder(complete) / "catalogue.sqlite").write_bytes(b"no database" * 100)
    for command in (["inspect", complete, "--paths"], ["prepare", phantoms, complete]):
        options = ["--config", config_file] if command[0] == "prepare" else []
        assert_refused(run(*command, *options), "catalogue.sqlite", "not a database")


# A store and its archive -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An archive in two folders. Not to be changed."""
    parent = tmp_path_factory.mktemp("two")
    first, second = parent / "first ward", parent / "second"
    first.mkdir()
    second.mkdir()
    for path in sorted(phantoms.iterdir()):
        if path.name != "landmarks.json":
            folder = first if path.name < "phantom-0002" else second
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / path.name)
    return [first, second]


@pytest.fixture(scope="module")
def prepared_of_two(
    two: list[Path], config_file: Path, semgen: Semgen, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The store of that archive. Not to be changed."""
    store = tmp_path_factory.mktemp("stores") / "two.store"
    done = semgen("prepare", *two, store, "--config", config_file, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return store


@pytest.fixture
def of_two(prepared_of_two: Path, tmp_path: Path) -> Path:
    """A copy of the store of that archive, and of its catalogue."""
    return copy_with_catalogue(prepared_of_two, tmp_path / "two.store")


@pytest.fixture
def moved(two: list[Path], tmp_path: Path) -> list[Path]:
    """The same archive elsewhere."""
    return [shutil.copytree(path, tmp_path / f"moved {path.name}") for path in two]


def test_the_same_archive_spelled_otherwise_is_the_same(
    two: list[Path],
    of_two: Path,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    first, second = two
    (tmp_path / "link").symlink_to(second)
    monkeypatch.chdir(first.parent)
    done = run("prepare", tmp_path / "link", "./second/", first, of_two, "--config", config_file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "is complete; nothing to do.\n" in done.stdout


def test_an_unfinished_store_is_finished_with_its_folders_in_another_order(
    two: list[Path], of_two: Path, config_file: Path, semgen: Semgen
) -> None:
    before = contents(of_two)
    unseal(of_two)
    (of_two / "train/patch/c/0/0/0/0").unlink()
    done = semgen("prepare", *two[::-1], of_two, "--config", config_file, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert contents(of_two) == before


def test_an_unfinished_store_refuses_another_archive_and_names_both(
    unfinished: Path, phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    before = contents(unfinished)
    (tmp_path / "other").mkdir()
    done = run("prepare", tmp_path / "other", unfinished, "--config", config_file)
    assert_refused(done, f"made from {phantoms}", f"not from {tmp_path / 'other'}")
    assert contents(unfinished) == before


def test_a_complete_store_does_not_pass_over_a_further_folder(
    complete: Path, phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    done = run("prepare", phantoms, tmp_path / "new", complete, "--config", config_file)
    command = f"semgen prepare {phantoms} {tmp_path / 'new'} NEW_STORE --extend {complete}"
    assert_refused(done, "complete", f"not from {tmp_path / 'new'}", command)


def test_a_part_of_the_archive_is_refused(two: list[Path], of_two: Path, config_file: Path) -> None:
    done = run("prepare", two[1], of_two, "--config", config_file)
    assert_refused(done, f"made from {two[0]} and {two[1]}", "give all of these", str(two[1]))


def test_the_command_that_is_proposed_for_a_further_folder_reads_only_that(
    two: list[Path],
    complete: Path,
    config_file: Path,
    semgen: Semgen,
    tmp_path: Path,
    phantoms: Path,
) -> None:
    new = tmp_path / "new.store"
    done = semgen(
        *("prepare", phantoms, two[1], new, "--extend", complete, "--config", config_file),
        *("--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    assert any(
        line.startswith("2 of 9: reuse survey: 5 scans") for line in done.stderr.splitlines()
    )


@pytest.mark.parametrize("finished", [True, False])
def test_a_moved_archive_is_taken_when_it_is_named_as_moved(
    moved: list[Path], of_two: Path, config_file: Path, semgen: Semgen, finished: bool
) -> None:
    before = contents(of_two)
    if not finished:
        unseal(of_two)
        (of_two / "train/patch/c/0/0/0/0").unlink()
    done = run("prepare", *moved, of_two, "--config", config_file)
    assert_refused(done, "add --archive-moved")
    command = ["prepare", *moved, of_two, "--config", config_file, "--workers", 1]
    done = semgen(*command, "--archive-moved")
    assert done.returncode == 0, done.stderr
    assert contents(of_two) == before
    assert read_archive(of_two) == moved
    sources = [Path(file) for file in read_sources(of_two).values()]
    assert [file for file in sources if not file.exists()] == []
    assert all(any(path in file.parents for path in moved) for file in sources)
    assert semgen(*command).returncode == 0


def test_moved_scans_that_differ_from_the_survey_are_detected(
    of_two: Path, moved: list[Path], config_file: Path, semgen: Semgen
) -> None:
    unseal(of_two)
    for split in ("train", "validation"):
        shutil.rmtree(of_two / split / "patch/c")
    one, other = sorted(moved[1].glob("phantom-*.nii.gz"))[:2]
    shutil.copy(other, one)
    done = semgen(
        *("prepare", *moved, of_two, "--config", config_file, "--workers", 1, "--archive-moved")
    )
    assert done.returncode == 1
    assert "changed since the survey" in done.stderr.splitlines()[-1]


def test_the_moved_archive_must_have_as_many_folders(
    of_two: Path, two: list[Path], config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    done = run("prepare", tmp_path / "one", of_two, "--config", config_file, "--archive-moved")
    assert_refused(done, f"made from {two[0]} and {two[1]}", "same number", "in the same order")


def test_archive_moved_is_refused_where_no_store_exists(phantoms: Path, tmp_path: Path) -> None:
    done = run("prepare", phantoms, tmp_path / "s", "--archive-moved")
    assert_refused(done, "does not exist yet", "without --archive-moved")
    assert list(tmp_path.iterdir()) == []


def test_the_archives_path_is_not_in_the_store(complete: Path, phantoms: Path) -> None:
    assert read_archive(complete) == [phantoms]
    assert not any(str(phantoms).encode() in file.read_bytes()
                   for file in complete.rglob("*") if file.is_file())  # fmt: skip


# Checked before the work ------------------------------------------------------------------------


def test_a_single_scan_is_refused_before_an_autoencoder_is_trained(
    phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    done = semgen(
        "prepare", phantoms / "phantom-0000.nii.gz", tmp_path / "s", "--config", config_file,
        "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "1 of 1 scans are for training, and a class needs 2" in last
    assert not any("embed" in line for line in done.stderr.splitlines())


def test_an_unknown_index_is_refused_before_any_work(
    phantoms: Path, config: PrepareConfig, tmp_path: Path
) -> None:
    changed = PrepareConfig(**{**_fields(config), "index": "Flatt"})
    with pytest.raises(ConfigError, match="index must be an index_factory string of FAISS"):
        prepare(phantoms, tmp_path / "s", changed)
    assert not list(tmp_path.iterdir())


def test_an_index_is_checked_for_the_length_of_embeddings(
    phantoms: Path, config: PrepareConfig, prepared: Path, tmp_path: Path
) -> None:
    """They have two numbers more than the latent vector."""
    numbers = zarr.open_array(prepared / "scans/embedding", mode="r").shape[1]

    def check(index: str, latent: int, autoencoder: Path | None) -> None:
        settings = AutoencoderConfig(latent=latent)
        fields = {**_fields(config), "index": index, "autoencoder": settings}
        check_job(
            phantoms, tmp_path / "s", PrepareConfig(**fields), manifest=None, extend=None,
            archive_moved=False, autoencoder=autoencoder,
        )  # fmt: skip

    check(f"PQ{numbers}", numbers - 2, None)
    with pytest.raises(ConfigError, match=f"for vectors of {numbers} numbers"):
        check(f"PQ{numbers - 2}", numbers - 2, None)
    check(f"PQ{numbers}", 2 * numbers, prepared)  # the length of the given autoencoder counts


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (512, 32, 32)},
        {"spacing_mm": (3.0, 20.0, 2.0)},
        {"side_steps": (900, 901)},
        {"border": (0.0, 1000.0, 0.0)},
        {"frame": "voxel", "shape": (512, 32, 32)},
    ],
    ids=str,
)
def test_crops_that_fit_into_no_scan_are_refused(
    prepared: Path, config: PrepareConfig, change: dict[str, object]
) -> None:
    changed = PrepareConfig(**{**_fields(config), **change})
    with pytest.raises(PrepareError, match=r"crops are too large.* smaller shape, spacing_mm"):
        check_crops_fit(PatchStore(prepared), changed)


def test_crops_that_fit_into_too_few_scans_are_refused(
    prepared: Path, config: PrepareConfig
) -> None:
    scans = PatchStore(prepared).scans
    height = (scans.size * scans.spacing_mm)[scans.split == 0, 0]
    most = int(sorted(height)[-1] / config.spacing_mm[0] // 8 * 8)
    changed = PrepareConfig(**{**_fields(config), "shape": (most, 32, 32), "scales": 1})
    with pytest.raises(PrepareError, match="fit in 1 of 3 training scans, and a class needs 2"):
        check_crops_fit(PatchStore(prepared), changed)


def test_crops_that_fit_are_not_refused(prepared: Path, config: PrepareConfig) -> None:
    check_crops_fit(PatchStore(prepared), config)


# Weights of another store ------------------------------------------------------------------------


def test_weights_are_taken_from_a_store(
    prepared: Path, patches: PatchStore, phantoms: Path, config_file: Path, semgen: Semgen,
    tmp_path: Path,
) -> None:  # fmt: skip
    store = tmp_path / "reused.store"
    done = semgen(
        "prepare", phantoms, store, "--config", config_file, "--workers", 1,
        "--autoencoder", prepared,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert PatchStore(store).fingerprint == patches.fingerprint
    assert any(line.startswith("5 of 9: embed: 5 scans") for line in done.stderr.splitlines())


def test_weights_of_a_store_without_an_autoencoder_are_refused(
    phantoms: Path, config: PrepareConfig, tmp_path: Path
) -> None:
    begin(tmp_path / "begun", config)
    done = run("prepare", phantoms, tmp_path / "s", "--autoencoder", tmp_path / "begun")
    assert_refused(done, "begun", "has no autoencoder yet", "finish preparing it")
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_no_store_gives_no_weights(phantoms: Path, tmp_path: Path) -> None:
    done = run("prepare", phantoms, tmp_path / "s", "--autoencoder", phantoms)
    assert_refused(done, str(phantoms), "not a semgen store")


# Progress ----------------------------------------------------------------------------------------


def test_stages_are_numbered_and_their_seconds_are_recorded_by_name() -> None:
    seconds: dict[str, float] = {}
    progress = CountedProgress()
    staged = _Staged(progress, SimpleNamespace(add_seconds=seconds.__setitem__))
    for name in ("list series", "reuse survey", "survey", "quality"):
        with staged.stage(name, 3, "scans") as advance:
            advance(3)
    shown = ["1 of 9: list series", "2 of 9: reuse survey", "2 of 9: survey", "9 of 9: quality"]
    assert list(progress.units) == shown
    assert list(seconds) == ["list series", "reuse survey", "survey", "quality"]


def test_a_progress_of_ones_own_needs_stages_only() -> None:
    class Own:
        stage = CountedProgress.stage

    staged = _Staged(Own(), None)  # type: ignore[arg-type]
    staged.note("a line")
    staged.tally("counts")
