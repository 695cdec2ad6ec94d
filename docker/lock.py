"""Write docker/locks/*.txt: what each image installs, each file by its hash.

    ./run lock      (CPython 3.11 on x86-64 Linux, as in the images; other platforms have other files)

pip itself decides, from pyproject.toml and constraints.txt, without installing anything. torch is in none of the
files but torch-cuda.txt: builds for CPUs come from another index, where the file of the same version is another one.
kernels.txt is what mamba-ssm needs beyond worker.txt and torch-cuda.txt; the environment must have torch.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "docker" / "locks"
SERVER = "otel,postgres,s3"
EARLY_PYTHON = "async-timeout"  # redis needs it before CPython 3.11.3, which Debian 12 has
WANTED = {
    "build": ["hatchling"],
    "api": [f".[server,{SERVER}]", EARLY_PYTHON],
    "worker": [f".[worker,c2pa,{SERVER}]", EARLY_PYTHON],
    "training": [f".[worker,training,c2pa,{SERVER}]", EARLY_PYTHON],
    "torch-cuda": ["torch"],
    "kernels": ["torch", "mamba-ssm"],
}
TORCH_PARTS = re.compile(r"(torch|triton|nvidia-.+|cuda-.+)")


def resolve(wanted: list[str], *, for_cuda: bool) -> list[tuple[str, str, str]]:
    """(name, version, sha256) of each file that pip would install, by name."""
    environment = {**os.environ, "MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    if for_cuda:  # local wheels may be of torch for CPUs
        environment |= {"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    # mamba-ssm comes as source, and looks at the torch that is installed when it tells what it needs.
    command += ["--only-binary", ":all:", "--no-binary", "mamba-ssm", "--no-build-isolation"]
    command += ["--constraint", "constraints.txt", *wanted]
    report = json.loads(subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    found = []
    for item in report["install"]:
        archive = item["download_info"].get("archive_info")
        if archive is not None:  # the project itself is a folder
            name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
            found.append((name, item["metadata"]["version"], archive["hashes"]["sha256"]))
    return sorted(found)


def locked(name: str) -> set[str]:
    """Names of the packages in a lock."""
    return {line.partition("==")[0] for line in (LOCKS / f"{name}.txt").read_text().splitlines() if "==" in line}


def is_part(lock: str, package: str) -> bool:
    """Whether a package that pip would install belongs in a lock."""
    if lock == "kernels":
        return package not in locked("worker") | locked("torch-cuda")
    return bool(TORCH_PARTS.fullmatch(package)) == (lock == "torch-cuda")


def main(names: list[str]) -> None:
    """Write the named files, or all."""
    for name in names or WANTED:
        lines = [f"# What the image takes, by docker/lock.py from pyproject.toml and constraints.txt: {name}.\n"]
        for package, version, sha256 in resolve(WANTED[name], for_cuda=name in ("torch-cuda", "kernels")):
            if is_part(name, package):
                lines.append(f"{package}=={version} --hash=sha256:{sha256}\n")
        (LOCKS / f"{name}.txt").write_text("".join(lines))
        print(f"docker/locks/{name}.txt: {len(lines) - 1} packages")


if __name__ == "__main__":
    main(sys.argv[1:])
