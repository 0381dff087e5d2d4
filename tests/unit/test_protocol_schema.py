"""The protocol's page and schema say what the code does."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import jsonschema
import pytest

from scripts.protocol_schema import ROOT, SCHEMA, is_stale
from src.rpc import errors, ws_events

PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.S)]


def types_of(union: Any) -> set[str]:
    models = get_args(get_args(union)[0])
    return {str(model.model_fields["type"].default) for model in models}


def all_errors(root: type[errors.DuplexError]) -> set[type[errors.DuplexError]]:
    return set().union({root}, *(all_errors(kind) for kind in root.__subclasses__()))


def test_the_schema_file_is_fresh() -> None:
    assert not is_stale(), "run `just gen-schema`"


def test_a_stale_schema_is_noticed(tmp_path: Any) -> None:
    old = tmp_path / "old.json"
    assert is_stale(old)
    old.write_text(SCHEMA.read_text(encoding="utf-8").replace("barge_in", "bargein"))
    assert is_stale(old)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["type"])
def test_every_example_is_a_valid_event(example: dict[str, Any]) -> None:
    text = json.dumps(example)
    known = types_of(ws_events.ClientEvent)
    parse = ws_events.parse_client if example["type"] in known else ws_events.parse_server
    assert json.loads(parse(text).model_dump_json()) == example, "the example shows every field"
    jsonschema.validate(example, json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_every_event_has_an_example() -> None:
    every = types_of(ws_events.ClientEvent) | types_of(ws_events.ServerEvent)
    assert {example["type"] for example in EXAMPLES} == every


def test_the_error_table_is_the_error_tree() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", PAGE, re.M)
    table = {(code, int(close), int(http)) for code, close, http in rows}
    assert table == {(kind.code, kind.close, kind.http) for kind in all_errors(errors.DuplexError)}


def test_an_unknown_field_does_not_pass_the_schema() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"type": "session.end", "why": "bored"}, schema)
