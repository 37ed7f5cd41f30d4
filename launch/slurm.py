"""TorchX's Slurm scheduler, which asks any Slurm, with accounting and without, and says refusals in one line.

TorchX 0.7 asks `sacct` alone, which knows nothing without accounting, and takes states as they were written years ago.
Here `squeue` is asked first, whose controller knows every job that is there or ended within its `MinJobAge` (300 s by
default), then `sacct` about older ones. Both are read as text, as their JSON differs between versions of Slurm.
"""

import logging
import os
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Dict, Iterable, List, Optional

from torchx import specs
from torchx.schedulers import api, local_scheduler, slurm_scheduler
from torchx.specs import AppState

logger = logging.getLogger(__name__)

_STATES = {
    **slurm_scheduler.SLURM_STATES,
    "COMPLETING": AppState.RUNNING,
    "CONFIGURING": AppState.PENDING,
    "EXPEDITING": AppState.PENDING,
    "LAUNCH_FAILED": AppState.FAILED,
    "POWER_UP_NODE": AppState.PENDING,
    "RECONFIG_FAIL": AppState.FAILED,
    "REQUEUE_FED": AppState.PENDING,
    "REQUEUE_HOLD": AppState.PENDING,
    "RESV_DEL_HOLD": AppState.PENDING,
    "SIGNALING": AppState.RUNNING,
    "SPECIAL_EXIT": AppState.PENDING,
    "STAGE_OUT": AppState.RUNNING,
    "STOPPED": AppState.PENDING,
    "UPDATE_DB": AppState.RUNNING,
}
_NUMBER = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;\S+| on cluster \S+)?\s*$", re.MULTILINE)
"""A line of sbatch that tells a job's number; sites and their wrappers write others around it."""
_FIRST = [AppState.RUNNING, AppState.PENDING, AppState.UNKNOWN, AppState.FAILED, AppState.CANCELLED, AppState.SUCCEEDED]
"""Which state of a part is that of a job: it goes on as long as a part does, and failed if one did."""


class Refused(Exception):
    """What a cluster does not do, or does not know, in one line; `launch.commands` ends with it."""


@dataclass
class _Part:
    """A job, or one of those that a heterogeneous job consists of: a node of ours."""

    number: str
    """7, 7+1 (heterogeneous), 7_1 or 7_[2-9%2] (arrays)."""
    told: str
    """Its state in Slurm's words."""
    why: str
    nodes: str
    folder: str
    """Where it was submitted, or `job_dir`: there are its files."""
    name: str

    @property
    def job(self) -> str:
        """The number of the whole job."""
        return re.split(r"[+_]", self.number)[0]

    @property
    def state(self) -> AppState:
        word = re.match(r"[A-Z_]*", self.told)  # of such as "CANCELLED by 1000", or "CANCELLED+"
        return _STATES.get(word[0] if word else "", AppState.UNKNOWN)

    @property
    def message(self) -> str:
        return f"{self.told} ({self.why})" if self.why not in ("", "None") else self.told


class SlurmScheduler(slurm_scheduler.SlurmScheduler):
    """TorchX's, but for what it asks Slurm once a job is written.

    Raises:
        Refused: by any method, where Slurm or its commands are not there, or refuse or do not know what is asked.
    """

    def schedule(self, dryrun_info: specs.AppDryRunInfo[slurm_scheduler.SlurmBatchRequest]) -> str:
        """Submit a job.

        Returns:
            Its number.
        """
        request = dryrun_info.request
        place = [f"--chdir={request.job_dir}"] if request.job_dir else []
        told = _asked([*request.cmd, *place], "the job is refused", request.materialize())
        if not (numbers := _NUMBER.findall(told)):
            raise Refused(f"sbatch told no job's number but {told.strip()!r}; squeue --me has the job if it was taken")
        first = next(iter(request.replicas.values()))
        partition = first.sbatch_opts.get("partition") or os.environ.get("SBATCH_PARTITION")
        try:
            nodes = _nodes(partition)
        except Refused as error:  # the job is there all the same, and its number is to be told
            logger.warning("whether its partition has enough nodes is not known: %s", error)
            nodes = 0
        if 0 < nodes < len(request.replicas):
            # sbatch takes the parts of a heterogeneous job one by one, and none of them is too much.
            logger.warning("a job of %d nodes waits: its partition has %d", len(request.replicas), nodes)
        return str(numbers[-1])

    def describe(self, app_id: str) -> api.DescribeAppResponse:
        """Tell a job's state, and that of each of its nodes.

        Returns:
            `roles_statuses` has a replica for each node; `msg` has Slurm's own words.
        """
        parts = _parts(app_id)
        state = min((part.state for part in parts), key=_FIRST.index)
        statuses: Dict[str, specs.RoleStatus] = {}
        for part in parts:
            role, _, replica = part.name.rpartition("-")
            if role and replica.isdecimal():  # else a job that TorchX did not submit
                ours = statuses.setdefault(role, specs.RoleStatus(role, []))
                ours.replicas.append(specs.ReplicaStatus(int(replica), part.state, role, hostname=part.nodes))
        return api.DescribeAppResponse(
            app_id=app_id,
            roles=[specs.Role(role, image="", num_replicas=len(ours.replicas)) for role, ours in statuses.items()],
            roles_statuses=list(statuses.values()),
            state=state,
            msg=next(part.message for part in parts if part.state == state),
        )

    def list(self) -> List[api.ListAppResponse]:
        """List the user's jobs, the oldest first; without accounting, those alone that `squeue` still knows."""
        found: Dict[str, Dict[str, _Part]] = {}
        try:
            known = _accounts("--starttime=1970-01-01-00:00:01")
        except Refused as error:
            logger.warning("jobs that ended some minutes ago are not listed: %s", error)
            known = []
        for part in [*known, *_queue("--me")]:  # what squeue says comes last and counts
            found.setdefault(part.job, {})[part.number] = part
        return [
            api.ListAppResponse(job, min((part.state for part in parts.values()), key=_FIRST.index))
            for job, parts in sorted(found.items(), key=lambda item: int(item[0]))
        ]

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: Optional[str] = None,
        since: Optional[datetime] = None,
        until: Optional[datetime] = None,
        should_tail: bool = False,
        streams: Optional[api.Stream] = None,
    ) -> Iterable[str]:
        """Read what a node's torchrun and ranks wrote, from wherever the job was submitted.

        Args:
            app_id: the job's number
            role_name: the role
            k: the node within it
            regex: what lines must have
            since: not heeded, as files have no times
            until: likewise
            should_tail: wait for more until the job ends
            streams: stderr unless it says stdout
        """
        if streams == api.Stream.COMBINED:
            raise Refused("streams are in two files: --streams stdout or --streams stderr")
        parts = _parts(app_id)
        ours = [part for part in parts if part.name == f"{role_name}-{k}"]
        if not ours:
            raise Refused(f"job {app_id} has no {role_name}/{k}; it has {', '.join(_replica(part) for part in parts)}")
        end = "out" if streams == api.Stream.STDOUT else "err"
        path = os.path.join(ours[0].folder, f"slurm-{app_id}-{role_name}-{k}.{end}")
        if specs.is_terminal(min((part.state for part in parts), key=_FIRST.index)) and not os.path.isfile(path):
            raise Refused(f"job {app_id} is {ours[0].message}, and left no {path}, or not on this machine")
        lines: Iterable[str] = api.split_lines_iterator(
            local_scheduler.LogIterator(app_id, path, self, should_tail=should_tail)
        )
        if regex:
            lines = api.filter_regex(regex, lines)
        return lines

    def _cancel_existing(self, app_id: str) -> None:
        _asked(["scancel", app_id], f"job {app_id} is not cancelled")


def create_scheduler(session_name: str, **_: Any) -> SlurmScheduler:
    """What TorchX calls.

    Args:
        session_name: that of TorchX's session
    """
    return SlurmScheduler(session_name)


def _parts(job: str) -> List[_Part]:
    """The parts of a job, in their order."""
    if not re.fullmatch(r"\d+", job):
        raise Refused(f'a job of Slurm is a number, not "{job}": slurm://torchx/123')
    try:
        parts = _queue(f"--jobs={job}")
    except Refused as error:
        if "Invalid job id" not in str(error):
            raise
        parts = []
    if not parts:
        try:
            parts = _accounts(f"--jobs={job}")
        except Refused as error:
            files = f"; its slurm-{job}*.out and .err tell how it ended"
            raise Refused(f"squeue no longer knows job {job}, and there is no accounting ({error}){files}") from error
    if not parts:
        raise Refused(f"there is no job {job}")
    return [part for part in parts if part.job == job]


def _nodes(partition: Optional[str]) -> int:
    """How many nodes a partition has, or that which is taken where none is named; 0 where there is no such."""
    told = _asked(["sinfo", "--noheader", "--format=%P\t%D"])
    lines = re.findall(r"^([^\t\n]+)\t(\d+)\s*$", told, re.MULTILINE)  # and what else a site has it say
    return sum(
        int(nodes) for name, nodes in lines if (name.rstrip("*") == partition if partition else name[-1:] == "*")
    )


def _queue(*which: str) -> List[_Part]:
    lines = _asked(["squeue", "--noheader", "--states=all", "--format=%i\t%T\t%r\t%N\t%Z\t%j", *which])
    return _read(lines)


def _accounts(*which: str) -> List[_Part]:
    columns = "--format=JobID,State,Reason,NodeList,WorkDir,JobName"
    lines = _asked(["sacct", "--noheader", "--allocations", "--parsable2", "--delimiter=\t", columns, *which])
    return _read(lines.replace("\tNone assigned\t", "\t\t"))


def _read(lines: str) -> List[_Part]:
    """Parts by lines of number, state, reason, nodes, folder and name; steps and a site's own words are left out."""
    parts = []
    for line in lines.split("\n"):
        number, *rest = line.split("\t")
        if re.fullmatch(r"\d+([+_][^.]*)?", number) and len(rest) >= 5:
            told, why, nodes, *folder, name = rest  # our names have no tab, but a folder may
            parts.append(_Part(number, told, why, nodes, "\t".join(folder), name))
    return sorted(parts, key=lambda part: (len(part.name), part.name))  # train-2 comes before train-10


def _replica(part: _Part) -> str:
    return "/".join(part.name.rsplit("-", 1))


def _asked(command: List[str], otherwise: str = "", told: str = "") -> str:
    """What a command of Slurm says, which is told something on its stdin."""
    try:
        # Bytes of arguments and folders stay as they are, whatever the locale.
        done = subprocess.run(command, input=told, capture_output=True, encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        raise Refused(
            f"{command[0]} is not on this machine; submit where Slurm's commands are, as on a login node"
        ) from None
    if done.returncode:
        said = " / ".join(re.sub(rf"^{command[0]}: (error: )?", "", line) for line in done.stderr.splitlines() if line)
        raise Refused(": ".join(filter(None, [otherwise, f"{command[0]} says {said or 'nothing'}"])))
    if told and done.stderr:  # what a site has to say of a job that it takes
        logger.warning("%s", done.stderr.rstrip())
    return done.stdout
