"""The review page: only its own images, only with the token, every act on the disk, nobody overwritten."""

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from conftest import REPOSITORY, House
from labelled import CLASSES, make_manifest, make_oof
from octofold.clean import cleaning
from octofold.clean.desk import Desk, progress
from octofold.clean.review import Server, make_app
from octofold.data import journal
from octofold.data.journal import Entry, Journal
from octofold.data.manifest import Manifest
from octofold.errors import UserError

TOKEN = "secret-token"
WRONG = {4: 2, 9: 1, 20: 0}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path, WRONG)[0]


def make_desk(manifest: Manifest, reviewer: str = "anna", limit: int = 0) -> Desk:
    truth = np.arange(len(manifest.table)) % 3
    queue = cleaning.rank(manifest, [make_oof(manifest, truth)], limit=limit)
    return Desk(queue, manifest, Journal(manifest.images.parent / "decisions.jsonl"), reviewer)


@pytest.fixture
def desk(manifest: Manifest) -> Desk:
    return make_desk(manifest)


@pytest.fixture
def client(desk: Desk) -> FlaskClient:
    return make_app(desk, TOKEN).test_client()


def act(item: Any, action: str = "keep", number: int = 1, **more: str) -> dict[str, str]:
    return {"id": item.sample_id, "action": action, "entry": f"{number:032x}", **more}


def post(client: FlaskClient, *acts: dict[str, Any], **more: Any) -> Any:
    return client.post(f"/{TOKEN}/acts", json={"acts": list(acts), "since": 0, **more})


def test_an_act_is_in_the_journal_before_it_is_acknowledged(desk: Desk, client: FlaskClient) -> None:
    item = desk.queue.items[0]
    answer = post(client, act(item, "relabel", target=item.guesses[0][0]), reviewer="Zoë").get_json()
    entry = journal.read(desk.journal.path).entries[0]
    assert answer["written"] == [entry.entry]
    assert (entry.sample_id, entry.action, entry.target) == (item.sample_id, "relabel", item.guesses[0][0])
    assert (entry.label, entry.reviewer, entry.manifest_hash) == (item.label, "Zoë", desk.hash)
    assert entry.path == item.path
    assert progress(desk.journal, desk.queue, desk.manifest)["relabel"] == 1


def test_two_tabs_do_not_overwrite_each_other(manifest: Manifest) -> None:
    """Each tab may even have its own server."""
    one, two = (make_app(make_desk(manifest, name), TOKEN).test_client() for name in ("one", "two"))
    item = make_desk(manifest).queue.items[0]
    assert post(one, act(item)).get_json()["refused"] == []
    answer = post(two, act(item, "drop", 2)).get_json()
    assert answer["written"] == []
    assert answer["refused"][0]["standing"]["reviewer"] == "one"
    assert answer["changes"][0]["standing"]["action"] == "keep", "the other tab learns what happened"
    assert post(two, act(item, "drop", 3, after=f"{1:032x}")).get_json()["refused"] == []
    assert two.get(f"/{TOKEN}/news?since=1").get_json()["changes"][0]["standing"]["action"] == "drop"


def test_a_page_learns_what_a_replaced_journal_says(desk: Desk, client: FlaskClient) -> None:
    first, second, third = desk.queue.items[:3]
    seq = post(client, act(first), act(second, "drop", 2)).get_json()["seq"]
    kept = desk.journal.path.read_text().splitlines(keepends=True)[0]
    desk.journal.path.write_text(Entry(third.sample_id, "drop", label=third.label).line() + kept)
    changes = client.get(f"/{TOKEN}/news?since={seq}").get_json()["changes"]
    now = {one["rank"]: one["standing"] and one["standing"]["action"] for one in changes}
    assert now == {0: "keep", 1: None, 2: "drop"}


def test_an_act_whose_answer_was_lost_is_sent_again_and_written_once(
    desk: Desk, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = desk.queue.items[0]
    for again in (act(item), act(item, "undo", 2, undoes=f"{1:032x}")):
        for second in (0, 1):
            now = datetime(2026, 1, 1, 12, int(again["action"] == "undo"), second, tzinfo=UTC)
            clock = SimpleNamespace(now=lambda zone, now=now: now, fromisoformat=datetime.fromisoformat)
            monkeypatch.setattr(journal, "datetime", clock)
            answer = post(client, again).get_json()
            assert (answer["written"], answer["refused"]) == ([again["entry"]], [])
    monkeypatch.undo()
    assert [entry.action for entry in journal.read(desk.journal.path).entries] == ["keep", "undo"]


def test_undo_is_an_entry_and_goes_on_after_a_reload(desk: Desk, client: FlaskClient) -> None:
    first, second = desk.queue.items[:2]
    post(client, act(first), act(second, "drop", 2))
    mine = client.get(f"/{TOKEN}/mine?reviewer=anna").get_json()
    assert [one[2] for one in mine] == [f"{1:032x}", f"{2:032x}"]
    post(client, act(second, "undo", 3, undoes=f"{2:032x}"))
    assert len(client.get(f"/{TOKEN}/mine?reviewer=anna").get_json()) == 1
    assert [entry.action for entry in journal.read(desk.journal.path).entries] == ["keep", "drop", "undo"]
    assert second.sample_id in cleaning.undecided(desk.journal, desk.manifest)


@pytest.mark.parametrize(
    "broken",
    [
        {"id": "nobody"}, {"id": ["a"]}, {"id": None}, {"action": "fly"}, {"action": "relabel", "target": "plum"},
        {"action": "relabel", "target": ""}, {"action": "relabel", "target": ["x"]}, {"entry": ""}, {"entry": "a b"},
        {"action": ["keep"]}, {"after": 7}, {"undoes": "x"}, {"action": "undo"},
    ],
)  # fmt: skip
def test_a_broken_act_writes_nothing(desk: Desk, client: FlaskClient, broken: dict[str, Any]) -> None:
    answer = post(client, act(desk.queue.items[0]), act(desk.queue.items[1], number=2) | broken)
    assert answer.status_code == 400
    assert answer.get_json()["error"]
    assert not desk.journal.path.exists()


def test_broken_requests_are_refused_in_words(desk: Desk, client: FlaskClient) -> None:
    address = f"/{TOKEN}/acts"
    for body in ([], {}, {"acts": 3}, {"acts": [3]}, {"acts": [{}] * 300}):
        assert client.post(address, json=body).status_code == 400
    assert client.post(address, data="{", content_type="application/json").status_code == 400
    assert client.post(address, data="x=1").status_code == 415
    assert post(client, act(desk.queue.items[0]), reviewer={"a": 1}).status_code == 400
    assert client.post(address, data=b"x" * (2 << 20), content_type="application/json").status_code == 413
    assert client.get(f"/{TOKEN}/items?ranks=99999,-1,x,,٣").status_code == 200
    assert client.get(f"/{TOKEN}/news?since=-5").status_code == 200


def test_nothing_without_the_token_or_from_another_host(desk: Desk, client: FlaskClient) -> None:
    picture = f"big/{desk.queue.items[0].sample_id}"
    for path in ("/", "/wrong/", "/wrong/state", f"/{picture}", f"/{TOKEN}x/state", "//", "/тест/"):
        assert client.get(path).status_code == 404
    assert client.get(f"/{TOKEN}/state", headers={"Host": "evil.example"}).status_code == 403
    for host in ("127.0.0.1:5000", "localhost", "[::1]:80"):
        assert client.get(f"/{TOKEN}/state", headers={"Host": host}).status_code == 200


def test_only_the_manifests_own_images(desk: Desk, client: FlaskClient, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(desk.manifest.paths[0].read_bytes())
    one = desk.queue.items[0].sample_id
    assert client.get(f"/{TOKEN}/big/{one}").data[:3] == b"\xff\xd8\xff"
    for name in ("../secret.png", "..%2fsecret.png", "%2e%2e/secret.png", "/etc/passwd", "secret.png", "", "%00"):
        assert client.get(f"/{TOKEN}/big/{name}").status_code in (404, 410, 308)
    assert client.get(f"/{TOKEN}/huge/{one}").status_code == 404


@pytest.mark.parametrize("path", ["../secret.png", "link.png", "/etc/hostname"])
def test_paths_that_leave_the_folder_are_not_served(manifest: Manifest, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.png").write_bytes(manifest.paths[0].read_bytes())
    (manifest.images / "link.png").symlink_to(tmp_path / "secret.png")
    table = manifest.table.copy()
    table.loc[0, "path"] = path
    desk = make_desk(dataclasses.replace(manifest, table=table))
    answer = make_app(desk, TOKEN).test_client().get(f"/{TOKEN}/big/{table['sample_id'][0]}")
    assert answer.status_code == 410
    assert "inside" in answer.get_json()["error"]


def test_an_image_deleted_meanwhile_is_said_and_can_be_dropped(desk: Desk, client: FlaskClient) -> None:
    item = desk.queue.items[0]
    (desk.manifest.images / item.path).unlink()
    answer = client.get(f"/{TOKEN}/big/{item.sample_id}")
    assert answer.status_code == 410
    assert "no such file" in answer.get_json()["error"]
    assert post(client, act(item, "drop")).get_json()["written"]


def test_an_image_replaced_meanwhile_is_not_shown_as_the_sample(desk: Desk, client: FlaskClient) -> None:
    """Files renamed since prepare: under this id and label another picture would be judged."""
    item, other = desk.queue.items[:2]
    (desk.manifest.images / item.path).write_bytes((desk.manifest.images / other.path).read_bytes())
    for size in ("big", "thumb"):
        answer = client.get(f"/{TOKEN}/{size}/{item.sample_id}")
        assert answer.status_code == 410
        assert "the file has changed since" in answer.get_json()["error"]
    assert client.get(f"/{TOKEN}/big/{other.sample_id}").status_code == 200


def test_ids_of_another_making_say_nothing_of_the_content(manifest: Manifest) -> None:
    table = manifest.table.assign(sample_id=[f"photo-{row}" for row in range(len(manifest.table))])
    desk = Desk(cleaning.Queue([], []), dataclasses.replace(manifest, table=table), Journal("none.jsonl"), "anna")
    assert desk.image("photo-3", "big")


def test_a_skip_takes_no_decision_back(desk: Desk, client: FlaskClient) -> None:
    """The page shows what the replay will do, and the same after a reload."""
    item = desk.queue.items[3]
    drop, skip = f"{1:032x}", f"{2:032x}"
    post(client, act(item, "drop"))
    changed = post(client, act(item, "skip", 2, after=drop), since=1).get_json()["changes"]
    assert desk.journal.decisions()[item.sample_id].action == "drop"
    assert client.get(f"/{TOKEN}/state").get_json()["done"] == [3]
    shown = client.get(f"/{TOKEN}/items?ranks=3").get_json()[0]["standing"]
    assert (shown["action"], shown["decided"]) == ("drop", True)
    assert shown["entry"] == skip, "the next act has seen the skip"
    assert [one["standing"] for one in changed] == [shown]
    answer = post(client, act(item, "keep", 3, after=drop), reviewer="ben").get_json()["refused"][0]
    assert (answer["standing"], answer["rival"]["action"]) == (shown, "skip")
    post(client, act(item, "undo", 4, undoes=skip), act(desk.queue.items[5], "skip", 5))
    assert client.get(f"/{TOKEN}/items?ranks=3").get_json()[0]["standing"]["entry"] == drop
    shown = client.get(f"/{TOKEN}/items?ranks=5").get_json()[0]["standing"]
    assert (shown["action"], shown["decided"]) == ("skip", False)


def test_a_decision_on_a_label_that_changed_is_none(desk: Desk, client: FlaskClient) -> None:
    item = desk.queue.items[0]
    desk.journal.append([Entry(item.sample_id, "keep", label="what it was called once")])
    assert client.get(f"/{TOKEN}/items?ranks=0").get_json()[0]["standing"]["decided"] is False
    assert client.get(f"/{TOKEN}/state").get_json()["done"] == []


def test_a_manifest_that_moved_on_is_said(desk: Desk, client: FlaskClient) -> None:
    assert client.get(f"/{TOKEN}/news?since=0").get_json()["moved_on"] is False
    table = desk.manifest.table.assign(fold=0)
    dataclasses.replace(desk.manifest, table=table).save(desk.manifest.images.parent / "manifest.csv")
    answer = post(client, act(desk.queue.items[0])).get_json()
    assert answer["moved_on"] is True
    assert len(answer["written"]) == 1, "decisions go by image: they count all the same"


def test_an_empty_queue_is_a_page_too(manifest: Manifest) -> None:
    desk = make_desk(manifest)
    empty = Desk(dataclasses.replace(desk.queue, items=[]), manifest, desk.journal, "anna")
    client = make_app(empty, TOKEN).test_client()
    assert client.get(f"/{TOKEN}/state").get_json()["total"] == 0
    assert client.get(f"/{TOKEN}/queue").get_json() == []


def test_the_page_runs_only_its_own_script(client: FlaskClient) -> None:
    answer = client.get(f"/{TOKEN}/")
    policy = answer.headers["Content-Security-Policy"]
    nonce = re.findall(r"script-src 'nonce-([\w-]+)'", policy)[0]
    assert "default-src 'none'" in policy
    assert f'<script nonce="{nonce}">' in answer.text
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", ""), "nothing from elsewhere"
    assert "innerHTML" not in answer.text, "texts are shown as text"
    assert not re.search(r"\son\w+=\"", answer.text)
    assert client.get(f"/{TOKEN}/").headers["Content-Security-Policy"] != policy
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_a_full_disk_is_said_and_nothing_is_acknowledged(desk: Desk, client: FlaskClient) -> None:
    """A file size limit stands in for the disk: the first act fits, the second is cut in its middle."""
    first, second, third = desk.queue.items[:3]
    assert post(client, act(first)).get_json()["written"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (desk.journal.path.stat().st_size + 40, limits[1]))
    try:
        answer = post(client, act(second, number=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answer.status_code == 507
    assert "too large" in answer.get_json()["error"]
    answer = post(client, act(second, number=2), act(third, number=3)).get_json()
    assert len(answer["written"]) == 2, "there is room again, the page sends it again: nothing is lost"
    kept = journal.read(desk.journal.path)
    assert [entry.sample_id for entry in kept.entries] == [item.sample_id for item in (first, second, third)]
    assert [number for number, _ in kept.damaged] == client.get(f"/{TOKEN}/state").get_json()["damaged"] == [2]


def test_a_taken_port_is_refused(desk: Desk) -> None:
    server = Server(desk)
    port = int(server.url.split(":")[2].split("/")[0])
    with pytest.raises(UserError, match=f"port {port}"):
        Server(desk, port=port)
    server._server.server_close()


def _call(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def started(house: House, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Manifest]]:
    """The command itself, its page open."""
    manifest, truth = make_manifest(house.home / "data" / "world", WRONG)
    oof = make_oof(manifest, truth).save(tmp_path / "oof.parquet")
    command = [sys.executable, str(REPOSITORY / "entrypoints" / "clean.py"), "--manifest", str(manifest.file)]
    with subprocess.Popen(
        [*command, "--oof", str(oof), "--embed", "none"],
        env=house.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/\S+/", line):
                yield process, found[0], manifest
                break
        else:
            pytest.fail("".join(lines))
        process.kill()


@pytest.mark.slow
def test_acknowledged_acts_survive_a_kill_and_finish_ends_the_command(
    started: tuple[subprocess.Popen[str], str, Manifest],
) -> None:
    process, url, manifest = started
    ids = manifest.sample_ids.tolist()
    for number, one in enumerate(ids[:10]):
        answer = _call(f"{url}acts", {"acts": [{"id": one, "action": "keep", "entry": f"e{number}"}]})
        assert answer["written"] == [f"e{number}"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = journal.read(manifest.images.parent / "decisions.jsonl")
    assert [entry.entry for entry in kept.entries] == [f"e{number}" for number in range(10)]
    assert kept.damaged == []
    assert CLASSES[0] in {entry.label for entry in kept.entries}
