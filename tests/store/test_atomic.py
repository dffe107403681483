"""Files that are written whole or not at all."""

from pathlib import Path

import pytest

from store.atomic import delete_partial_files, fill_folder, replace_file
from store.errors import SemgenError


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_at_the_end(tmp_path: Path, shared: bool, durable: bool) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    with replace_file(file, shared=shared, durable=durable) as partial:
        partial.write_text("after")
        assert file.read_text() == "before"
    assert file.read_text() == "after"
    assert list(tmp_path.iterdir()) == [file]


def test_the_temporary_file_has_the_same_suffix_and_folder(tmp_path: Path) -> None:
    with replace_file(tmp_path / "mask.nii.gz") as partial:
        assert partial.parent == tmp_path
        assert partial.name.endswith("mask.nii.gz")
        partial.touch()


def test_after_an_error_the_file_is_as_before(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")

    def write_half() -> None:
        with replace_file(file) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_names_the_file_not_its_temporary_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replace_file(tmp_path / "no" / "a") as partial:
        partial.touch()
    assert caught.value.filename == str(tmp_path / "no" / "a")


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with replace_file(file, shared=True) as one, replace_file(file, shared=True) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one"  # it ended last


def test_what_killed_writers_left_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    context = replace_file(tmp_path / "folder" / "a.txt")
    context.__enter__().touch()
    (tmp_path / "zarr.0123.partial").touch()
    (tmp_path / "kept").touch()
    delete_partial_files(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "kept"]


def test_a_folder_is_filled_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with fill_folder(folder, last="b.txt") as partial:
        (partial / "a").mkdir()
        (partial / "b.txt").touch()
        assert list(folder.iterdir()) == [partial]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b.txt"]


def test_after_an_error_the_folder_is_empty_and_what_a_killed_writer_left_is_deleted(
    tmp_path: Path,
) -> None:
    def write_half() -> None:
        with fill_folder(tmp_path, last="x") as partial:
            (partial / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".partial-folder").mkdir()
    (tmp_path / ".partial-folder" / "killed").touch()
    with fill_folder(tmp_path, last="x") as partial:
        (partial / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_folder_with_something_in_it_is_not_filled(tmp_path: Path) -> None:
    (tmp_path / "own").touch()
    with pytest.raises(SemgenError, match="not an empty folder"), fill_folder(tmp_path, last="x"):
        pass
    own = tmp_path / "own"
    with pytest.raises(SemgenError, match="own: is a file"), fill_folder(own, last="x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_two_writers_do_not_fill_one_folder(tmp_path: Path) -> None:
    def fill() -> None:
        with fill_folder(tmp_path, last="x"):
            pass

    with fill_folder(tmp_path, last="x") as partial:
        (partial / "x").touch()
        with pytest.raises(SemgenError, match="another process is writing here; wait for it"):
            fill()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_last_file_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    rename = Path.rename

    def record(path: Path, target: Path) -> None:
        moved.append(path.name)
        rename(path, target)

    monkeypatch.setattr(Path, "rename", record)
    with fill_folder(tmp_path, last="b") as partial:
        for name in "bca":
            (partial / name).touch()
    assert moved[-1] == "b"
    assert sorted(moved) == ["a", "b", "c"]
