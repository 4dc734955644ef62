"""The hashed table answers as the mapping that it was made from."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from stockade.resolve.hashedtable import HashedTable

TEXT = st.text(st.characters(exclude_characters="\n\0", codec="utf-8"), max_size=8)


@settings(max_examples=200, deadline=None)
@given(values=st.dictionaries(TEXT, TEXT), others=st.lists(TEXT))
def test_table_answers_as_the_mapping_it_was_made_from(
    values: dict[str, str], others: list[str], tmp_path_factory: object
) -> None:
    path = Path(tmp_path_factory.mktemp("table")) / "table"  # type: ignore[attr-defined]
    HashedTable.write(path, "state 1", values)
    table = HashedTable.open(path, "state 1")
    assert table is not None
    assert {key: table.get(key) for key in [*values, *others]} == {key: values.get(key) for key in [*values, *others]}


def test_table_of_another_state_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "table"
    assert HashedTable.open(path, "state 1") is None
    HashedTable.write(path, "state 1", {"/a": "b"})
    assert HashedTable.open(path, "state 2") is None
    assert HashedTable.open(path, "state") is None
    path.write_bytes(path.read_bytes()[:-1])
    assert HashedTable.open(path, "state 1") is None
    path.write_bytes(b"state 1\n")
    assert HashedTable.open(path, "state 1") is None
    path.write_bytes(b"")
    assert HashedTable.open(path, "state 1") is None


def test_bytes_that_are_no_text_are_kept(tmp_path: Path) -> None:
    HashedTable.write(tmp_path / "table", "s", {"/\udcff": "package"})
    table = HashedTable.open(tmp_path / "table", "s")
    assert table is not None
    assert table.get("/\udcff") == "package"
