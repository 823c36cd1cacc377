"""Files of compacted prefixes: what is written is read, and everything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_am.engine.prefix_file import (
    PROTECTED,
    TOKEN_IDS,
    PrefixFile,
    PrefixFileError,
    PrefixHeader,
    join_parts,
    part_path,
    parts_of,
    write_part,
)

HEADS = ("L0H0", "L0H1", "L3H0", "L3H1")
HEADER = PrefixHeader(
    model="a/model",
    model_digest="sha256:1",
    dtype="bfloat16",
    heads=HEADS,
    head_dim=8,
    options={"method": "highest-attention", "queries": {"a": 0.5}},
    ratio=0.1,
    salt=None,
    spans=((32, 96), (96, 128)),
    plugin="0.1.0",
)
TOKENS = tuple(range(100, 228))
#: By span and head.
SLOTS = ((3, 9, 0, 64), (1, 2, 3, 32))


def tensors(name: str, head: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(hash((name, head)) % 1000)
    count = 32 if name == PROTECTED else SLOTS[int(name)][HEADS.index(head)]
    found = {
        part: torch.randn(count, 8, generator=generator).bfloat16() for part in ("keys", "values")
    }
    if name != PROTECTED:
        found["bias"] = torch.randn(count, generator=generator)
    return found


@pytest.fixture
def path(tmp_path):
    """Written by two ranks."""
    whole = tmp_path / "contract.kv"
    for name in HEADER.names:
        for rank, heads in enumerate((HEADS[:2], HEADS[2:])):
            part = part_path(whole, "t", name, rank)
            write_part(part, name, {head: tensors(name, head) for head in heads})
    join_parts(whole, HEADER, (*TOKENS, 7, 7, 7), "t")
    return whole


def test_what_is_written_is_read(path):
    file = PrefixFile.read(path)
    assert file.header == HEADER
    assert (file.token_ids, file.slots) == (TOKENS, SLOTS)
    assert parts_of(path, "t") == []
    for name in HEADER.names:
        for head in HEADS:
            (found,) = file.read_heads(name, [head])
            expected = tensors(name, head)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[part], expected[part]) for part in found)


def test_what_is_left_when_a_part_is_missing(path, tmp_path):
    other = tmp_path / "other.kv"
    write_part(part_path(other, "u", "0", 0), "0", {head: tensors("0", head) for head in HEADS})
    with pytest.raises(PrefixFileError, match="protected"):
        join_parts(other, HEADER, TOKENS, "u")
    assert not other.exists()


CHANGED_HEADERS = {
    "version": ({"version": "2"}, {}, "version: is '2', and this vllm-am reads '1'"),
    "format": ({"format": "pt"}, {}, "is no compacted prefix"),
    "header": ({"header": "{"}, {}, "header: cannot be read"),
    "list": ({"header": "[]"}, {}, "header"),
    "spans": ({}, {"spans": [[32, 96], [100, 128]]}, "spans: do not follow one another"),
    "no spans": ({}, {"spans": []}, "spans: do not follow one another"),
    "backwards": ({}, {"spans": [[32, 16], [16, 128]]}, "spans: do not follow one another"),
    "negative": ({}, {"spans": [[-32, 96], [96, 128]]}, "spans: do not follow one another"),
    "texts": ({}, {"spans": [["a", "b"]]}, "header: cannot be read"),
    "no heads": ({}, {"heads": []}, "heads: are none"),
    "same heads": ({}, {"heads": ["L0H0", "L0H0", "L3H0", "L3H1"]}, "heads: are none, or not all"),
    "other heads": ({}, {"heads": ["L0H0", "L0H1", "L3H0", "L4H1"]}, "L4H1.keys: is not there"),
    "head_dim": ({}, {"head_dim": 16}, "keys: is not there, or of another shape"),
    "huge": ({}, {"head_dim": 10**12}, "keys: is not there, or of another shape"),
    "dtype": ({}, {"dtype": "int8"}, "dtype: is not one of"),
    "other dtype": ({}, {"dtype": "float16"}, "keys: is not there, or of another shape or type"),
    "ratio": ({}, {"ratio": 1.5}, "ratio: is not in"),
    "no number": ({}, {"ratio": "0.1"}, "ratio: is of another type"),
    "salt": ({}, {"salt": 3}, "salt: is of another type"),
    "shorter": ({}, {"spans": [[32, 64], [64, 128]]}, "L3H1.keys: is not there"),
    "more": ({}, {"extra": 1}, "header: has other fields"),
}


@pytest.mark.parametrize(
    ("metadata", "header", "message"), CHANGED_HEADERS.values(), ids=CHANGED_HEADERS.keys()
)
def test_a_header_that_is_wrong(path, metadata, header, message):
    """Field by field."""
    found = HEADER.to_metadata()
    found["header"] = json.dumps({**json.loads(found["header"]), **header})
    save_file(load_file(path), path, {**found, **metadata})
    with pytest.raises(PrefixFileError, match=message) as error:
        PrefixFile.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.L3H0.bias": None}, "1.L3H0.bias: is not there"),
        ({"protected.L3H0.values": None}, "protected.L3H0.values: is not there"),
        ({"more": torch.zeros(1)}, "more: should not be there"),
        ({"0.L0H0.bias": torch.zeros(4)}, "0.L0H0.bias: is not there, or of another shape"),
        ({"0.L0H0.bias": torch.zeros(3).half()}, "0.L0H0.bias: is not there"),
        ({"0.L0H0.keys": torch.zeros(65, 8).bfloat16()}, "0.L0H0.* is not there, or of another"),
        ({TOKEN_IDS: torch.zeros(5, dtype=torch.int32)}, "token_ids: are not those of 128"),
        ({"0.L0H0.keys": torch.tensor(1.0).bfloat16()}, "0.L0H0.* is not there, or of another"),
        ({TOKEN_IDS: None}, "token_ids: are not those of 128"),
    ],
)
def test_tensors_that_are_wrong(path, change, message):
    found = {**load_file(path), **change}
    save_file({k: v for k, v in found.items() if v is not None}, path, HEADER.to_metadata())
    with pytest.raises(PrefixFileError, match=message):
        PrefixFile.read(path)


@pytest.mark.parametrize("length", [0, 7, 100, 3000])
def test_a_file_that_is_cut_short(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(PrefixFileError, match="cannot be read"):
        PrefixFile.read(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PrefixFileError, match="cannot be read"):
        PrefixFile.read(tmp_path / "none.kv")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(path, value):
    found = load_file(path)
    found["1.L3H0.values"][1, 2] = value
    save_file(found, path, HEADER.to_metadata())
    file = PrefixFile.read(path)
    file.read_heads("1", ["L0H0"])
    with pytest.raises(PrefixFileError, match=r"1\.L3H0\.values: is not finite"):
        file.read_heads("1", HEADS)


def test_a_file_that_changes_after_it_was_checked(path):
    file = PrefixFile.read(path)
    save_file(load_file(path), path, replace(HEADER, model_digest="sha256:2").to_metadata())
    with pytest.raises(PrefixFileError, match="has changed"):
        file.read_heads("0", HEADS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_digest", "sha256:9"),
        ("dtype", "float16"),
        ("head_dim", 16),
        ("heads", ("L0H0",)),
    ],
)
def test_an_engine_with_another_model(path, field, value):
    """Never, whatever is accepted else."""
    expected = replace(HEADER, **{field: value})
    with pytest.raises(PrefixFileError, match=f"{field}: it was made with .*make it anew"):
        PrefixFile.read(path).check(expected, 1000, any_options=True)


def test_an_engine_with_other_options(path):
    file = PrefixFile.read(path)
    file.check(replace(HEADER, ratio=0.5, plugin="2", model="x", salt="y"), 1000, False)
    for options in ({"method": "omp", "queries": {"a": 0.5}}, {"method": "highest-attention"}):
        expected = replace(HEADER, options=options)
        with pytest.raises(PrefixFileError, match=r"options: .* with (method|queries)="):
            file.check(expected, 1000, any_options=False)
        file.check(expected, 1000, any_options=True)


def test_tokens_beyond_the_vocabulary(path):
    with pytest.raises(PrefixFileError, match="token_ids: are not all of the model"):
        PrefixFile.read(path).check(HEADER, 200, False)
