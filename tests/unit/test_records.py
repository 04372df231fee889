import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from sparsify.errors import DamagedError, RecordError, UsageError
from sparsify.runs import leases, records
from sparsify.runs.record import SCHEMA, Kept, Record, Recorded, Superseded
from sparsify.runs.records import Store, write_atomically
from sparsify.types import Evaluation, Measurement

KEY = "0123456789abcdef"
RESULT = Evaluation(
    metric="perplexity",
    value=1.0,
    protocol="t@8",
    more=(Measurement(metric="curve", value=2.0, curve=[1.0, 2.0]),),
    details={"task": "boolq", "limit": None},
)
GOOD = Record(KEY, "done", {"sparsity": 0.5}, {"device": "cpu"}, evaluations={"test": Recorded("t1", RESULT)})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def lease_of(store):
    """Write a lease as another process would have."""

    def write(**changes):
        file = store.folder(KEY) / "lease"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(leases._me() | changes))
        return file

    return write


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def files_of(store):
    return sorted(file.name for file in store.folder(KEY).iterdir())


def test_a_record_reads_back_with_its_key(store):
    assert store.read(KEY) is None
    record = replace(
        GOOD, superseded=[Superseded("test", Recorded("t0", RESULT))], kept=Kept("weights.safetensors", "0" * 64, 7)
    )
    file = store.write(record)
    assert file == store.folder(KEY) / "record.json"
    assert store.read(KEY) == record
    tree = json.loads(file.read_text())
    assert (tree["schema"], tree["key"], tree["evaluations"]["test"]["task"]) == (SCHEMA, KEY, "boolq")


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        ({"stauts": "done"}, "stauts"),
        ({"status": "finished"}, "status"),
        ({"seconds": {"prune": "long"}}, "seconds.prune"),
        ({"evaluations": {"test": {"metric": "acc", "value": 1.0, "protocol": "p"}}}, "evaluations.test.key"),
        ({"evaluations": {"test": {"key": "k", "value": 1.0, "protocol": "p"}}}, "metric"),
        ({"evaluations": {"test": {"key": "k", "metric": "m", "value": None, "protocol": "p"}}}, "value"),
        ({"evaluations": []}, "evaluations"),
        ({"layers": {}}, "layers"),
    ],
)
def test_a_record_of_another_shape_says_where_it_is_wrong(damage, where):
    with pytest.raises(UsageError, match=where):
        Record.from_json(GOOD.to_json() | damage, "record.json")


def test_records_come_in_order_of_key(store):
    for key in ("b", "c", "a"):
        store.write(replace(GOOD, key=key))
    with store.lease("d"):
        assert [record.key for record in store] == ["a", "b", "c"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_record_and_no_draft(store, monkeypatch, call):
    store.write(GOOD)
    monkeypatch.setattr(records.os, call, full_disk)
    with pytest.raises(RecordError, match="No space left on device"):
        store.write(replace(GOOD, status="failed"))
    assert store.read(KEY).status == "done"
    assert files_of(store) == ["record.json"]


def test_a_record_where_no_folder_can_be_is_a_record_error(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(RecordError, match="results="):
        Store(tmp_path).write(GOOD)


def test_a_lease_where_no_folder_can_be_is_a_record_error(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(RecordError, match="results="), Store(tmp_path).lease(KEY):
        pass


def test_a_write_replaces_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    write_atomically(file, "old")
    seen = []
    replace = os.replace
    monkeypatch.setattr(records.os, "replace", lambda *a: seen.append(file.read_text()) or replace(*a))
    write_atomically(file, "new")
    assert (seen, file.read_text()) == (["old"], "new")


def test_a_number_that_json_cannot_hold_is_a_record_error(store):
    with pytest.raises(RecordError):
        store.write(replace(GOOD, sparsity=float("inf")))


DAMAGE = ["", "{", "[]", '{"schema": 0}', '{"key": 1}', "\x00\x00", "[" * 100_000, '{"schema": 1, "superseded": [3]}']


@pytest.mark.parametrize("text", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_record_stops_nothing_and_is_set_aside_by_the_next_run(store, capsys, text):
    store.write(GOOD)
    store.write(replace(GOOD, key="1" * 16))
    file = store.folder(KEY) / "record.json"
    file.write_text(text)
    with pytest.raises(DamagedError, match=r"A record is damaged.*record\.json.*Fix: run the cell again"):
        store.read(KEY)
    assert [record.key for record in store] == ["1" * 16]
    assert store.state(KEY, {"test": "t1"}) == "missing"
    assert capsys.readouterr().err.count("A record is damaged") == 1
    with store.lease(KEY):
        assert "set aside as" in capsys.readouterr().err
        assert store.read(KEY) is None
        assert (store.folder(KEY) / "record.damaged.json").read_text() == text
        store.write(GOOD)
    file.write_text(text)
    with store.lease(KEY):
        assert files_of(store) == ["lease", "record.damaged.json", "record.damaged2.json"]


def test_a_record_of_a_later_version_is_neither_damaged_nor_replaced(store, capsys):
    store.write(GOOD)
    file = store.folder(KEY) / "record.json"
    file.write_text('{"schema": 99}')
    assert list(store) == []
    assert "A later version of sparsify wrote this record" in capsys.readouterr().err
    with pytest.raises(RecordError, match="later version"), store.lease(KEY):
        pass
    assert file.read_text() == '{"schema": 99}'


@pytest.mark.parametrize("lease", ['{"host": 1}', '{"host": "HERE", "pid": "x", "started": null}', "[]", "HUGE"])
def test_a_damaged_lease_is_that_of_nobody_once_it_is_old(store, lease):
    file = store.folder(KEY) / "lease"
    file.parent.mkdir(parents=True)
    huge = json.dumps(leases._me() | {"pid": 10**30})
    file.write_text(lease.replace("HERE", leases._me()["host"]).replace("HUGE", huge))
    os.utime(file, (1, 1))
    assert store.holder(KEY) is None
    with store.lease(KEY):
        assert files_of(store) == ["lease"]


def test_a_cell_goes_from_missing_to_running_to_done(store):
    assert store.state(KEY, {"test": "t1"}) == "missing"
    with store.lease(KEY):
        assert store.state(KEY, {"test": "t1"}) == "running"
        store.write(replace(GOOD, status="running"))
    assert store.state(KEY, {"test": "t1"}) == "missing"
    store.write(GOOD)
    assert store.state(KEY, {"test": "t1"}) == "done"
    assert store.state(KEY, {}) == "done"


@pytest.mark.parametrize("wanted", [{"test": "t2"}, {"test": "t1", "zeroshot": "z"}])
def test_a_missing_evaluation_makes_a_done_cell_missing(store, wanted):
    store.write(GOOD)
    assert store.state(KEY, wanted) == "missing"


def test_a_failed_cell_is_failed_until_someone_works_on_it(store):
    store.write(replace(GOOD, status="failed", evaluations={}))
    assert store.state(KEY, {}) == "failed"
    with store.lease(KEY):
        assert store.state(KEY, {}) == "running"


def test_a_lease_is_released_even_after_an_error(store):
    def work():
        with store.lease(KEY):
            assert store.holder(KEY).endswith(f":{os.getpid()}")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert store.holder(KEY) is None
    assert files_of(store) == []


def test_a_live_lease_is_refused(store):
    with store.lease(KEY), pytest.raises(RecordError, match=f":{os.getpid()}"), store.lease(KEY):
        pass
    assert store.holder(KEY) is None


def test_a_live_lease_of_another_process_is_refused(store, lease_of):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        lease_of(pid=other.pid, started=leases.psutil.Process(other.pid).create_time())
        assert store.state(KEY, {}) == "running"
        with pytest.raises(RecordError, match=f":{other.pid}"), store.lease(KEY):
            pass
        other.communicate(b"\n")
    assert store.holder(KEY) is None


def test_the_lease_of_a_dead_process_is_taken_over(store, lease_of):
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        other.wait()
    lease_of(pid=other.pid)
    assert store.state(KEY, {}) == "missing"
    with store.lease(KEY):
        assert store.holder(KEY).endswith(f":{os.getpid()}")
        assert files_of(store) == ["lease"]


def test_a_process_number_used_again_does_not_revive_a_lease(store, lease_of):
    lease_of(started=0.0)
    with store.lease(KEY):
        assert store.state(KEY, {}) == "running"


@pytest.mark.parametrize(("age", "held"), [(0, True), (leases.STALE_SECONDS + 60, False)])
def test_a_lease_of_another_host_lives_by_its_heartbeat(store, lease_of, age, held):
    file = lease_of(host="elsewhere", pid=1)
    then = file.stat().st_mtime - age
    os.utime(file, (then, then))
    assert (store.holder(KEY) == "elsewhere:1") == held
    if held:
        with pytest.raises(RecordError, match="elsewhere:1"), store.lease(KEY):
            pass
    else:
        with store.lease(KEY):
            assert store.holder(KEY).endswith(f":{os.getpid()}")


def test_a_heartbeat_keeps_the_lease_young(store, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    with store.lease(KEY):
        file = store.folder(KEY) / "lease"
        os.utime(file, (0, 0))
        for _ in range(500):
            if file.stat().st_mtime > 0:
                break
            records.time.sleep(0.01)
        assert file.stat().st_mtime > 0


def test_a_lease_has_its_content_from_the_moment_it_exists(store, monkeypatch):
    seen, link = [], records.os.link
    monkeypatch.setattr(records.os, "link", lambda a, b: seen.append((a.read_text(), b.exists())) or link(a, b))
    with store.lease(KEY):
        assert store.holder(KEY) is not None
    (content, existed), *_ = seen
    assert not existed
    assert str(records.os.getpid()) in content


def test_a_full_disk_refuses_a_lease_and_leaves_none(store, monkeypatch):
    monkeypatch.setattr(records.Path, "write_text", full_disk)
    with pytest.raises(RecordError), store.lease(KEY):
        pass
    assert files_of(store) == []


def test_a_lease_without_hard_links(store, monkeypatch):
    def no_links(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(leases.os, "link", no_links)
    with store.lease(KEY):
        assert store.holder(KEY).endswith(f":{os.getpid()}")
        with pytest.raises(RecordError, match="being worked on"), store.lease(KEY):
            pass
    assert files_of(store) == []


def test_a_lease_that_is_being_written_is_a_living_one(store):
    file = store.folder(KEY) / "lease"
    file.parent.mkdir(parents=True)
    file.write_text("")
    assert store.holder(KEY) is not None
    os.utime(file, (1, 1))
    assert store.holder(KEY) is None


def test_a_lease_from_the_future_is_a_dead_one(store, lease_of):
    file = lease_of(host="elsewhere", pid=1)
    later = file.stat().st_mtime + 10_000
    os.utime(file, (later, later))
    assert store.holder(KEY) is None


def test_what_killed_writers_left_is_swept(store):
    folder = store.folder(KEY)
    folder.mkdir(parents=True)
    for name in (".record.json.4711", ".weights.safetensors.4711", ".lease.host.4711"):
        (folder / name).write_text("half")
        os.utime(folder / name, (1, 1))
    (folder / ".record.json.4712").write_text("just now")
    (folder / ".lease.host.4712").write_text("just now")
    with store.lease(KEY):
        assert files_of(store) == [".lease.host.4712", "lease"]
