"""``kvmlite doctor``: can microVMs run on this host, and what would make them run better?"""

from __future__ import annotations

import click

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.host.finding import Finding

__all__ = ["doctor"]

_COLOURS = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "red"}


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with all findings.")
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict only.")
@click.pass_context
def doctor(context: click.Context, as_json: bool, quiet: bool) -> None:
    """Look at this host: can microVMs run, and what would make them run better?

    Each line says what was seen, what it means, and the command that mends it. Nothing is changed on the host.
    The exit status is 0 if microVMs can run here, else 1.
    """
    from kvmlite.host.facts import HostFiles
    from kvmlite.images.readiness import image_findings
    from kvmlite.machine.doctor import can_run, collect, verdict

    findings = [*collect(HostFiles()), *image_findings()]
    if as_json:
        _echo_json(findings, can_run=can_run(findings))
    else:
        if not quiet:
            _echo_findings(findings)
        click.secho(verdict(findings), bold=True, color=_wants_colour())
    context.exit(0 if can_run(findings) else 1)


def _wants_colour() -> bool | None:
    """None lets click decide: colours on a terminal only. https://no-color.org"""
    import os

    return False if os.environ.get("NO_COLOR") else None


def _echo_findings(findings: list[Finding]) -> None:
    width = max(len(finding.id) for finding in findings)
    for finding in findings:
        status = click.style(f"{finding.status:4}", fg=_COLOURS[finding.status])
        text = f"{finding.seen}; {finding.meaning}"
        if finding.fix:
            text += f"; {'if wanted' if finding.status == 'info' else 'fix'}: {finding.fix}"
        click.echo(f"{status}  {finding.id:{width}}  {text}", color=_wants_colour())


def _echo_json(findings: list[Finding], *, can_run: bool) -> None:
    import json

    names = ("id", "status", "seen", "meaning", "fix")
    listed = [{name: getattr(finding, name) for name in names} for finding in findings]
    click.echo(json.dumps({"version": 1, "can_run": can_run, "findings": listed}, indent=2))
