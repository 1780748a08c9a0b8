"""``run.json`` is read as it was written, and a malformed one is refused with its file and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from staindiffuser.client.errors import RunRecordError
from staindiffuser.client.run_record import find_run, gate_text, read_run, write_run
from staindiffuser.client.testing import FAKE_CONTRACT
from tests.run_records import run_record


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = run_record(outputs={"cd3.ome.tiff": 17})
    write_run(tmp_path, record)
    assert read_run(tmp_path) == record
    assert find_run(tmp_path) == record


def test_what_the_gate_said_is_told_per_stain() -> None:
    cd3, ck = FAKE_CONTRACT.stains
    failed = FAKE_CONTRACT.gate
    assert gate_text(failed, [cd3, ck]) == "not passed: CD3 (radial power 0.34)"
    assert gate_text(failed, [ck]) == gate_text({"cd3": (), "ck818": ()}, [cd3, ck]) == "passed"
    assert gate_text({"ck818": ()}, [cd3, ck]) == "not judged: CD3"
    assert gate_text({}, [cd3, ck]) == "not judged"


def test_a_missing_record_is_no_result(tmp_path: Path) -> None:
    assert find_run(tmp_path) is None
    with pytest.raises(RunRecordError, match=r"run\.json does not exist"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": "3"}, "seed"),
        ({"surprise": 1}, "surprise: unknown field"),
        ({"input": {"path": "x"}}, r"input\.sha256: missing"),
        ({"outputs": {"../x": 1}}, "outputs"),
        ({"cells": {"CD3": -0.5}}, r"cells\.CD3"),
    ],
)
def test_a_malformed_record_names_file_and_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    data = {**run_record().to_dict(), **change}
    (tmp_path / "run.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(RunRecordError, match=rf"run\.json.*{field}"):
        find_run(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b'{"format": 1'])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunRecordError, match=r"run\.json"):
        read_run(tmp_path)
