"""What the service is built of: known weaknesses, licences, secrets in the repository, the bill of materials.

`make audit` runs it with the tools of audit/requirements.lock. It exits 1 where something is wrong. Weaknesses are
looked up in a public database. Where that can't be reached, or does not know a package, the packages that were not
checked are counted and printed, which is no failure; the rest needs no network.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent
PRODUCT = ROOT / ".venv" / "bin" / "python"
LOCK = ROOT / "requirements.lock"
BILL = ROOT / "dist" / "sbom.cdx.json"
BASELINE = ROOT / ".secrets.baseline"

LICENCES = {
    "3-Clause BSD License",
    "Apache Software License",
    "Apache-2.0",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "LGPL-3.0-only",  # psycopg: used as a library, unchanged
    "MIT",
    "MIT-0",
    "MIT License",
    "Mozilla Public License 2.0 (MPL 2.0)",
    "PSF-2.0",
    "Python Software Foundation License",
}
"""Licences under which a service may be run and handed on without giving away its own source."""
_LIST_CHANGED = 3
"""What the secrets scan exits with where it found nothing that is new."""
_NO_NETWORK = ("ConnectionError", "ProxyError", "ConnectTimeout", "ReadTimeout", "SSLError", "NewConnectionError")


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool of the audit's own environment."""
    return subprocess.run(  # noqa: S603 - the tools are pinned, the arguments our own
        [TOOLS / tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def pinned() -> dict[str, Requirement]:
    """Packages of the lock."""
    lines = [line.rstrip("\\ ") for line in LOCK.read_text().splitlines() if line[:1].isalnum()]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def weaknesses() -> list[str]:
    """Known weaknesses of what the service runs with."""
    found = run(
        "pip-audit", "-r", str(LOCK), "--disable-pip", "--no-deps", "-f", "json", "--progress-spinner", "off"
    )
    if not found.stdout.strip():
        if any(sign in found.stderr for sign in _NO_NETWORK):
            print(f"weaknesses: {len(pinned())} packages not checked, the database of weaknesses can't be reached")
            return []
        return [f"pip-audit: {(found.stderr.strip().splitlines() or ['said nothing'])[-1]}"]
    packages = json.loads(found.stdout)["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    print(f"weaknesses: {len(packages) - len(unknown)} packages checked, {len(unknown)} not known to the database")
    return [
        f"{package['name']} {package['version']}: {weakness['id']}, mended in {weakness['fix_versions']}"
        for package in packages
        for weakness in package.get("vulns", ())
    ]


def licences() -> list[str]:
    """Packages under a licence that is not among ours."""
    listed = run("pip-licenses", f"--python={PRODUCT}", "--format=json")
    if listed.returncode:
        return [f"pip-licenses: {listed.stderr.strip()}"]
    shipped = {one.name for one in pinned().values() if one.marker is None or one.marker.evaluate()}
    of = {canonicalize_name(package["Name"]): package["License"] for package in json.loads(listed.stdout)}
    faults = [f"{name}: is not installed" for name in sorted(shipped - of.keys())]
    counts: Counter[str] = Counter()
    for name in sorted(shipped & of.keys()):
        terms = of[name].replace(" AND ", ";").replace("; ", ";")
        # Of "one OR the other" the service takes what it may.
        if not all(LICENCES & set(term.split(" OR ")) for term in terms.split(";")):
            faults.append(f"{name}: its licence is {of[name]}")
        counts[of[name]] += 1
    others = len(pinned()) - len(shipped)
    print(f"licences: {counts.total()} packages under {len(counts)} terms; {others} are for other systems")
    return faults


def secrets() -> list[str]:
    """What looks like a secret in the repository's files and is not in the list of what is none."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    names = [name for name in files.stdout.splitlines() if not name.endswith(".lock") and name != BASELINE.name]
    with tempfile.TemporaryDirectory() as folder:
        known = shutil.copy(BASELINE, folder)  # the tool writes into it where something in the list is no more
        found = run("detect-secrets-hook", "--baseline", known, "--json", *names)
    print(f"secrets: {len(names)} files looked through")
    if found.returncode in (0, _LIST_CHANGED):
        return []
    if not found.stdout.strip():
        return [f"detect-secrets: {found.stderr.strip()}"]
    results = json.loads(found.stdout)["results"]
    return [f"{name}:{one['line_number']}: {one['type']}" for name, each in results.items() for one in each]


def bill() -> list[str]:
    """Writes the bill of materials: CycloneDX, from the lock, the same each time."""
    BILL.parent.mkdir(exist_ok=True)
    made = run(
        *("cyclonedx-py", "requirements", str(LOCK), "--pyproject", "pyproject.toml", "--output-reproducible"),
        *("--of", "JSON", "-o", str(BILL)),
    )
    if made.returncode:
        return [f"cyclonedx-py: {made.stderr.strip()}"]
    parts = {part["name"]: f"=={part['version']}" for part in json.loads(BILL.read_text())["components"]}
    versions = {name: str(one.specifier) for name, one in pinned().items()}
    print(f"bill of materials: {len(parts)} packages, {BILL.relative_to(ROOT)}")
    return [] if parts == versions else ["the bill of materials is not what the lock says"]


def main() -> int:
    """Runs everything, and says everything that is wrong."""
    faults = [fault for check in (weaknesses, licences, secrets, bill) for fault in check()]
    for fault in faults:
        print(f"audit: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
