"""MLflow: batches of metrics into a tracking server or a SQLite file."""

import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from resdiag.trackers.tracker import RunInfo

_EXPERIMENT = "resdiag"
_MOST_METRICS, _MOST_PARAMS = 1000, 100
_ENDINGS = {"done": "FINISHED", "diverged": "FINISHED", "stopped": "KILLED", "running": "RUNNING"}


class MlflowTracker:
    """Logs into the experiment `resdiag` of a tracking store.

    MLflow cannot hold infinities: it stores them as the largest floating-point numbers.

    Args:
        store: A tracking URI, or the path of a SQLite file.
    """

    def __init__(self, store: str) -> None:
        self._uri = store if "://" in store or store == "databricks" else f"sqlite:///{store}"
        self._run = ""

    def start(self, run: RunInfo) -> None:
        """Continue the run of this name if the store has it unfinished, else begin it."""
        self._client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        found = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
        known = None if run.is_new else self._find(experiment, run.name)
        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            return
        self._run = self._client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in run.config.items()]
        self._client.log_batch(self._run, params=params[:_MOST_PARAMS])

    def _find(self, experiment: str, name: str) -> str | None:
        """The newest run of this name that has not come to its end."""
        for found in self._client.search_runs(
            [experiment], order_by=["attributes.start_time DESC"]
        ):
            if found.info.run_name == name and found.info.status in ("RUNNING", "KILLED"):
                return str(found.info.run_id)
        return None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the tags of a step in as few requests as the store allows."""
        now = int(time.time() * 1000)
        metrics = [Metric(tag, value, now, step) for tag, value in values.items()]
        for begin in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[begin : begin + _MOST_METRICS])

    def finish(self, status: str) -> None:
        """End the run."""
        self._client.set_tag(self._run, "status", status)
        self._client.set_terminated(self._run, _ENDINGS.get(status, "FINISHED"))


open_tracker = MlflowTracker
