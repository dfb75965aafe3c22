#!/usr/bin/env python3
"""Compares Cargo.lock with deny.toml: licences, sources, and duplicate versions.

Usage: scripts/check_dependencies.py [CARGO_METADATA.json]

Needs cargo and Python 3.11, and no network if cargo has downloaded the dependencies.
Exit codes: 0 everything complies with deny.toml, 1 it does not, 2 wrong usage.
"""

import collections
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def metadata(arguments):
    if arguments:
        return json.loads(Path(arguments[0]).read_text())
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def is_allowed(expression, allowed):
    """Whether an SPDX expression allows at least one permitted choice; older crates write / for OR.

    >>> def may(expression): return is_allowed(expression, {"MIT", "Apache-2.0"})
    >>> [may(e) for e in ("MIT", "MIT OR GPL-3.0", "MIT/GPL-3.0", "Apache-2.0 WITH LLVM-exception")]
    [True, True, True, True]
    >>> [may(e) for e in ("GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND ISC", "GPL-2.0 WITH X", "True")]
    [False, False, False, False, False]
    """
    words = re.findall(r"\(|\)|[^\s()/]+|/", expression)
    python = []
    for word in words:
        if word in ("(", ")"):
            python.append(word)
        elif word in ("OR", "AND"):
            python.append(word.lower())
        elif word == "/":
            python.append("or")
        elif word == "WITH":
            # An exception only adds rights to its licence.
            python.append("and")
        else:
            before = python[-1] if python else ""
            exception = before == "and" and words[len(python) - 1] == "WITH"
            python.append(str(exception or word in allowed))
    # Only parentheses, and, or, True and False are left.
    return eval(" ".join(python), {"__builtins__": {}})


def is_skipped(name, version, skip):
    """Whether an entry such as syn@2 matches the version.

    >>> [is_skipped("syn", version, ["syn@2"]) for version in ("2.0.1", "3.0.0", "20.1.0")]
    [True, False, False]
    """
    for entry in skip:
        crate, _, start = entry.partition("@")
        if crate == name and (version == start or version.startswith(start + ".")):
            return True
    return False


def faults(packages, rules):
    allowed = set(rules["licenses"]["allow"])
    registries = {"registry+" + url for url in rules["sources"]["allow-registry"]}
    skip = rules["bans"]["skip"]
    versions = collections.defaultdict(set)
    used = set()
    for package in packages:
        name, version = package["name"], package["version"]
        what = f"{name} {version}"
        source = package["source"]
        if source is not None and source not in registries:
            yield f"{what} comes from {source}, which deny.toml does not allow"
        licence = package["license"]
        if not licence:
            yield f"{what} declares no licence"
        elif not is_allowed(licence, allowed):
            yield f"{what} is under {licence}, which deny.toml does not allow"
        if is_skipped(name, version, skip):
            used.update(entry for entry in skip if is_skipped(name, version, [entry]))
        else:
            versions[name].add(version)
        for dependency in package["dependencies"]:
            if dependency["req"] == "*" and dependency["source"] is not None and source is None:
                yield f"{what} accepts any version of {dependency['name']}"
    for name, several in sorted(versions.items()):
        if len(several) > 1:
            yield (
                f"{name} has versions {' and '.join(sorted(several))}: use one version, or skip the older "
                "in deny.toml and name the crate that needs it"
            )
    for entry in skip:
        if entry not in used:
            yield f"deny.toml skips {entry}, which no crate needs any more"


def main(arguments):
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__.strip())
        return 0 if "--help" in arguments else 2
    packages = metadata(arguments)["packages"]
    rules = tomllib.loads((ROOT / "deny.toml").read_text())
    found = sorted(set(faults(packages, rules)))
    for fault in found:
        print(fault)
    print(f"{len(packages)} packages, {len(found)} faults")
    return 1 if found or not packages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
