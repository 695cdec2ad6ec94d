"""Print a CycloneDX 1.5 document of what is installed: Python packages of this interpreter, and Debian's packages.

python sbom.py NAME > NAME.cdx.json
"""

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote


def python_packages() -> list[dict[str, Any]]:
    """Components of the distributions that this interpreter sees."""
    found = {}
    for one in distributions(path=[str(folder) for folder in Path("/opt/medsora").glob("lib/python3*/site-packages")]):
        name = one.metadata["Name"].lower().replace("_", "-")
        licence = one.metadata.get("License-Expression") or one.metadata.get("License")
        component: dict[str, Any] = {
            "type": "library",
            "name": name,
            "version": one.version,
            "purl": f"pkg:pypi/{quote(name)}@{quote(one.version)}",
        }
        if licence and "\n" not in licence:
            component["licenses"] = [{"license": {"name": licence}}]
        found[name] = component
    return [found[name] for name in sorted(found)]


def debian_packages() -> list[dict[str, Any]]:
    """Components of the packages that dpkg has installed; none where there is no dpkg."""
    if not Path("/var/lib/dpkg/status").exists():
        return []
    form = "${Package}\\t${Version}\\t${Architecture}\\n"
    lines = subprocess.run(
        ["/usr/bin/dpkg-query", "-W", "-f", form], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    components = []
    for line in lines.splitlines():
        name, version, architecture = line.split("\t")
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}"
        components.append({"type": "library", "name": name, "version": version, "purl": purl})
    return components


def main(image: str) -> None:
    """Print the document of the image that this runs in."""
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": image}},
        "components": python_packages() + debian_packages(),
    }
    json.dump(document, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main(sys.argv[1])
