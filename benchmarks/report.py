"""What all benchmarks report: what was measured, where and how, for a person (Markdown) and a program (JSON Lines)."""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from recsys.config import ConfigError
from recsys.terminal import Rows, console, markdown, say, table
from recsys.versions import git_commit, nvidia_driver, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Line = Mapping[str, Any]
"""A JSON object on a line: its `kind`, what it is of, and the figures."""


def shown_path(path: str | Path) -> str:
    """A path as a report may name it: from the checkout's root, or the bare name of what lies elsewhere."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def environment() -> dict[str, Any]:
    """Commit, hardware, versions and date."""
    return {
        "commit": git_commit(),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "gpus": _gpus(),
        },
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def number(value: float | None) -> str:
    """A figure with as many digits as one reads."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"


def show(title: str, rows: Rows) -> None:
    """Print rows as a table; their first column names them. Without rows nothing is printed."""
    if rows:
        say(console(), table(rows, title))


def write(
    stem: Path,
    title: str,
    parts: Sequence[str | Rows],
    about: Mapping[str, Any],
    lines: Iterable[Line],
    *,
    quiet: bool = False,
) -> None:
    """Write `<stem>.md` and `<stem>.jsonl`, and say so.

    Args:
        stem: the files' path without its ending.
        title: heading of the page.
        parts: paragraphs and tables of the page; a table without rows is left out.
        about: what `environment` tells, the `command`, and whatever else holds for all of the result. It is the first
            of the JSON lines and ends the page, so that a figure never stands without how it came about.
        lines: the further JSON lines, in the form that `read` takes.
        quiet: say nothing.
    """
    hardware = about["hardware"]
    facts = {
        "command": f"`{about['command']}`",
        "commit": about["commit"],
        "hardware": f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
        + "".join(f", {gpu}" for gpu in hardware["gpus"]),
        "versions": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "date": about["date"],
    }
    page = [f"# {title}", *(part if isinstance(part, str) else markdown(part) for part in parts if part)]
    page.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    written = "".join(f"{json.dumps(line)}\n" for line in ({"kind": "about", **about}, *lines))
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(f"{stem.name}.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    stem.with_name(f"{stem.name}.jsonl").write_text(written, encoding="utf-8")
    if not quiet:
        print(f"Written: {shown_path(stem)}.md and .jsonl", flush=True)


def read(path: Path) -> dict[str, list[Line]]:
    """Read JSON lines; they are told by kind, which each of them has under `kind`.

    Raises:
        ConfigError: the file cannot be read, or a line is no JSON object with a kind, or has NaN or infinity in it.
    """
    found: dict[str, list[Line]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read results {path}: {error}") from None
    # JSON may have all that splitlines() takes for an end of a line, but a newline.
    for place, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            told = json.loads(line, parse_constant=_no_number)
        except ValueError as error:
            raise ConfigError(f"{path}, line {place}: {error}") from None
        if not isinstance(told, dict) or not isinstance(told.get("kind"), str):
            raise ConfigError(f"{path}, line {place}: no JSON object with a kind")
        found.setdefault(told["kind"], []).append(told)
    return found


def _no_number(told: str) -> NoReturn:
    raise ValueError(f"{told} is no number of JSON; what is undefined is null")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1) if found else platform.machine()


def _gpus() -> list[str]:
    if not nvidia_driver():
        return []
    import torch  # two seconds that a machine without a GPU saves

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
