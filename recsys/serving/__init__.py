"""From raw values to probabilities: an artefact that an export wrote, and what scores rows by it.

Needs neither TorchRec nor fbgemm nor a process group.
"""

from recsys.serving.artifact import Artifact, ArtifactError
from recsys.serving.scorer import Scorer

__all__ = ["Artifact", "ArtifactError", "Scorer"]
