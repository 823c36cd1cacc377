"""The queries of the dashboard and of the alert rules."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from tests.docs.pages import ROOT

DEPLOY = ROOT / "deploy"
#: What Grafana puts in, as it would.
_VARIABLES = {"$__rate_interval": "5m", "$model": ".*"}


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[str]:
    """PromQL of all panels and rules."""
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    found = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    for name, value in _VARIABLES.items():
        found = [expression.replace(name, value) for expression in found]
    return found + [rule["expr"] for rule in alert_rules()]


def metrics_queried() -> set[str]:
    """Names of series, of ours and of vLLM's."""
    return {name for query in queries() for name in re.findall(r"vllm:\w+", query)}
