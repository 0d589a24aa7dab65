"""``check``: all cases on all backends against the float64 reference."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ssu_bridge import BackendNotAvailableError, UnsupportedError, check
from ssu_bridge.commands.arrays import devices, frameworks, on
from ssu_bridge.dispatch import BACKENDS
from ssu_bridge.progress import progress, say
from ssu_bridge.testing.cases import Case
from ssu_bridge.testing.check import Report


@dataclasses.dataclass(frozen=True)
class _Run:
    """A case on a backend, with arrays of a framework on a device."""

    framework: str
    device: str
    like: Any
    backend: str
    case: Case

    def __str__(self) -> str:
        return f"{self.framework} on {self.device}, {self.backend}: {self.case.name}"

    def report(self) -> Report:
        if self.framework != "jax":
            return check(**on(self.framework, self.like, self.case), **self.case.flags, backend=self.backend)
        import jax

        with jax.enable_x64(True):  # some cases have int64 indices, which JAX would narrow
            return check(**on(self.framework, self.like, self.case), **self.case.flags, backend=self.backend)


def main(cases: Sequence[Case], backend: str | None, *, verbose: bool, as_json: bool) -> int:
    """Check the cases, on one backend or on all; 0 if at least one ran and every one passed."""
    runs = [
        _Run(framework, device, like, str(name), case)
        for framework in frameworks()
        for device, like in devices(framework)
        for name in BACKENDS
        if backend in (None, name)
        for case in cases
    ]
    reports: list[tuple[_Run, Report]] = []
    refused: collections.Counter[str] = collections.Counter()
    for run in progress(runs):
        try:
            report = run.report()
        except (UnsupportedError, BackendNotAvailableError) as refusal:
            refused[str(refusal)] += 1
            continue
        reports.append((run, report))
        if not as_json and (verbose or not report.passed):
            say(f"{run.framework} on {run.device}, {run.case.name}: {report}")
    passed = sum(report.passed for _, report in reports)
    failed = len(reports) - passed
    if as_json:
        shown = {"passed": passed, "failed": failed, "unsupported": refused, "reports": list(map(_as_dict, reports))}
        print(json.dumps(shown, indent=2))
    else:
        print(f"{passed} passed, {failed} failed")
        for reason, count in refused.items():
            print(f"  unsupported there, {count} times: {reason}")
    return 1 if failed or not passed else 0


def _as_dict(reported: tuple[_Run, Report]) -> dict[str, Any]:
    run, report = reported
    names = {"framework": run.framework, "device": run.device, "backend": run.backend, "case": run.case.name}
    rows = [row._asdict() | {"where": list(map(int, row.where)), "passed": row.passed} for row in report.rows]
    return {**names, "passed": report.passed, "rows": rows}
