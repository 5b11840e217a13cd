"""Writing a run folder: commits that a crash leaves whole, and resuming from them."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from resdiag.runs.checkpoint import Checkpoint, check_same, pack, recover, unpack
from resdiag.runs.commit import (
    BLOCKS,
    COMMIT,
    PREVIOUS,
    RUN,
    SCHEMA,
    STATUSES,
    TABLES,
    VERDICT,
    Commit,
    our_files,
    part_name,
    state_name,
    tensors_name,
)
from resdiag.runs.files import from_json, make_folder, remove_file, to_json, write_file
from resdiag.runs.lock import Lock
from resdiag.runs.segments import CUSTOM, SCHEMAS, encode, merge
from resdiag.runs.watched_config import Config


class RunWriter:
    """The only writer of one run's folder, from `open` to `close`; a context manager.

    Protocol: segments, checkpoint and state are written first, then COMMIT.json with the SHA-256
    of every file that makes up the run. A file that a commit names is never written again, so a
    crash at any instant leaves the old commit or the new one. The commit before is kept with its
    checkpoint as COMMIT.prev.json, for the day the disk damages the last one.
    """

    def __init__(self, folder: Path, config: Config, lock: Lock) -> None:
        self.folder = folder
        self.config = config
        self._lock = lock
        self._commit: Commit | None = None
        self._previous: Commit | None = None
        self._drift: tuple[dict[str, Any], ...] = ()
        self._kept: dict[str, str] = {}
        self._keys = {
            "run": config.name,
            "variant": config.model,
            "depth": str(config.depth),
            "seed": str(config.seed),
            "data": config.data,
            "schema": str(SCHEMA),
        }

    @classmethod
    def open(
        cls,
        root: Path,
        config: Config,
        *,
        environment: Mapping[str, Any],
        data: Mapping[str, Any],
        force: bool = False,
        allow_drift: bool = False,
        folder: Path | None = None,
        patience: float | None = None,
    ) -> "RunWriter":
        """Create the run `root/config.name`, or continue it from its last whole commit.

        Args:
            root: Folder of runs; created if missing.
            config: What the run does.
            environment: `resdiag.runs.environment.environment(...)` of this process.
            data: Identity of the data set; a resumed run must have the same.
            force: Delete the old run's files first.
            allow_drift: Continue in a changed environment and mark it in the commits.
            folder: Where to write instead of `root/config.name`.
            patience: See `Lock.take`.

        Raises:
            BusyError: Another process writes this run.
            UsageError: The folder holds another config or data, the environment changed, or both
                commits are damaged.
            StorageError: The folder cannot be written.
        """
        folder = folder or Path(root) / config.name
        for table in TABLES:
            make_folder(folder / table)
        writer = cls(folder, config, Lock.take(folder, patience))
        try:
            if force:
                writer._erase()
            writer._start(environment, data, allow_drift)
        except BaseException:
            writer.close()
            raise
        return writer

    @property
    def status(self) -> str:
        """That of the last commit; "new" before the first."""
        return self._commit.status if self._commit else "new"

    @property
    def committed_step(self) -> int:
        """Number of optimizer steps that are on the disk."""
        return self._commit.step if self._commit else 0

    def restore(self) -> Checkpoint | None:
        """The last commit's checkpoint; None if there is none.

        Raises:
            UsageError: Its files are not a checkpoint.
        """
        commit = self._commit
        if commit is None or tensors_name(commit.step) not in commit.files:
            return None
        name = state_name(commit.step)
        state = from_json(commit.read_file(self.folder, name), self.folder / name)
        name = tensors_name(commit.step)
        tensors = unpack(commit.read_file(self.folder, name), self.folder / name)
        return Checkpoint(commit.step, tensors, state)

    def describe(
        self,
        blocks: list[dict[str, Any]],
        unavailable: list[dict[str, Any]],
        point: str = "local",
        notes: Sequence[str] = (),
        custom: Sequence[Mapping[str, str]] = (),
        inventory: Mapping[str, Any] | None = None,
    ) -> None:
        """Write blocks.json, once, before the first commit; later calls change nothing.

        Args:
            blocks: One entry per block: index, name, stage, transition, ...
            unavailable: Metrics that cannot be had: metric, blocks, reason.
            point: Where gradients are read, one of `catalog.POINTS`.
            notes: What could not be watched, in words.
            custom: Custom metrics among the columns: id, label, unit, site, ...
            inventory: What model, optimizers and loop consist of.
        """
        self._keys["point"] = point
        if custom:
            self._keys[CUSTOM] = ",".join(entry["id"] for entry in custom)
        if BLOCKS not in self._kept:
            document: dict[str, Any] = {
                "schema": SCHEMA, "point": point, "blocks": blocks, "unavailable": unavailable,
                **({"notes": list(notes)} if notes else {}),
                **({"inventory": dict(inventory)} if inventory else {}),
            }  # fmt: skip
            if custom:
                document[CUSTOM] = [dict(entry) for entry in custom]
            self._kept[BLOCKS] = write_file(self.folder / BLOCKS, to_json(document))

    def commit(
        self,
        step: int,
        metrics: Mapping[str, Any],
        curve: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor] | bytes | None,
        state: Mapping[str, Any] | None,
        status: str = "running",
    ) -> None:
        """Make all steps up to `step` durable: afterwards no crash can lose them.

        Args:
            step: Optimizer steps done, more than at the last commit.
            metrics: Rows since the last commit, one array of shape (rows,) per column; may be
                empty.
            curve: The same for the step-level table.
            tensors: The checkpoint, copied to the CPU here, or what `checkpoint.pack` made of it.
                None for a run that cannot resume.
            state: JSON data.
            status: "running", or the status with which the run ends.

        Raises:
            StorageError: The disk is full, read-only or failing; the last commit stays as it was.
            BusyError: The lock was removed; nothing was written.
        """
        if self._commit is not None and step <= self._commit.step:
            raise ValueError(f"step {step} is committed already (at {self._commit.step})")
        self._lock.check()
        files = dict(self._kept)
        for table, columns in (("metrics", metrics), ("curve", curve)):
            if len(columns.get("step", ())):
                rows, merged = merge(self.folder, self._commit, table, columns)
                for name in merged:
                    del files[name]
                self._write(files, part_name(table, step), self._encode(table, rows, columns))
        lasting = dict(files)
        if tensors is not None:
            packed = tensors if isinstance(tensors, bytes) else pack(tensors)
            self._write(files, tensors_name(step), packed)
            self._write(files, state_name(step), to_json(dict(state or {})))
        self._publish(Commit(step, status, files, self._drift))
        self._kept = lasting

    def finish(self, status: str, verdict: Mapping[str, Any] | None) -> None:
        """End the run at its last commit: write verdict.json and the final status.

        Raises:
            StorageError: The disk is full, read-only or failing; the last commit stays.
            BusyError: The lock was removed; nothing was written.
        """
        self._lock.check()
        last = self._commit or Commit(0, "running", self._kept, self._drift)
        files = dict(last.without_verdict().files)
        if VERDICT in last.files:
            self._publish(last.without_verdict())  # a file that a commit names is not overwritten
        if verdict is not None:
            self._write(files, VERDICT, to_json(dict(verdict)))
        self._publish(Commit(last.step, status, files, self._drift))

    def beat(self) -> None:
        """Touch the lock, so that other processes see that this one is alive."""
        self._lock.beat()

    def close(self) -> None:
        """Release the lock; calling it twice is fine."""
        self._lock.release()

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encode(self, table: str, rows: Mapping[str, Any], new: Mapping[str, Any]) -> bytes:
        """A segment; merged rows may have custom metrics that are not recorded any more."""
        old = [name for name in rows if name not in new and name not in SCHEMAS[table].names]
        if not old:
            return encode(table, rows, self._keys)
        custom = dict.fromkeys([*filter(None, self._keys.get(CUSTOM, "").split(",")), *old])
        return encode(table, rows, {**self._keys, CUSTOM: ",".join(custom)})

    def _write(self, files: dict[str, str], name: str, data: bytes) -> None:
        files[name] = write_file(self.folder / name, data)

    def _publish(self, commit: Commit) -> None:
        """Replace COMMIT.json: from this instant on the run ends at the new commit."""
        if commit.status not in STATUSES:
            raise ValueError(f"status '{commit.status}' is not one of {', '.join(STATUSES)}")
        self._lock.check()
        if self._commit is not None and commit.step > self._commit.step:
            self._previous = self._commit.without_verdict()
            write_file(self.folder / PREVIOUS, self._previous.to_bytes())
        write_file(self.folder / COMMIT, commit.to_bytes())
        self._commit = commit
        self._prune()

    def _prune(self) -> None:
        """Remove files that no commit names: old checkpoints, and what a failure left."""
        keep = {*self._kept, *(self._commit.files if self._commit else ())}
        keep |= set(self._previous.files if self._previous else ())
        for name in our_files(self.folder):
            if name not in keep:
                remove_file(self.folder / name)

    def _erase(self) -> None:
        """Delete the old run: the older commit, the newer one, then the files that they name."""
        for name in (PREVIOUS, COMMIT, *our_files(self.folder)):
            remove_file(self.folder / name)

    def _start(
        self, environment: Mapping[str, Any], data: Mapping[str, Any], allow_drift: bool
    ) -> None:
        """Continue from the last whole commit, or begin."""
        self._commit, self._previous = recover(self.folder)
        if self._commit is None:
            self._begin(environment, data)
        else:
            self._kept = self._commit.kept_files()
            self._drift = check_same(
                self.folder, self._commit, self.config, environment, data, allow_drift
            )
        self._prune()

    def _begin(self, environment: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Write run.json; anything else in the folder was never committed."""
        document = {
            "schema": SCHEMA,
            "name": self.config.name,
            "config": self.config.to_dict(),
            "digest": self.config.digest(),
            "environment": dict(environment),
            "data": dict(data),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._write(self._kept, RUN, to_json(document))
