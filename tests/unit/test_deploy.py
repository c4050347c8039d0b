"""deploy/: what the Dockerfile copies is there, and the service takes what the Kubernetes manifest tells it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from parleyd.cli import build_parser

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
SERVICE, DEPLOYMENT = yaml.safe_load_all((ROOT / "deploy/kubernetes/parley.yaml").read_text())
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]
SETTINGS = build_parser({}).parse_args(["serve", *CONTAINER["args"]])


def test_what_the_image_is_made_of_is_there() -> None:
    sources = [name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M) for name in line.split()]
    assert "service" in sources
    assert [name for name in sources if not (ROOT / name).exists()] == []


def test_the_pods_ports_are_those_that_the_service_listens_on() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports == {"grpc": SETTINGS.port, "admin": SETTINGS.admin_port}
    assert CONTAINER["readinessProbe"]["grpc"]["port"] == SETTINGS.port
    assert CONTAINER["livenessProbe"]["httpGet"]["port"] == "admin"
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(SETTINGS.admin_port)
    assert SERVICE["spec"]["ports"][0]["port"] == SETTINGS.port


def test_a_pod_is_given_longer_than_its_drain() -> None:
    assert POD["spec"]["terminationGracePeriodSeconds"] >= SETTINGS.drain_delay + SETTINGS.drain_timeout + 5


def test_the_pod_is_the_user_for_whom_the_image_makes_its_cache_folder() -> None:
    context = POD["spec"]["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in DOCKERFILE
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert f"VOLUME {mounts['cache']}\n" in DOCKERFILE


def test_the_service_selects_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
