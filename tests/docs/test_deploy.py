"""What ``deploy/`` holds names files, flags and packages that there are.

Its queries are held against a running server in ``tests/examples``.
"""

from __future__ import annotations

import re
import tomllib

import promql_parser
import pytest
import yaml

from tests.docs.deployed import DEPLOY, alert_rules, queries
from tests.docs.pages import ROOT


@pytest.mark.parametrize("expression", queries(), ids=str)
def test_queries_parse(expression):
    promql_parser.parse(expression)


def test_alert_rules_say_what_to_do():
    for rule in alert_rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_images_copy_what_there_is_and_what_is_needed(image):
    text = (DEPLOY / f"Dockerfile.{image}").read_text()
    copied = {
        name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()
    }
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "setup.py", "vllm_am", "kernels", "csrc"} <= copied


def test_the_gpu_image_installs_what_the_package_needs():
    """Without dependencies, so that none replaces the engine's own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cupy = [name for name in project["optional-dependencies"]["cuda"] if "cupy" in name]
    text = (DEPLOY / "Dockerfile.cuda").read_text()
    [listed] = re.findall(r"install --no-cache-dir (greenlet.*) \\", text)
    assert listed.split() == [*project["dependencies"], *cupy]


@pytest.mark.slow
def test_kubernetes_starts_the_server_with_flags_that_it_takes(serve_parser):
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    assert [each["kind"] for each in documents] == [
        "PersistentVolumeClaim",
        "Deployment",
        "Service",
    ]
    volume, deployment, service = documents
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    arguments = serve_parser.parse_args(container["args"])
    options = arguments.additional_config["kv_compaction"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert options["prefix_folder"] in mounts
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    assert set(mounts.values()) == set(volumes)
    claimed = volumes["data"]["persistentVolumeClaim"]["claimName"]
    assert claimed == volume["metadata"]["name"]
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
