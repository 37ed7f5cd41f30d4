"""Texts that mean harm, for whatever reads configs, and a child process in which nothing can hang or eat the memory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from recsys.errors import UserError

ROOT = Path(__file__).parents[1]
SECONDS = 60.0
"""For a child that starts Python and reads texts: many times what it takes, on a machine that is busy too."""


def _alias_bomb(first: str, rest: str) -> str:
    """Nine times nine times nine ..."""
    lines = [f"a0: &a0 {first}"]
    for level in range(1, 9):
        again = ",".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {rest.replace('@', again)}")
    return "\n".join(lines)


TEXTS: dict[str, tuple[str, str]] = {
    "aliases that multiply": (_alias_bomb("[x,x,x,x,x,x,x,x,x]", "[@]"), "it holds too much"),
    "merge keys that multiply": (_alias_bomb("{x: 1}", "{<<: [@]}"), "it holds too much"),
    "a long text that aliases repeat": (f"a: &a '{'x' * 500_000}'\nb: [*a, *a, *a]", "it holds too much"),
    "aliases that nest": (
        "a0: &a0 [x]\n" + "\n".join(f"a{level}: &a{level} [*a{level - 1}]" for level in range(1, 3000)),
        "more than 50 lists and mappings within each other",
    ),
    "an alias within itself": ("a: &a {b: *a}", "stands inside what it refers to"),
    "lists that nest 900 deep": ("a: " + "[" * 900 + "]" * 900, "more than 50 lists and mappings"),
    "lists that nest and never end": ("a: " + "[" * 900_000, "more than 50 lists and mappings"),
    "mappings that nest 900 deep": ("a: " + "{a: " * 900 + "1" + "}" * 900, "more than 50 lists and mappings"),
    "dashes that nest": ("a:\n" + "- " * 100_000 + "x", "more than 50 lists and mappings"),
    "questions that nest": ("? " * 100_000, "more than 50 lists and mappings"),
    "a million values": (f"a: [{'1,' * 1_000_000}]", "it holds too much"),
    "many wrong values": (f"model: {{tower: {{type: mlp, hidden: [{'x,' * 20_000}]}}}}", "more; mend these first"),
    "many unknown keys": ("\n".join(f"k{number}: 1" for number in range(20_000)), "more; mend these first"),
    "three megabytes": ("#" * 3_000_000, "is too large"),
    "a long key": (f"? {'x' * 900_000}\n: 1", "(900000 characters): unknown key"),
    "a long tag": (f"a: !{'x' * 500_000} 1", "could not determine a constructor"),
    "no such date": ("seed: 2020-13-45", "'2020-13-45' is no timestamp; correct it, or quote it"),
    "no date": ("seed: !!timestamp foo", "'foo' is no timestamp"),
    "no integer": ("seed: !!int foo", "'foo' is no int; correct it, or quote it"),
    "an empty integer": ("seed: !!int ''", "'' is no int"),
    "no number": ("seed: !!float foo", "'foo' is no float"),
    "no truth value": ("seed: !!bool foo", "'foo' is no bool"),
    "no mapping": ("data: !!map x", "expected a mapping node"),
    "no list": ("data: !!seq x", "expected a sequence node"),
    "a set": ("data: !!set {x}", "could not determine a constructor for the tag"),
    "bytes": ("name: !!binary aGVsbG8=", "could not determine a constructor for the tag"),
    "an integer of 5,000 digits": ("seed: " + "1" * 5000, "(5000 characters)' is no int"),
    "a hexadecimal of 5,000 digits": ("seed: 0x" + "f" * 5000, "is no int"),
    "an integer to base 60 of 400,000 digits": ("seed: 1" + ":1" * 400_000, "is no int"),
    "an integer of 300 digits": ("seed: 1" + "0" * 300, "seed: Input should be less than 18446744073709551616"),
    "a version of 5,000 digits": (f"%YAML 1.{'1' * 5000}\n---\na: 1", "a character or a number that there is not"),
    "no character": ('name: "\\UFFFFFFFF"', "a character or a number that there is not"),
    "NUL in the file": ("name: a\0b", "special characters are not allowed"),
    "NUL in a name": ('name: "a\\0b"', "name: holds a NUL character, which no path or name can; remove it"),
    "NUL in a path": ('data: {train: ["a\\0b"]}', "data.train.0: holds a NUL character"),
    "NUL in a label": ('data: {label: "a\\0b > 1"}', "data.label: holds a NUL character"),
    "half a pair in a name": ('name: "a\\ud800b"', 'name: "a\\ud800b" holds half of a surrogate pair'),
    "half a pair in a path": ('data: {train: "\\udfff"}', 'data.train: "\\udfff" holds half of a surrogate pair'),
    "half a pair in a label": ('data: {label: "a > \\ud800"}', "data.label: "),
    "half a pair in a key": ('"a\\ud800b": 1', "(a key)"),
    "NUL in an include": ('include: "a\\0b"', "it holds a character that no path can"),
    "half a pair in an include": ('include: "a\\ud800b"', "it holds a character that no path can"),
    "an include of a device": ("include: /dev/zero", "cannot read config /dev/zero: it is no regular file"),
    "an include of a long name": (f"include: {'a' * 5000}", "File name too long"),
    "many includes": (f"include: [{'written.yaml,' * 3000}]", "in a circle"),
}
"""Text of a config, by what it is, and what the error says of it."""

WIDE = {
    "tables.user.num_embeddings": 2**40,
    "tables.user.embedding_dim": 2**16,
    "model.tower.hidden": 2**16,
    "model.hilomoe.num_experts": 2**16,
    "model.hilomoe.num_layers": 2**8,
    "model.dense_dim": 2**16,
    "data.batch_size": 2**31 - 1,
    "data.domain.num_domains": 2**20,
    "data.reader_threads": 2**10,
    "stages.joint.steps": 2**63 - 1,
    "seed": 2**64 - 1,
}
"""The greatest value of keys that count something."""

EXPRESSIONS: dict[str, tuple[str, str]] = {
    "50,000 minus signs": ("-" * 50_000 + "x > 1", "more than 50 parts within each other"),
    "12,000 times not": ("not " * 12_000 + "x", "more than 50 parts within each other"),
    "a long sum": ("a+" * 30_000 + "a > 1", "more than 50 parts within each other"),
    "a long way of attributes": ("a" + ".b" * 30_000 + " > 1", "more than 50 parts within each other"),
    "brackets that nest": ("[" * 30_000 + "> 1", "neither a column nor an expression"),
    "60 lists that nest": ("a in " + "(1," * 60 + ")" * 60, "more than 50 parts within each other"),
    "1.2 megabytes": ("a > 1 and " * 120_000 + "b", "is too long, an expression has up to 65536 characters"),
    "a column of 1.2 megabytes": ("a" * 1_200_000, "is too long"),
    "an integer of 5,000 digits": ("a > " + "1" * 5000, "neither a column nor an expression"),
    "a hexadecimal of 60,000 digits": ("a > 0x" + "f" * 60_000, "an integer beyond any column's"),
    "NUL": ("a\0b > 1", "neither a column nor an expression"),
    "half a pair": ("a > '\ud800'", "neither a column nor an expression"),
}


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    stdout: str
    stderr: str


_BOUNDED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def run_bounded(
    *command: str, memory: int = 1 << 30, seconds: float = SECONDS, folder: Path = ROOT, stdin: str | None = None
) -> Ended:
    """Run Python on `command` in a process that may neither last nor grow; fails the test if it lasts."""
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, str(memory), *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def outcomes(read: Callable[[str], object], names: Iterable[str]) -> None:
    """Print how `read` ends for each name, one JSON list a line: name, error, seconds, MiB at most so far."""
    for name in names:
        start = time.perf_counter()
        try:
            read(name)
            error = None
        except UserError as told:
            error = str(told)
        print(json.dumps([name, error, time.perf_counter() - start, _peak_mebibytes()]), flush=True)


def _peak_mebibytes() -> int:
    # Not that of getrusage, which counts what the process was before it became this program.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10
