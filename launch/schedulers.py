"""What a scheduler's request needs beyond what TorchX writes, whatever the component."""

import re
from dataclasses import dataclass, field
from typing import Any, Dict, List

from torchx import specs

_DOLLAR = re.compile(r"\$(?!\{(?:app_id|replica_id|img_root)\})")
_UNSAFE = re.compile(r"[,;'\"\\\s]")  # in srun's --export, which takes a comma for the end of a value


def literal(text: str) -> str:
    """A text that TorchX leaves as it is, but for its macros `${app_id}`, `${replica_id}` and `${img_root}`.

    TorchX substitutes in all arguments and in the values of the environment, so that `$$` would become `$`.
    """
    return _DOLLAR.sub("$$", text)


@dataclass
class Role(specs.Role):
    """TorchX's role, which makes good in a scheduler's request what TorchX does not write or writes wrongly.

    Args:
        on_this_machine: environment variables where processes are this machine's own (local_cwd); `env` elsewhere.
    """

    on_this_machine: Dict[str, str] = field(default_factory=dict)

    def pre_proc(self, scheduler: str, dryrun_info: specs.AppDryRunInfo[Any]) -> specs.AppDryRunInfo[Any]:
        """Amend the request; TorchX calls it before it submits or shows one."""
        request = dryrun_info.request
        if scheduler == "local":
            for replica in request.role_params[self.name]:
                replica.env.update(self.on_this_machine)
        elif scheduler == "slurm":
            for name, replica in request.replicas.items():
                if name.rpartition("-")[0] == self.name:
                    replica.entrypoint, *replica.args = _with_environment(replica)
        elif scheduler == "kubernetes":
            for task in request.resource["spec"]["tasks"]:
                (container,) = task["template"].spec.containers
                container.command = [_unexpanded(word) for word in container.command]
                for variable in container.env:
                    variable.value = _unexpanded(variable.value)
        return dryrun_info


def _with_environment(replica: Any) -> List[str]:
    """The command of a Slurm task, which sets those variables itself that srun would cut at a comma."""
    unsafe = [name for name, value in replica.env.items() if _UNSAFE.search(value)]
    settings = [f"{name}={replica.env.pop(name)}" for name in unsafe]
    return [*(["env", *settings] if settings else []), replica.entrypoint, *replica.args]


def _unexpanded(text: str) -> str:
    """A text of which Kubernetes makes the one given: it expands `$(NAME)`, and `$$` to `$`."""
    return re.sub(r"\$(?=[$(])", "$$", text)
