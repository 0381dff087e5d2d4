"""One file from a hub that cuts, changes, refuses and lies: whole and right, or not there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.tts import download as module
from src.tts.download import (
    Fetched,
    Hub,
    HubFile,
    NoSpace,
    NotFetched,
    NotOnHub,
    Refused,
    Unreachable,
    WrongFile,
    download,
)
from tests.fake_hub import COMMIT, FakeHub, running

WEIGHTS = bytes(range(256)) * 4096
SHA = hashlib.sha256(WEIGHTS).hexdigest()
PLACE = HubFile("owner/voice", "main", "sub/model.pth")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running(FakeHub({"owner/voice/sub/model.pth": WEIGHTS})) as fake:
        yield fake


def fetch(fake: FakeHub, target: Path, sha256: str = "", token: str = "") -> Fetched:
    return download(PLACE, target, Hub(fake.base, token), sha256=sha256, pause=lambda seconds: None)


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def cut(hub: FakeHub, target: Path, *after: int) -> None:
    """A fetch that gets no further: five answers in a row bring nothing more."""
    hub.cut_after = [*after, 0, 0, 0, 0, 0]
    with pytest.raises(Unreachable):
        fetch(hub, target)
    hub.cut_after = []
    hub.asked.clear()


def test_a_file_arrives_whole_with_its_hash_and_the_commit_it_is_of(
    hub: FakeHub, tmp_path: Path
) -> None:
    target = tmp_path / "pack" / "model.pth"
    came = fetch(hub, target, SHA.upper())
    assert came == Fetched(SHA, len(WEIGHTS), COMMIT)
    assert target.read_bytes() == WEIGHTS
    assert left(target) == ["model.pth"]
    assert hub.asked_for == ["/owner/voice/resolve/main/sub/model.pth"]


def test_progress_rises_to_the_size_that_was_announced(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    download(
        PLACE,
        tmp_path / "model.pth",
        Hub(hub.base),
        report=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[0] == (0, len(WEIGHTS))
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))


def test_a_cut_connection_goes_on_where_it_was_cut(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = [300_000, 200_000]
    fetch(hub, tmp_path / "model.pth", SHA)
    assert (tmp_path / "model.pth").read_bytes() == WEIGHTS
    assert [said.get("range") for _, said in hub.asked] == [
        None,
        "bytes=300000-",
        "bytes=500000-",
    ]


def test_the_next_call_goes_on_from_what_the_last_one_left(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    cut(hub, target, 300_000)
    assert left(target) == [".model.pth.part", ".model.pth.part-of"]
    fetch(hub, target, SHA)
    assert [said["range"] for _, said in hub.asked] == ["bytes=300000-"]
    assert left(target) == ["model.pth"]


def test_a_part_of_a_file_that_has_changed_since_is_thrown_away(
    hub: FakeHub, tmp_path: Path
) -> None:
    target = tmp_path / "model.pth"
    cut(hub, target, 300_000)
    hub.files["owner/voice/sub/model.pth"] = WEIGHTS[::-1]
    fetch(hub, target)
    assert target.read_bytes() == WEIGHTS[::-1]


def test_a_part_that_nobody_knows_the_origin_of_is_thrown_away(
    hub: FakeHub, tmp_path: Path
) -> None:
    target = tmp_path / "model.pth"
    (tmp_path / ".model.pth.part").write_bytes(b"something else")
    fetch(hub, target, SHA)
    assert target.read_bytes() == WEIGHTS
    assert [said.get("range") for _, said in hub.asked] == [None]


def test_a_hub_without_ranges_sends_all_of_it_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.takes_ranges = False
    hub.cut_after = [300_000]
    fetch(hub, tmp_path / "model.pth", SHA)
    assert (tmp_path / "model.pth").read_bytes() == WEIGHTS


def test_a_hub_that_is_busy_is_asked_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.busy = 2
    fetch(hub, tmp_path / "model.pth", SHA)
    assert len(hub.asked) == 3


def test_a_hub_that_stays_busy_is_given_up(hub: FakeHub, tmp_path: Path) -> None:
    hub.busy = 100
    with pytest.raises(Unreachable, match="503"):
        fetch(hub, tmp_path / "model.pth")
    assert len(hub.asked) == 5
    assert left(tmp_path / "model.pth") == []


def test_another_content_than_the_pinned_one_is_not_even_fetched_if_the_hub_says_so(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.stores_elsewhere = True
    reports: list[int] = []
    with pytest.raises(WrongFile, match=f"{SHA}, the catalog pins {'0' * 64}"):
        download(
            PLACE,
            tmp_path / "model.pth",
            Hub(hub.base),
            sha256="0" * 64,
            report=lambda done, total: reports.append(done),
        )
    assert reports == []
    assert left(tmp_path / "model.pth") == []


def test_a_part_that_is_longer_than_the_file_starts_again(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    cut(hub, target, 300_000)
    with (tmp_path / ".model.pth.part").open("ab") as part:
        part.write(WEIGHTS)
    fetch(hub, target, SHA)
    assert target.read_bytes() == WEIGHTS
    assert len(hub.asked) == 2


def test_another_content_than_the_pinned_one_is_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.announces_hashes = False
    with pytest.raises(WrongFile, match=f"{SHA}, the catalog pins {'0' * 64}; it was not kept"):
        fetch(hub, tmp_path / "model.pth", "0" * 64)
    assert left(tmp_path / "model.pth") == []


def test_another_content_than_the_hub_announced_is_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.announced = "1" * 64
    with pytest.raises(WrongFile, match=f"{SHA}, the hub announced {'1' * 64}"):
        fetch(hub, tmp_path / "model.pth")
    assert left(tmp_path / "model.pth") == []


def test_what_was_there_stays_until_the_new_file_is_right(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"mine")
    hub.announced = "1" * 64
    with pytest.raises(WrongFile):
        fetch(hub, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == b"mine"


@pytest.mark.parametrize("status", [401, 403])
def test_a_page_with_terms_refuses_and_opens_with_the_token(
    hub: FakeHub, tmp_path: Path, status: int
) -> None:
    hub.refuse["owner/voice"] = status
    with pytest.raises(Refused, match=f"{status} GatedRepo"):
        fetch(hub, tmp_path / "model.pth", token="hf_wrong")
    assert len(hub.asked) == 1, "asking again does not help"
    fetch(hub, tmp_path / "model.pth", SHA, token="hf_right")
    assert (tmp_path / "model.pth").read_bytes() == WEIGHTS


def test_the_token_does_not_follow_the_bytes_to_another_host(hub: FakeHub, tmp_path: Path) -> None:
    hub.stores_elsewhere = True
    hub.cut_after = [300_000]
    came = fetch(hub, tmp_path / "model.pth", token="hf_right")
    assert came == Fetched(SHA, len(WEIGHTS), COMMIT)
    tokens = {path: said.get("authorization") for path, said in hub.asked}
    assert tokens == {
        "/owner/voice/resolve/main/sub/model.pth": "Bearer hf_right",
        "/stored/owner/voice/sub/model.pth": None,
    }
    assert hub.asked[-1][1]["range"] == "bytes=300000-"


def test_a_file_that_the_hub_does_not_have_is_asked_for_once(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(NotOnHub, match="404 EntryNotFound"):
        download(HubFile("owner/voice", "main", "no.pth"), tmp_path / "no.pth", Hub(hub.base))
    assert len(hub.asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers
        base = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"
        waits: list[float] = []
        with pytest.raises(Unreachable) as refused:
            download(PLACE, tmp_path / "model.pth", Hub(base), pause=waits.append)
    assert waits == []
    assert "127.0.0.1" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_hf_hub_offline_is_obeyed(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE"):
        download(PLACE, tmp_path / "model.pth", Hub.of({**hub.env(), "HF_HUB_OFFLINE": "1"}))
    assert hub.asked == []


def test_a_disk_that_is_too_small_is_said_before_it_is_full(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPARE", 1 << 62)
    with pytest.raises(NoSpace, match="are free at"):
        fetch(hub, tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_do_not_write_into_each_other(hub: FakeHub, tmp_path: Path) -> None:
    with (tmp_path / ".model.pth.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(NotFetched, match="by another process"):
            fetch(hub, tmp_path / "model.pth")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("env", "token"),
    [
        ({"HF_TOKEN": " hf_one\n", "HF_HOME": "{home}"}, "hf_one"),
        ({"HF_HOME": "{home}"}, "hf_left_by_login"),
        ({"HF_TOKEN_PATH": "{home}/token", "HF_HOME": "/nowhere"}, "hf_left_by_login"),
        ({"HF_HOME": "/nowhere"}, ""),
    ],
)
def test_the_token_is_where_hugging_face_s_tools_have_it(
    tmp_path: Path, env: dict[str, str], token: str
) -> None:
    (tmp_path / "token").write_text("hf_left_by_login\n")
    filled = {name: value.format(home=tmp_path) for name, value in env.items()}
    assert Hub.of(filled) == Hub("https://huggingface.co", token)


def test_an_endpoint_is_shown_without_its_password() -> None:
    hub = Hub.of({"HF_ENDPOINT": "https://me:secret@mirror:8/", "HF_HOME": os.devnull})
    assert hub.shown(PLACE) == "https://mirror:8/owner/voice/resolve/main/sub/model.pth"
    assert hub.page(PLACE) == "https://mirror:8/owner/voice"


def test_a_place_is_taken_apart_and_put_together() -> None:
    place = HubFile.parse("owner/voice@refs-pr-1/sub/model.pth")
    assert place == HubFile("owner/voice", "refs-pr-1", "sub/model.pth")
    assert place.at("abc") == "hub:owner/voice@abc/sub/model.pth"
