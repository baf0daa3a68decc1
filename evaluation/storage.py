"""What an evaluation has found so far, kept so that it goes on after any end: a state as training's, and images beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attacks.network import Examples, Network
from attacks.results import AttackLog, Attempt
from attacks.standard import EvaluationCallback
from attacks.threat import Threat
from evaluation.images import ImageFile, image_path
from utils.checkpoint import StateFiles, load_tensors, matches_digest, state_files
from utils.cli import UsageError
from utils.distributed import run_on_rank0
from utils.resume import WAIT, lock_run
from utils.run_folder import new_folder, newest_folder

FOUND = "passes", "broken_by", "not_finite", "reach"  # of an AttackLog: what a state holds of each example
SECONDS = 60.0  # between two states: what an abrupt end costs at most
Logs = Mapping[Threat, AttackLog]


def evaluation_folder(save_dir: str, parts: list[str], resume: bool, stack: ExitStack) -> Path:
    """A new folder, or to resume the newest one of this name, locked as long as `stack` is open. Raises ValueError, OSError."""
    folder = (newest_folder(save_dir, parts) if resume else None) or new_folder(save_dir, parts)
    stack.enter_context(lock_run(folder, WAIT))
    return folder


class Store(EvaluationCallback):
    """Keeps what an evaluation finds in its folder, an image before the run that made it, and shows a bar; without a folder the bar alone.

    Process RANK writes its state, progress_RANK_NUMBER-DIGEST.pth, every minute, after the runs of a threat model, and when the `with`
    block ends, however it does. Rank 0 reads what processes have left, of whatever number, before the attack begins.
    """

    def __init__(self, folder: Path | None, rank: int, bar: bool) -> None:
        self.folder, self.rank, self.show = folder, rank, bar
        self.bar: tqdm[Any] | None = None
        self.images: dict[Threat, ImageFile] = {}
        self.states: StateFiles | None = None
        self.finished: list[tuple[Threat, Sequence[Attempt]]] = []  # not in a state yet

    def begin(self, identity: dict[str, Any], logs: Logs, examples: Examples, with_images: Sequence[Threat]) -> None:
        """Put what was found before into the logs, and make the folder ready; the images of some threat models are kept.

        Raises UsageError if the folder holds another evaluation, OSError such as for a full disk, both on all processes.
        """
        self.logs, self.identity = logs, identity
        if self.folder is None:
            return
        files = {threat: ImageFile(image_path(self.folder, threat), examples) for threat in with_images}
        try:
            self.number, found = run_on_rank0(lambda: self._found_before(files))
        except ValueError as error:
            raise UsageError("--resume", error) from error
        for key, log in by_key(logs).items():
            for name in FOUND:
                getattr(log, name).copy_(found[key][name])
            log.counts.update(found[key]["counts"] if self.rank == 0 else {})  # which are summed over the processes
        # Set apart, since an exception may come while the logs are being changed.
        self.kept = copy.deepcopy(dict(logs))
        self.images, self.states = files, StateFiles(self.folder, f"progress_{self.rank}", SECONDS)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError) if kind else ExitStack():  # the first error is the one to tell
            self.save()
        for file in self.images.values():
            file.close()
        if self.bar:
            self.bar.close()

    def broken(self, threat: Threat, examples: Sequence[int], x_adv: Tensor) -> None:
        if threat in self.images:
            self.images[threat].write(examples, x_adv)

    def runs_finished(self, threat: Threat, finished: Sequence[Attempt]) -> None:
        if self.states:
            self.finished.append((threat, finished))
            if self.states.due():
                self.save()

    def progress(self, threat: Threat, done: int, total: int, status: str) -> None:
        if done == total:
            self.save()
        if not self.show:
            return
        # disable=None: no bar where stderr is no terminal
        self.bar = self.bar or tqdm(total=total, initial=done, unit="run", leave=False, disable=None)
        self.bar.set_description(f"{threat}, {status}", refresh=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
            self.bar = None

    def save(self) -> None:
        """Write the images to the disk, then the state. Raises OSError."""
        if not self.states:
            return
        for threat, finished in self.finished:  # once more, if an exception came in between: that changes nothing
            self.kept[threat].add(finished)
        self.finished = []
        for file in self.images.values():
            file.sync()
        logs = {
            key: {name: getattr(log, name) for name in FOUND} | {"counts": self.logs[threat].counts}
            for (key, log), threat in zip(by_key(self.kept).items(), self.kept, strict=True)
        }
        self.states.write(f"{self.number:08d}", {"identity": self.identity, "logs": logs})
        self.number += 1

    def verify(self, network: Network, examples: Examples, threat: Threat, mine: Tensor) -> Tensor:
        """Read the images back that broke examples of `mine` (B,): the examples (F,) whose image is not allowed or does not break them."""
        failed = [mine[:0]]
        broken = mine[self.logs[threat].broken[mine]]
        for index in broken.split(network.batch_size) if len(broken) else ():
            x_adv = self.images[threat].read(index.tolist())
            wrong = network.wrong(x_adv.nan_to_num().to(network.device), examples.y[index], index).cpu()
            failed.append(index[~(wrong & threat.contains(examples.x(index), x_adv))])
        return torch.cat(failed)

    def restore_clean(self, threat: Threat, mine: Tensor, examples: Examples) -> None:
        """Put the clean images of unbroken examples of `mine` (B,) back where the file has others."""
        for index in mine[~self.logs[threat].broken[mine]].split(1000):
            x = examples.x(index)
            other = (self.images[threat].read(index.tolist()) != x).flatten(1).any(1)
            self.images[threat].write(index[other].tolist(), x[other])

    def reset(self, threat: Threat, failed: Tensor, examples: Examples, again: bool) -> None:
        """Put the clean images back of the failed examples (F,): they are not broken, and with `again` no run was made on them."""
        if not len(failed):
            return
        self.images[threat].write(failed.tolist(), examples.x(failed))
        self.save()  # with the runs that `finished` still has
        for log in (self.logs[threat], self.kept[threat]):
            log.broken_by[failed] = -1
            if again:
                log.passes[failed], log.reach[failed] = 0, float("-inf")

    def _found_before(self, files: Mapping[Threat, ImageFile]) -> tuple[int, dict[str, Any]]:
        """The number of the next state, and what all processes have found, by threat; makes the image files. Raises ValueError, OSError."""
        assert self.folder is not None
        found = {
            key: {name: getattr(log, name).clone() for name in FOUND} | {"counts": {}}
            for key, log in by_key(self.logs).items()
        }
        states = _newest_states(self.folder)
        for path in states:
            _merge(path, self.identity, found)
        for part in self.folder.glob("*.part"):
            part.unlink()
        for file in files.values():
            if not file.is_whole():
                if states:
                    print(f"{file.path} is missing or damaged: what it had is attacked again", flush=True)
                file.create()
        before = state_files(self.folder, "progress")
        number = 1 + max([int(path.name.split("_")[2].partition("-")[0]) for path in before], default=0)
        # One state with all of it: the others' are not needed any more, and there may be fewer processes now.
        own = StateFiles(self.folder, "progress_0", SECONDS)
        own.write(f"{number:08d}", {"identity": self.identity, "logs": found})
        for path in before:
            if not path.name.startswith("progress_0_"):
                path.unlink()
        return number + 1, found


def by_key(logs: Logs) -> dict[str, AttackLog]:
    """The logs by norm and radius, to the bit."""
    return {f"{threat.norm} {threat.eps!r}": log for threat, log in logs.items()}


def _newest_states(folder: Path) -> list[Path]:
    """The newest undamaged state of each process; the damaged are reported. Raises ValueError for an evaluation of an earlier version."""
    if any(folder.glob("progress-*.jsonl")):
        raise ValueError(f"{folder} holds an evaluation of an earlier version: leave --resume out, or delete that")
    found = []
    for stem in sorted({path.name.rpartition("_")[0] for path in state_files(folder, "progress")}):
        for path in reversed(state_files(folder, stem)):
            if matches_digest(path):
                found.append(path)
                break
            print(f"{path} is damaged, it is not used", flush=True)
    if not found and any(folder.glob("adv_*.npy")):
        print(f"{folder} has no undamaged state: all is attacked again", flush=True)
    return found


def _merge(path: Path, identity: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Add a state to what was found. Raises ValueError if it is of another evaluation, or is none."""
    content = load_tensors(path)
    before = content.get("identity") if isinstance(content, dict) else None
    if not isinstance(before, dict):
        raise ValueError(f"{path} is no state of an evaluation")
    if different := [name for name in identity if before.get(name) != identity[name]]:
        raise ValueError(
            f"{path.parent} holds another evaluation, {', '.join(different)} differ: give the same, or leave --resume out"
        )
    try:
        for key, log in found.items():
            theirs = content["logs"][key]
            for name in FOUND:
                if theirs[name].shape != log[name].shape or theirs[name].dtype != log[name].dtype:
                    raise ValueError(name)
                torch.maximum(log[name], theirs[name], out=log[name])  # the same runs have the same passes
            if int(log["broken_by"].max()) >= log["passes"].shape[1]:
                raise ValueError("broken_by")
            for name, count in theirs["counts"].items():
                log["counts"][name] = log["counts"].get(name, 0) + int(count)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no state of an evaluation") from error
