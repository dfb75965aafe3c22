#!/usr/bin/env python3
"""Checks the structure of the Rust sources: imports between a crate's modules form no cycle, and no file is too
long.

Modules are the files and folders directly below `src`; imports in tests do not count, and neither do the lines of
tests. Names each violation and exits with 1 if there is any.
"""

import pathlib
import re
import sys

MAX_LINES = 600
# Files that are longer today, each with its limit. Shorten them; add none.
LONGER = {}

TESTS = re.compile(r"^#\[cfg\((?:test|all\(test.*)\)\]\n(?:pub(?:\(.*?\))? )?mod \w+ \{", re.MULTILINE)
PATH = re.compile(r"\bcrate::(\w+)")
UP = re.compile(r"\b((?:super::)+)(\w+)")


def without_tests(text):
    """The text up to its test module, which is the last item in a file.

    >>> without_tests("fn a() {}\\n#[cfg(test)]\\nmod tests {\\n}\\n")
    'fn a() {}\\n'
    """
    found = TESTS.search(text)
    return text[: found.start()] if found else text


def without_comments(text):
    """
    >>> without_comments("use a; // crate::b\\n")
    'use a; \\n'
    """
    return re.sub(r"//.*", "", text)


def is_test(path):
    parts = set(path.parts)
    return bool(parts & {"tests", "benches", "examples"}) or path.stem.endswith("tests") or "simulation" in path.stem


def imports(text, depth):
    """Names directly below the crate's root that a file `depth` modules below it refers to.

    >>> sorted(imports("use crate::log::Log; use super::super::wire::X;", 2))
    ['log', 'wire']
    """
    names = set(PATH.findall(text))
    for supers, name in UP.findall(text):
        if supers.count("super") == depth:
            names.add(name)
    return names


def reexports(root):
    """The module of each name that the crate's root re-exports.

    >>> sorted(reexports("pub use log::{Log, Full as F};\\nuse wire::X;").items())
    [('F', 'log'), ('Log', 'log'), ('X', 'wire')]
    """
    found = {}
    for module, names in re.findall(r"\buse (?:self::)?(\w+)::([^;]+);", root):
        for name in re.findall(r"\w+(?=\s*[,}]|$)", names.strip()):
            found[name] = module
    return found


def graph(src):
    """Modules below `src`, each with those that it imports."""
    tops = {path.stem for path in src.iterdir() if path.is_dir() or path.suffix == ".rs"} - {"lib", "main"}
    root = "".join(path.read_text() for path in (src / "lib.rs", src / "main.rs") if path.is_file())
    names = reexports(without_comments(without_tests(root)))
    edges = {top: set() for top in tops}
    for path in sorted(src.rglob("*.rs")):
        relative = path.relative_to(src)
        if is_test(relative) or relative.parts[0] in ("lib.rs", "main.rs", "bin"):
            continue
        top = relative.parts[0].removesuffix(".rs")
        depth = len(relative.parts) - (1 if path.stem == "mod" else 0)
        text = without_comments(without_tests(path.read_text()))
        used = {names.get(name, name) for name in imports(text, depth)}
        edges[top] |= (used & tops) - {top}
    return edges


def cycle(edges):
    """A cycle, as the modules on it, or None.

    >>> cycle({"a": {"b"}, "b": {"a"}})
    ['a', 'b', 'a']
    >>> cycle({"a": {"b"}, "b": set()})
    """
    done = set()

    def visit(module, trail):
        if module in trail:
            return trail[trail.index(module) :] + [module]
        if module in done:
            return None
        for other in sorted(edges.get(module, ())):
            found = visit(other, trail + [module])
            if found:
                return found
        done.add(module)
        return None

    for module in sorted(edges):
        found = visit(module, [])
        if found:
            return found
    return None


def main():
    base = pathlib.Path(__file__).resolve().parent.parent
    wrong = []
    crates = sorted(path.parent for path in base.rglob("Cargo.toml") if "target" not in path.parts)
    for crate in crates:
        src = crate / "src"
        if not src.is_dir():
            continue
        found = cycle(graph(src))
        if found:
            wrong.append(f"{crate.relative_to(base)}: modules import each other: {' -> '.join(found)}")
        for path in sorted(src.rglob("*.rs")):
            name = str(path.relative_to(base))
            if is_test(path.relative_to(src)):
                continue
            lines = without_tests(path.read_text()).count("\n")
            limit = LONGER.get(name, MAX_LINES)
            if lines > limit:
                wrong.append(f"{name}: {lines} lines without tests, more than {limit}: split it")
    known = f", but for {len(LONGER)} known ones" if LONGER else ""
    print("\n".join(wrong) or f"{len(crates)} crates: no import cycle, no file over {MAX_LINES} lines{known}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
