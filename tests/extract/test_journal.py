"""The journal survives a crash in the middle of a line."""

from __future__ import annotations

from pathlib import Path

from coldframe.extract.journal import Journal, read_journal


def test_events_come_back_in_order_without_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.log("started", shard=0)
    journal.log("failed", video_id="é.mp4", reason="timed out")
    (file,) = (tmp_path / "journal").iterdir()
    with file.open("ab") as torn:
        torn.write('{"event": "failed", "video_id": "é'.encode()[:-1])
    assert [event["event"] for event in read_journal(tmp_path)] == ["started", "failed"]
    assert list(read_journal(tmp_path))[1]["video_id"] == "é.mp4"


def test_a_store_without_a_journal_has_no_events(tmp_path: Path) -> None:
    assert list(read_journal(tmp_path)) == []
