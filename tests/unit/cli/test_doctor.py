"""``kvmlite doctor``: what is printed and returned, with findings made up."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import kvmlite.images.readiness
import kvmlite.machine.doctor
from kvmlite.cli.doctor import doctor
from kvmlite.host.finding import Finding

GOOD = Finding(id="kvm-device", status="ok", seen="/dev/kvm exists", meaning="the device node is there")
INFO = Finding(id="tun", status="info", seen="no tun", meaning="no TAP", fix="sudo modprobe tun")
WARN = Finding(id="memory", status="warn", seen="1 MiB available", meaning="too little", fix="free memory")
BAD = Finding(id="kvm-speed", status="fail", seen="slow", meaning="a software KVM", fix="use another host")


@pytest.fixture
def run(monkeypatch):
    """``run(findings, *arguments)`` runs the command on these findings."""

    def invoke(findings: list[Finding], *arguments: str, **options: object):
        monkeypatch.setattr(kvmlite.machine.doctor, "collect", lambda files: findings[:1])
        monkeypatch.setattr(kvmlite.images.readiness, "image_findings", lambda: findings[1:])
        return CliRunner().invoke(doctor, list(arguments), catch_exceptions=False, **options)

    return invoke


def test_lines_are_aligned_and_the_verdict_comes_last(run):
    result = run([GOOD, INFO, WARN])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "ok    kvm-device  /dev/kvm exists; the device node is there",
        "info  tun         no tun; no TAP; if wanted: sudo modprobe tun",
        "warn  memory      1 MiB available; too little; fix: free memory",
        "microVMs can run here",
    ]


def test_a_failure_ends_with_1_and_names_the_way_out(run):
    result = run([GOOD, BAD])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "microVMs cannot run here: slow; a software KVM; use another host"


@pytest.mark.parametrize(("findings", "code"), [([GOOD], 0), ([BAD], 1)])
def test_quiet_prints_the_verdict_only(run, findings, code):
    result = run(findings, "-q")
    assert (len(result.output.splitlines()), result.exit_code) == (1, code)


def test_json_has_every_field_and_the_same_exit_code(run):
    result = run([GOOD, BAD], "--json")
    assert result.exit_code == 1
    assert json.loads(result.output) == {
        "version": 1,
        "can_run": False,
        "findings": [
            {
                "id": "kvm-device",
                "status": "ok",
                "seen": "/dev/kvm exists",
                "meaning": "the device node is there",
                "fix": "",
            },
            {
                "id": "kvm-speed",
                "status": "fail",
                "seen": "slow",
                "meaning": "a software KVM",
                "fix": "use another host",
            },
        ],
    }


def test_a_terminal_gets_colours(run):
    assert run([GOOD], color=True).output.startswith("\x1b[32mok  \x1b[0m")


def test_no_color_is_respected_on_a_terminal(run):
    assert "\x1b" not in run([GOOD, BAD], color=True, env={"NO_COLOR": "1"}).output
