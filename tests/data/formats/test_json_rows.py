"""Reading row by row gives what reading at once gives, whatever the size of a chunk."""

import json
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from misa.data.formats import json_rows
from misa.data.formats.json_rows import ObjectFile, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def gathered(path):
    whole = {}
    for kind, key, value in read_object(path):
        if kind == "list":
            whole[key] = []
        elif kind == "row":
            whole[key].append(value)
        else:
            whole[key] = value
    return whole


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(max_size=3), VALUES, max_size=5),
    st.integers(1, 30),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_the_same_as_at_once(tmp_path, content, chunk, indent, ascii_only, encoding):
    path = tmp_path / "x.json"
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    with patch.object(json_rows, "_CHUNK", chunk):
        assert gathered(path) == content


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text("ab\n", max_size=2), VALUES, min_size=1, max_size=4), st.data())
def test_errors_are_where_json_finds_them(tmp_path, content, data):
    path = tmp_path / "x.json"
    text = json.dumps(content, indent=data.draw(st.sampled_from([None, 2])))
    at = data.draw(st.integers(1, len(text) - 1))
    spoilt = text[:at] if data.draw(st.booleans()) else text[:at] + data.draw(st.sampled_from("}],:x")) + text[at:]
    path.write_text(spoilt)
    with patch.object(json_rows, "_CHUNK", data.draw(st.integers(1, 30))):
        theirs, ours = (outcome(read) for read in (lambda: json.loads(spoilt), lambda: gathered(path)))
        if isinstance(theirs, tuple) and isinstance(ours, tuple) and theirs[0] != ours[0]:
            return  # another word for it
        assert ours == theirs


def outcome(read):
    """What is read, or the message and place of the error."""
    try:
        return read()
    except json.JSONDecodeError as error:
        return error.msg, error.lineno, error.colno


def test_memory_stays_flat(tmp_path):
    import tracemalloc

    path = tmp_path / "x.json"
    with ObjectFile(path) as file:
        with file.rows("rows") as add:
            for i in range(60_000):
                add({"id": i, "bbox": [1.5, 2.5, 30.25, 40.75]})
        file.value("name", "end")
    assert path.stat().st_size > 2_500_000
    tracemalloc.start()
    with patch.object(json_rows, "_CHUNK", 1 << 14):
        count = sum(event.kind == "row" for event in read_object(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 60_000
    assert peak < 500_000, "some chunks, not the file"


def test_a_file_that_is_being_written_is_not_there_yet(tmp_path):
    path = tmp_path / "x.json"
    with ObjectFile(path) as file:
        file.value("a", 1)
        assert not path.exists()
    assert json.loads(path.read_text()) == {"a": 1}
