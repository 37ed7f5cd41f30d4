"""What a scheduler's request needs beyond what TorchX writes, whatever the component."""

import os
import re
from dataclasses import dataclass, field
from typing import Any, Dict, List

from torchx import specs
from torchx.schedulers.local_scheduler import PopenRequest
from torchx.schedulers.slurm_scheduler import SlurmBatchRequest, SlurmReplicaRequest
from torchx.specs.finder import ComponentValidationException

USER_ERROR = 2
"""Exit code of what a person has to put right; `recsys.errors.UserError` has it too."""

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SHUTDOWN_SECONDS = 30  # beside those that torchrun waits

_DOLLAR = re.compile(r"\$(?!\{(?:app_id|replica_id|img_root)\})")
_DOLLAR_TO_RANKS = re.compile(r"\$(?!\{(?:app_id|replica_id|img_root|local_rank)\})")
_UNSAFE = re.compile(r"[,;'\"\\\s]")  # in srun's --export, which takes a comma for the end of a value


def literal(text: str) -> str:
    """A text that TorchX leaves as it is, but for its macros `${app_id}`, `${replica_id}` and `${img_root}`.

    TorchX substitutes in all arguments and in the values of the environment, so that `$$` would become `$`.
    """
    return _DOLLAR.sub("$$", text)


def literal_to_ranks(text: str) -> str:
    """The same of a rank's argument, in which torchrun then substitutes its own macro `${local_rank}`."""
    return _DOLLAR_TO_RANKS.sub("$$$$", text)


@dataclass
class Role(specs.Role):
    """TorchX's role, which makes good in a scheduler's request what TorchX does not write or writes wrongly.

    Args:
        on_this_machine: environment variables where processes are this machine's own (local_cwd); `env` elsewhere.
    """

    on_this_machine: Dict[str, str] = field(default_factory=dict)

    def pre_proc(self, scheduler: str, dryrun_info: specs.AppDryRunInfo[Any]) -> specs.AppDryRunInfo[Any]:
        """Amend the request; TorchX calls it before it submits or shows one."""
        amend = {
            "local": self._local,
            "docker": self._docker,
            "slurm": self._slurm,
            "kubernetes": self._kubernetes,
            "aws_batch": self._batch,
        }
        if scheduler in amend:
            dryrun_info.request = amend[scheduler](dryrun_info.request)
        return dryrun_info

    def _local(self, request: PopenRequest) -> PopenRequest:
        replicas, gpus = request.role_params[self.name], self.resource.gpu
        visible = os.environ.get(_VISIBLE)
        every = visible.split(",") if visible else [str(number) for number in range(gpus * len(replicas))]
        for number, replica in enumerate(replicas):
            replica.env.update(self.on_this_machine)
            if gpus > 0 and len(replicas) > 1:
                # Nodes that share this machine share its GPUs; one that gets too few of them ends by itself.
                replica.env.setdefault(_VISIBLE, ",".join(every[number * gpus : (number + 1) * gpus]))
        return request

    def _docker(self, request: Any) -> Any:
        for container in request.containers:
            # TorchX takes the last 30 letters of a name, which docker refuses if a letter or digit does not come first.
            given, variables = container.kwargs, container.kwargs["environment"]
            given["name"] = given["hostname"] = given["name"].lstrip("-_")
            variables["TORCHX_RANK0_HOST"] = variables["TORCHX_RANK0_HOST"].lstrip("-_")
        return request

    def _slurm(self, request: SlurmBatchRequest) -> SlurmBatchRequest:
        for name, replica in request.replicas.items():
            if name.rpartition("-")[0] == self.name:
                replica.entrypoint, *replica.args = _with_environment(replica)
                # Nodes end by themselves: one that another's error had killed would hide in the job's exit code that
                # a person has to put something right. srun still kills those that are left after `wait`, 60 s.
                replica.srun_opts["kill-on-bad-exit"] = "0"
        return _SlurmRequest(**vars(request))

    def _kubernetes(self, request: Any) -> Any:
        job = request.resource["spec"]
        if self.max_retries:
            job["maxRetry"] = self.max_retries + 1  # Volcano counts the first run, too
        for task in job["tasks"]:
            if self.max_retries:
                task["maxRetry"] = self.max_retries + 1
                task["policies"] = [{"exitCode": USER_ERROR, "action": "TerminateJob"}, *task["policies"]]
            pod = task["template"].spec
            pod.termination_grace_period_seconds = _SHUTDOWN_SECONDS + int(
                self.env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 0)
            )
            (container,) = pod.containers
            container.command = [_unexpanded(word) for word in container.command]
            for variable in container.env:
                variable.value = _unexpanded(variable.value)
        return request

    def _batch(self, request: Any) -> Any:
        if self.max_retries > 9:
            raise ComponentValidationException(
                f"--max_retries {self.max_retries}: AWS Batch starts a job 10 times at most"
            )
        strategy = request.job_def["retryStrategy"]
        strategy["attempts"] = self.max_retries + 1  # the first one counts
        strategy["evaluateOnExit"].append({"onExitCode": str(USER_ERROR), "action": "EXIT"})
        return request


class _SlurmRequest(SlurmBatchRequest):
    """TorchX's batch script, which does not requeue what a person has to put right, nor log the job's variables."""

    def materialize(self) -> str:
        script: str = super().materialize().replace("\nset -evx\n", "\nset -e\n")
        asked = 'if [ "$TORCHX_MAX_RETRIES" -gt'
        return script.replace(asked, asked.replace("if [", f"if [ $exitcode -ne {USER_ERROR} ] && ["))


def _with_environment(replica: SlurmReplicaRequest) -> List[str]:
    """The command of a Slurm task, which sets those variables itself that srun would cut at a comma."""
    unsafe = [name for name, value in replica.env.items() if _UNSAFE.search(value)]
    settings = [f"{name}={replica.env.pop(name)}" for name in unsafe]
    return [*(["env", *settings] if settings else []), replica.entrypoint, *replica.args]


def _unexpanded(text: str) -> str:
    """A text of which Kubernetes makes the one given: it expands `$(NAME)`, and `$$` to `$`."""
    return re.sub(r"\$(?=[$(])", "$$", text)
