"""Uploading a store: to a server, interrupted and resumed; and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from obstore.store import MemoryStore

from store import PatchStore, StoreError, annotate
from store.push import push
from store.remote import connect
from tests.support.command import ENVIRONMENT, assert_refused, run
from tests.support.object_store import BUCKET, SECRET, digests, serve_s3
from tests.support.slow_proxy import Fault, SlowProxy
from tests.support.stores import contents
from tests.support.synthetic_store import make_store

SHARD = "train/patch/c/1/0/0/0"
ELSEWHERE = "az://container/chest.store"
"""The URL of `memory`."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in 7 shards. Not to be changed."""
    return make_store(tmp_path_factory.mktemp("source") / "chest.store", rows_per_shard=16)


@pytest.fixture
def store(source: Path, tmp_path: Path) -> Path:
    """A copy of `source`."""
    return shutil.copytree(source, tmp_path / "copy.store")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve_s3() as address:
        yield address


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowProxy]:
    with SlowProxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(scope="module")
def pushed(server: str, source: Path) -> str:
    """URL at which `source` is complete."""
    del server
    url = f"{BUCKET}/folder/pushed.store"
    done = run("push", source, url, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["sent"] == facts["objects"] == len(contents(source))
    return url


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """What is at `ELSEWHERE`: object storage without a server. Its ETags are no digests."""
    memory = MemoryStore()
    monkeypatch.setattr("store.push.connect", lambda url, **options: memory)
    return memory


def test_the_objects_have_the_bytes_of_the_files(source: Path, pushed: str) -> None:
    assert digests(connect(pushed)) == contents(source)


def test_pushing_again_sends_nothing(source: Path, pushed: str, proxy: SlowProxy) -> None:
    again = push(source, pushed)
    assert (again.sent, again.sent_bytes) == (0, 0)
    assert [request for request in proxy.requests if request.startswith("PUT")] == []


def test_an_annotation_is_the_one_object_that_is_updated(
    source: Path, store: Path, pushed: str, proxy: SlowProxy
) -> None:
    annotate(store, {1: {"name": "left lung"}})
    assert push(store, pushed).sent == 1
    (sent,) = [request for request in proxy.requests if request.startswith("PUT")]
    assert sent.split()[1].endswith("/classes/zarr.json")
    name = "classes/zarr.json"
    assert bytes(connect(pushed).get(name).bytes()) == (store / name).read_bytes()
    assert push(source, pushed).sent == 1


def test_a_push_that_was_killed_is_finished_by_the_same_command(
    source: Path, proxy: SlowProxy
) -> None:
    url = f"{BUCKET}/killed.store"
    proxy.latency_s = 0.05
    command = [sys.executable, "-m", "cli", "push", str(source), url]
    with subprocess.Popen(command, env={**ENVIRONMENT, **os.environ}) as job:
        while len(proxy.requests) < 30:
            assert job.poll() is None
            time.sleep(0.01)
        job.kill()
    assert job.returncode == -signal.SIGKILL
    proxy.latency_s = 0
    with pytest.raises(StoreError, match=r"still building; run the same `semgen push` to finish"):
        PatchStore(url)
    done = push(source, url)
    assert 0 < done.sent < done.objects
    assert digests(connect(url)) == contents(source)


def test_a_request_that_fails_is_repeated(source: Path, proxy: SlowProxy) -> None:
    url = f"{BUCKET}/unreliable.store"
    faults: list[Fault] = [503, "drop", "lose"]  # after "lose", the object is there already

    def fail(request: str) -> Fault:
        number = len(proxy.requests)
        return None if number % 8 else faults[number // 8 % 3]

    proxy.fault = fail
    push(source, url)
    proxy.fault = lambda request: None
    assert digests(connect(url)) == contents(source)


def test_wrong_credentials_are_explained_without_showing_them(
    source: Path, server: str, pushed: str
) -> None:
    def check_credentials(after: str) -> None:
        switch = f"http://{server}/moto-api/reset-auth"
        kind = {"Content-Type": "text/plain"}
        urlopen(Request(switch, data=after.encode(), headers=kind)).close()

    check_credentials(after="0")
    try:
        done = run("push", source, pushed)
    finally:
        check_credentials(after="inf")
    assert_refused(done, pushed, "access denied", "credentials")
    assert SECRET not in done.output
    assert os.environ["AWS_ACCESS_KEY_ID"] not in done.output


def test_two_pushes_of_a_store_at_the_same_time_make_one(source: Path, memory: MemoryStore) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(push, [source] * 4, [ELSEWHERE] * 4))
    assert digests(memory) == contents(source)


def test_a_missing_bucket_is_named_as_such(source: Path, server: str) -> None:
    del server
    assert_refused(run("push", source, "s3://nowhere/chest.store"), "nowhere", "no such bucket")


def test_only_what_belongs_to_the_store_is_uploaded(
    store: Path, source: Path, memory: MemoryStore
) -> None:
    (store / "notes.txt").write_text("Mrs Smith")
    (store / "train" / "link").symlink_to(store / "notes.txt")
    (store / SHARD).with_name(".partial-0").write_bytes(b"rest")
    catalogue = store.with_name(f"{store.name}.catalogue")
    catalogue.mkdir()
    (catalogue / "catalogue.sqlite").write_text("Mrs Smith")
    push(store, ELSEWHERE)
    assert digests(memory) == contents(source)


def test_a_link_in_place_of_a_file_is_refused(store: Path, memory: MemoryStore) -> None:
    (store / SHARD).rename(store / "elsewhere")
    (store / SHARD).symlink_to(store / "elsewhere")
    with pytest.raises(StoreError, match=rf"{SHARD}: is missing or a link"):
        push(store, ELSEWHERE)
    assert digests(memory) == {}


def test_a_damaged_shard_is_not_uploaded(store: Path, memory: MemoryStore) -> None:
    whole = (store / SHARD).read_bytes()
    (store / SHARD).write_bytes(whole[:200] + b"????" + whole[204:])
    with pytest.raises(StoreError, match=rf"{SHARD}: is damaged; `semgen verify .*` names"):
        push(store, ELSEWHERE)
    assert SHARD not in digests(memory)


def test_a_store_with_a_damaged_or_lost_table_is_not_uploaded(
    store: Path, memory: MemoryStore
) -> None:
    shutil.copy(store / "train/scan/c/0", store / "train/label/c/0")
    with pytest.raises(StoreError, match="content does not match the fingerprint"):
        push(store, ELSEWHERE)
    shutil.rmtree(store / "train/label")
    with pytest.raises(StoreError, match="content does not match the fingerprint"):
        push(store, ELSEWHERE)
    assert digests(memory) == {}


def test_another_store_is_refused_also_while_it_is_unfinished(
    tmp_path: Path, source: Path, memory: MemoryStore
) -> None:
    push(source, ELSEWHERE)
    other = make_store(tmp_path / "other", seed=5)
    assert_refused(run("push", other, ELSEWHERE), "holds another store", "another URL")
    root = memory.get("zarr.json").bytes().to_bytes().replace(b'"complete"', b'"building"')
    memory.put("zarr.json", root)
    assert_refused(run("push", other, ELSEWHERE), "holds another store", "another URL")
    push(source, ELSEWHERE)
    assert digests(memory) == contents(source)


@pytest.mark.parametrize("name", ["readme.txt", "zarr.json"])
def test_something_else_is_refused(source: Path, memory: MemoryStore, name: str) -> None:
    memory.put(name, b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    assert_refused(run("push", source, ELSEWHERE), ELSEWHERE, "holds something else")
    assert digests(memory).keys() == {name}


def test_an_object_with_other_content_is_named_and_kept(source: Path, memory: MemoryStore) -> None:
    memory.put("zarr.json", (source / "zarr.json").read_bytes().replace(b"complete", b"building"))
    memory.put(SHARD, b"something else")
    refused = run("push", source, ELSEWHERE)
    assert_refused(refused, f"{ELSEWHERE}/{SHARD}", "other content", "delete")
    assert memory.get(SHARD).bytes() == b"something else"


def test_a_lost_object_is_uploaded_again(source: Path, memory: MemoryStore) -> None:
    push(source, ELSEWHERE)
    memory.delete(SHARD)
    assert push(source, ELSEWHERE).sent == 1
    assert digests(memory) == contents(source)


def test_damage_on_the_way_is_found(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaging(MemoryStore):  # type: ignore[misc]
        def put(self, key: str, content: bytes, **options: object) -> object:
            return super().put(key, content.replace(b"int16", b"int32"), **options)

    monkeypatch.setattr("store.push.connect", lambda url, **options: Damaging())
    with pytest.raises(StoreError, match=r"/patch/zarr.json: has other content"):
        push(source, ELSEWHERE)


def test_an_unfinished_store_is_refused(written: Path) -> None:
    assert_refused(run("push", written, ELSEWHERE), "still building")


def test_a_url_that_can_only_be_read_is_refused(source: Path) -> None:
    assert_refused(run("push", source, "https://example.org/chest.store"), "can only be read")
