"""Stores at a URL: read as from a folder, cached on disk, and what can go wrong on the way."""

import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from store import CorruptStore, PatchStore, StoreError, annotate, read_annotation, verify
from store.errors import ConfigError
from store.format import SPLITS, TABLES, Unreachable
from store.reader import Split
from store.remote import connect
from store.verification import Problem
from tests.support.command import assert_refused, run
from tests.support.crops import flip_bit
from tests.support.object_store import BUCKET, SECRET, serve_s3
from tests.support.slow_proxy import SlowProxy
from tests.support.synthetic_store import make_store
from tests.support.web_server import serve_files

SHARD = "train/patch/c/2/0/0/0"
ROWS = range(16, 24)
"""The rows of `SHARD`."""


def upload(store: Path, url: str) -> str:
    remote = connect(url)
    for file in store.rglob("*"):
        if file.is_file():
            remote.put(file.relative_to(store).as_posix(), file)
    return url


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with 9 shards of train crops. Not to be changed."""
    path = tmp_path_factory.mktemp("source") / "chest.store"
    make_store(path, shape=(8, 16, 16), rows_per_shard=8)
    annotate(path, {1: {"name": "left lung"}, 2: {"excluded": True}})
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve_s3() as address:
        yield address


@pytest.fixture(scope="module")
def url(server: str, source: Path) -> str:
    """Where `source` was uploaded. Not to be changed."""
    del server
    return upload(source, f"{BUCKET}/folder/chest.store")


@pytest.fixture
def changed(source: Path, url: str) -> Iterator[Callable[[str, bytes], None]]:
    """Replaces an object at `url`, until the test ends."""
    remote, keys = connect(url), []

    def change(key: str, content: bytes) -> None:
        keys.append(key)
        remote.put(key, content)

    yield change
    for key in keys:
        remote.put(key, source / key)


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowProxy]:
    """All requests go through it, and are given up soon."""
    for name in ("store.location._OPENING_S", "store.location._READING_S"):
        monkeypatch.setattr(name, 1.0)
    with SlowProxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, empty at first."""
    monkeypatch.setenv("SEMGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMGEN_CACHE_GB", "0")


def cached(cache: Path) -> list[Path]:
    """The files of the cache, without those that are being written."""
    return [f for f in cache.rglob("*") if f.is_file() and not f.name.startswith(".")]


def read_until_cached(split: Split, cache: Path) -> None:
    """Read a row of each shard until all shards are on disk."""
    while len(cached(cache)) < split.patch.grid.num_shards:
        split.read(range(0, len(split), split.patch.grid.rows_per_shard))
        time.sleep(0.02)


def assert_same_rows(ours: Split, theirs: Split) -> None:
    rows = np.random.default_rng(0).permutation(len(theirs))
    np.testing.assert_array_equal(ours.read(rows), theirs.read(rows))


# Reading


def test_everything_is_as_in_the_folder(source: Path, url: str) -> None:
    ours, theirs = PatchStore(Path(url)), PatchStore(source)  # pathlib makes it s3:/bucket
    assert (ours.fingerprint, repr(ours)) == (theirs.fingerprint, repr(theirs))
    assert read_annotation(url) == read_annotation(source)
    for name in SPLITS:
        assert_same_rows(ours.split(name), theirs.split(name))
        for column, values in theirs.table(name).items():
            np.testing.assert_array_equal(ours.table(name)[column], values)
    np.testing.assert_array_equal(ours.thumbnails.read([2]), theirs.thumbnails.read([2]))


def test_the_commands_print_the_same_for_a_url(
    prepared: Path, server: str, tmp_path: Path, cache: Path
) -> None:
    del server
    url = upload(prepared, f"{BUCKET}/{prepared.name}")
    for command in ("inspect", "inspect --class 1", "classes --quality --json", "verify"):
        name, *options = command.split()
        ours, theirs = (run(name, store, *options) for store in (url, prepared))
        assert ours.exit_code == 0, ours.output
        assert ours.stdout == theirs.stdout.replace(str(prepared), url)
    assert len(list(cache.rglob("quality.json"))) == 1, "quality is computed once"
    pages = tmp_path / "url.html", tmp_path / "folder.html"
    for store, page in zip((url, prepared), pages, strict=True):
        assert run("report", store, page).exit_code == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_pretraining_has_the_same_losses(source: Path, url: str, tmp_path: Path) -> None:
    for store, name in ((url, "url"), (source, "folder")):
        assert run("pretrain", store, tmp_path / name, "--width", 2, "--batch-size", 36,
                   "--steps", 1, "--warmup-epochs", 0, "--seed", 3).exit_code == 0  # fmt: skip
    losses = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("url", "folder")]
    assert losses[0] == losses[1]


def test_nothing_is_listed(url: str, proxy: SlowProxy) -> None:
    store = PatchStore(url)
    store.train.read([3, 40])
    list(verify(url))
    known = {*TABLES, *(f"{s}/patch" for s in SPLITS), "scans/thumbnail"}
    for request in proxy.requests:
        method, path, _ = request.split()
        assert method in {"GET", "HEAD"}
        array = path.removeprefix("/bucket/folder/chest.store/").split("/c/")[0]
        assert array.removesuffix("/zarr.json") in known | {
            "zarr.json", *SPLITS, "scans", "classes", "scans/embedding/autoencoder.safetensors"
        }  # fmt: skip


@pytest.mark.usefixtures("no_cache")
def test_rows_of_a_shard_come_in_two_requests_and_then_in_one(url: str, proxy: SlowProxy) -> None:
    patch = PatchStore(url).train.patch
    for num_requests in (2, 1):  # the index is kept in memory
        proxy.requests.clear()
        patch.read(ROWS)
        assert len(proxy.requests) == num_requests


def test_a_web_server_is_read_as_well(source: Path) -> None:
    with serve_files(source.parent) as site:
        assert_same_rows(PatchStore(f"{site}/chest.store").train, PatchStore(source).train)


def test_a_pickle_holds_the_url_alone_and_opens_it_again(url: str) -> None:
    split = PatchStore(url).train
    pickled = pickle.dumps(split)
    assert url.encode() in pickled
    assert SECRET.encode() not in pickled
    assert_same_rows(pickle.loads(pickled), split)


def test_a_forked_process_is_told_to_be_spawned(url: str) -> None:
    split = PatchStore(url).train
    pid = os.fork()
    if pid == 0:
        try:
            split.read([1])
        except StoreError as error:
            os._exit(3 if "spawn" in str(error) else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


# The cache


def test_rows_that_were_read_are_read_from_disk_from_then_on(
    source: Path, url: str, cache: Path, proxy: SlowProxy
) -> None:
    read_until_cached(PatchStore(url).train, cache)
    again = PatchStore(url).train
    proxy.requests.clear()
    assert_same_rows(again, PatchStore(source).train)
    assert proxy.requests == []


def test_only_the_owner_can_read_the_cache(url: str, cache: Path) -> None:
    read_until_cached(PatchStore(url).train, cache)
    assert (cache / "stores").stat().st_mode & 0o77 == 0


def test_a_damaged_file_is_replaced(source: Path, url: str, cache: Path) -> None:
    split = PatchStore(url).train
    read_until_cached(split, cache)
    for file in cached(cache):
        flip_bit(file, 5)
    assert_same_rows(split, PatchStore(source).train)
    read_until_cached(split, cache)
    assert {f.read_bytes() for f in cached(cache)} == {
        f.read_bytes() for f in source.glob("train/patch/c/*/*/*/*")
    }


def test_the_bytes_of_one_store_are_not_those_of_another(
    source: Path, url: str, changed: Callable[[str, bytes], None], cache: Path, tmp_path: Path
) -> None:
    before = PatchStore(url)
    read_until_cached(before.train, cache)
    other = PatchStore(make_store(tmp_path / "other", shape=(8, 16, 16), rows_per_shard=8, seed=9))
    for key in ("zarr.json", SHARD):
        changed(key, (other.path / key).read_bytes())
    np.testing.assert_array_equal(PatchStore(url).train.read(ROWS), other.train.read(ROWS))
    assert_same_rows(before.train, PatchStore(source).train)


@pytest.mark.parametrize("age_s", [7200, 60])
def test_only_files_that_are_not_in_use_make_room(
    url: str,
    cache: Path,
    age_s: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    earlier = cache / "stores" / "earlier" / "shard"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(bytes(900_000))
    used = time.time() - age_s
    os.utime(earlier, (used, used))
    monkeypatch.setenv("SEMGEN_CACHE_GB", "0.001")
    split = PatchStore(url).train
    if age_s > 3600:
        read_until_cached(split, cache)
        assert not earlier.exists()
        assert caplog.messages == []
    else:
        while not caplog.messages:
            split.read(slice(None))
        assert earlier.exists()
        assert sum(file.stat().st_size for file in cached(cache)) < 1_000_000
        assert "SEMGEN_CACHE_GB" in caplog.messages[0]


def test_reading_goes_on_without_a_cache_that_cannot_be_written(
    source: Path, url: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_bytes(b"not a folder")
    split = PatchStore(url).train
    while not caplog.messages:
        assert_same_rows(split, PatchStore(source).train)
    for _ in range(3):
        assert_same_rows(split, PatchStore(source).train)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_limit_that_is_no_number_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMGEN_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="SEMGEN_CACHE_GB must be"):
        PatchStore(url).train  # noqa: B018


# What goes wrong


def test_verify_finds_damage_at_the_server_behind_an_intact_cache(
    source: Path, url: str, changed: Callable[[str, bytes], None], cache: Path
) -> None:
    read_until_cached(PatchStore(url).train, cache)
    content = bytearray((source / SHARD).read_bytes())
    content[100] ^= 4
    changed(SHARD, bytes(content))
    found = Problem("train/patch", "checksum failed or data missing", (ROWS[0],))
    assert found in list(verify(url))


@pytest.mark.parametrize("change", ["cut", "delete"])
@pytest.mark.usefixtures("no_cache")
def test_the_rows_of_a_broken_shard_are_named(
    source: Path, url: str, changed: Callable[[str, bytes], None], change: str
) -> None:
    changed(SHARD, (source / SHARD).read_bytes()[:-1])
    if change == "delete":
        connect(url).delete(SHARD)
    with pytest.raises(CorruptStore) as raised:
        PatchStore(url).train.read(slice(None))
    assert raised.value.rows == list(ROWS)


@pytest.mark.parametrize("fault", ["drop", "cut", "lose", 503])
@pytest.mark.usefixtures("no_cache")
def test_a_fault_that_passes_is_not_noticed(
    source: Path, url: str, proxy: SlowProxy, fault: int
) -> None:
    proxy.fault = lambda request: fault if len(proxy.requests) % 5 == 0 else None
    assert_same_rows(PatchStore(url).train, PatchStore(source).train)


@pytest.mark.parametrize("fault", ["drop", 503])
@pytest.mark.usefixtures("no_cache")
def test_a_lost_server_is_not_a_broken_store(url: str, proxy: SlowProxy, fault: int) -> None:
    store = PatchStore(url)
    split = store.train
    proxy.fault = lambda request: fault
    for read in (lambda: split.read([1]), lambda: store.validation, lambda: list(verify(url))):
        with pytest.raises(Unreachable, match=r"bucket/folder/chest.store: the server cannot be"):
            read()


def refusal(environment: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = run("inspect", url)
    assert_refused(done)
    return done.stderr


def test_a_profile_of_the_aws_tools_has_credentials(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".aws" / "credentials"
    file.parent.mkdir()
    file.write_text(f"[lab]\naws_access_key_id = somebody\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert PatchStore(url).state == "complete"
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert "check AWS_PROFILE" in refusal({}, url, monkeypatch)


@pytest.mark.parametrize(
    ("environment", "at", "words"),
    [
        ({}, f"{BUCKET}/nothing.store", "no such store"),
        ({}, "s3://nobucket/chest.store", "no such bucket"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "", "the server cannot be reached"),
        ({}, f"s3://user:{SECRET}@bucket/chest.store", "contains a user, a password or a query"),
        (
            {},
            f"https://example.org/chest.store?sig={SECRET}",
            "give credentials in the environment",
        ),
        ({}, "ftp://example.org/chest.store", "supported are s3"),
        ({}, "az://container/chest.store", "the environment lacks a setting"),
    ],
)
@pytest.mark.usefixtures("proxy")
def test_a_url_that_cannot_be_opened_is_refused_in_one_line_without_secrets(
    url: str, environment: dict[str, str], at: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(environment, at or url, monkeypatch)
    assert words in said
    assert SECRET not in said


@pytest.mark.parametrize(("status", "words"), [(403, "access denied (403)"), (401, "denied (401)")])
def test_denied_access_says_where_credentials_come_from(
    url: str, proxy: SlowProxy, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.fault = lambda request: status
    said = refusal({}, url, monkeypatch)
    assert words in said
    assert "credentials in the environment" in said
    assert SECRET not in said


def test_a_web_server_without_byte_ranges_is_named_as_the_reason(source: Path) -> None:
    with serve_files(source.parent, ranges=False) as site:
        train = PatchStore(f"{site}/chest.store").train
        with pytest.raises(Unreachable, match="does not answer byte ranges"):
            train.read([1])


def test_without_obstore_the_command_to_install_it_is_named(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    assert 'pip install "semgen[remote]"' in refusal({}, url, monkeypatch)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("classes URL --exclude 1", "semgen push"),
        ("browse URL", "is a URL"),
        ("prepare . URL", "semgen push"),
        ("inspect URL --paths", "is a URL"),
        ("verify URL --against-archive", "is a URL"),
    ],
)
def test_what_changes_a_store_or_needs_its_archive_wants_a_folder(
    url: str, command: str, words: str
) -> None:
    assert_refused(run(*(url if word == "URL" else word for word in command.split())), words)


def test_an_upload_that_was_interrupted_is_not_a_store_yet(source: Path, server: str) -> None:
    del server
    url = f"{BUCKET}/half.store"
    root = (source / "zarr.json").read_bytes().replace(b'"complete"', b'"building"')
    connect(url).put("zarr.json", root)
    with pytest.raises(StoreError, match=r"still building; run the same `semgen push`"):
        PatchStore(url)
