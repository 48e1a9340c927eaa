"""What LoRA adapters hold: told by content, and as the workers have loaded it.

A name and a path say nothing of what is in an adapter, and its files say it only in the moment at
which they are read: an adapter that was loaded stays what it was when its files change, and one
that the workers dropped to make room is read anew, whatever lies there by then. So the truth is
with the workers. `Loads` watches theirs, digests the files around every load, and `Held` tells
the scheduler's half, with the step's acknowledgement or when it asks. Before the first load
`Adapters.content` tells what is on disk, and `Adapters.told` whether that was what was loaded.

Content that can't be digested (a name that is yet to be downloaded, files that change while they
are read) is a random number: it is never shared and never taken for anything else.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmem.engines.vllm import watch
from kvmem.engines.vllm.digests import FileDigest, file_digest, whole_digest
from kvmem.errors import UnsupportedEngine

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

__all__ = ["Adapters", "Folders", "Held", "Loads", "held_by"]

CONFIG = "adapter_config.json"
# What trainers leave beside an adapter. Of other files in its folder none is left out, since an
# engine may come to read them.
NOT_READ = ("README.md", "optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin")
# A file that changes twice within a clock's tick shows no change the second time. So what was
# written so recently is read again the next time (as git does with its index).
TICK_NS = 2_000_000_000
MAX_FILES = 1 << 14
MAX_IDS = 1 << 16


class Folders:
    """Digests of adapters' folders; a file is read again only when it is another one."""

    def __init__(self) -> None:
        self._known: dict[str, FileDigest] = {}

    def digest(self, lora_path: str) -> bytes | None:
        """32 bytes over the names and contents of the adapter's files, or None.

        None: there are none here, they can't be read, or they changed meanwhile. Costs a stat a
        file where nothing is new.
        """
        folder = _folder_of(lora_path)
        if folder is None:
            return None
        try:
            names = sorted(
                entry.name
                for entry in os.scandir(folder)
                if entry.is_file() and entry.name not in NOT_READ
            )
            if CONFIG not in names:
                return None
            files = [(name, self._file(folder / name)) for name in names]
            if any(not file.is_of((folder / name).stat()) for name, file in files):
                return None
        except OSError:
            return None
        return whole_digest(b"kvmem.adapter", files)

    def _file(self, path: Path) -> FileDigest:
        now = time.time_ns()
        file = file_digest(path, self._known)
        if now - max(file.mtime_ns, file.ctime_ns) > TICK_NS:
            if len(self._known) >= MAX_FILES:
                self._known.clear()
            self._known[str(path.resolve())] = file
        return file


def _folder_of(lora_path: str) -> Path | None:
    """Where vLLM finds the adapter (vllm/lora/utils.py, `get_adapter_absolute_path`), without
    downloading anything."""
    path = Path(lora_path).expanduser() if lora_path.startswith("~") else Path(lora_path)
    if path.is_absolute() or path.exists():
        return path.absolute()
    from vllm import envs

    if envs.VLLM_USE_MODELSCOPE:
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(lora_path, local_files_only=True))
    except (OSError, ValueError):  # not there yet, or a name that the hub does not take
        return None


def _files(folders: Folders, request: LoRARequest) -> bytes | None:
    """A digest of what is read for a request, None where that is not in the adapter's folder."""
    if getattr(request, "tensorizer_config_dict", None):  # before 0.32: from a remote store
        return None
    return folders.digest(request.lora_path)


def _content(request: LoRARequest, files: bytes) -> bytes:
    """What KV depends on: the files, and how they are to be read."""
    as_3d = bool(getattr(request, "is_3d_lora_weight", False))
    return hashlib.sha256(b"kvmem.adapter.content\0" + files + bytes([as_3d])).digest()


# -- in a worker -------------------------------------------------------------------------------


@dataclass(slots=True)
class Held:
    """The adapters that one worker holds, by id; a higher version is a later word."""

    worker: int
    version: int
    contents: dict[int, bytes]


@dataclass(slots=True)
class _Record:
    loaded: dict[int, bytes] = field(default_factory=dict)
    told: dict[int, bytes] = field(default_factory=dict)
    version: int = 0


_folders = Folders()
_records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()


def _load(
    manager: Any, load: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around the engine's reading of an adapter's files: notes what was in them."""
    request = args[0] if args else kwargs["lora_request"]
    before = _files(_folders, request)
    adapter = load(*args, **kwargs)
    unchanged = before is not None and before == _files(_folders, request)
    content = _content(request, before) if before and unchanged else secrets.token_bytes(32)
    _records.setdefault(manager, _Record()).loaded[request.lora_int_id] = content
    return adapter


def _held(manager: Any, worker: int) -> Held:
    record = _records.setdefault(manager, _Record())
    # What is there and was not seen to be loaded is taken for content of its own.
    record.loaded = {
        i: record.loaded.get(i) or secrets.token_bytes(32) for i in manager.list_adapters()
    }
    if record.loaded != record.told:
        record.told = dict(record.loaded)
        record.version += 1
    return Held(worker, record.version, dict(record.told))


def held_by(worker: Any) -> Held | None:
    """What a worker holds now; the engine's `collective_rpc` takes this function to each."""
    manager = getattr(worker.model_runner, "lora_manager", None)
    return None if manager is None else _held(manager, worker.rank)


class Loads:
    """Watches the adapters that this process loads for one engine, until `close`.

    Raises:
        UnsupportedEngine: this vLLM loads adapters in another way.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        from vllm.lora.worker_manager import WorkerLoRAManager

        self._config = vllm_config.lora_config
        self._worker = vllm_config.parallel_config.rank
        self._told = 0
        self._manager: type | None = None
        if not watch.wrap(WorkerLoRAManager, "_load_adapter", _load):
            raise UnsupportedEngine(
                "kvmem cannot see which LoRA adapters this vLLM loads",
                next_step="Leave out --enable-lora, or start vLLM without kvmem.",
                feature="LoRA",
            )
        self._manager = WorkerLoRAManager

    def news(self) -> Held | None:
        """What this engine's worker holds, if that is not what was said last."""
        for manager in list(_records):
            if manager.lora_config is self._config:
                held = _held(manager, self._worker)
                if held.version > self._told:
                    self._told = held.version
                    return held
        return None

    def close(self) -> None:
        """Ends the watch; asked twice, it does nothing more."""
        if self._manager is not None:
            watch.unwrap(self._manager, "_load_adapter")
            self._manager = None


# -- in the scheduler --------------------------------------------------------------------------


class Adapters:
    """What the workers of an engine hold, or will have loaded when a request runs.

    Args:
        n_workers: that each have a word.
        facts: what else an adapter's KV depends on, one for all.
    """

    def __init__(self, n_workers: int, facts: str) -> None:
        self._n_workers = n_workers
        self._facts = facts.encode()
        self._folders = Folders()
        self._states: dict[int, Held] = {}
        self._held: dict[int, bytes] = {}
        # By id, the content that was last said or held: what KV has been computed with since.
        self._last: dict[int, bytes] = {}
        self._lost = False
        self._secret, self._generation = secrets.token_bytes(32), 0

    def content(self, request: LoRARequest) -> bytes:
        """32 bytes for the content that a request looked up now is computed with."""
        i = request.lora_int_id
        held = self._held.get(i)
        # A request that says load_inplace has its adapter read again in every step.
        if held is not None and not getattr(request, "load_inplace", False):
            return held
        files = None if self._lost else _files(self._folders, request)
        if files is None:
            return self._unknown(request)
        self._last[i] = self._tweaked(_content(request, files))
        return self._last[i]

    def now(self, request: LoRARequest) -> bytes | None:
        """The content that the workers hold for a request, None for none that is known."""
        return self._held.get(request.lora_int_id)

    def told(self, states: Iterable[Held], *, reloaded: int | None = None) -> bool:
        """Takes in what workers say that they hold.

        True: KV may have been computed with other content than `content` had said before.

        Args:
            states: of any of the workers, in any order; old ones are passed over.
            reloaded: the adapter that was loaded between steps, on purpose.
        """
        news = False
        for state in states:
            had = self._states.get(state.worker)
            if had is None or state.version > had.version:
                self._states[state.worker] = state
                news = True
        if not news:
            return False
        self._lost = False
        self._generation += 1
        self._held = self._agreed()
        wrong = any(
            self._last.get(i, content) != content
            for i, content in self._held.items()
            if i != reloaded
        )
        if len(self._last) > MAX_IDS:
            self._last.clear()
        self._last.update(self._held)
        return wrong

    def lose(self) -> None:
        """The workers could not be asked: nothing is known until they say something."""
        self._lost = True
        self._generation += 1
        self._held = {}

    def _agreed(self) -> dict[int, bytes]:
        """What all workers hold. Files may have changed between two workers' loads of them:
        that is content of its own."""
        states = [self._states[worker].contents for worker in sorted(self._states)]
        if len(states) < self._n_workers:
            return {}
        held = {}
        for i in set.intersection(*map(set, states)):
            contents = [state[i] for state in states]
            same = contents[0] if len(set(contents)) == 1 else _mixed(contents)
            held[i] = self._tweaked(same)
        return held

    def _tweaked(self, content: bytes) -> bytes:
        return hashlib.sha256(content + self._facts).digest()

    def _unknown(self, request: LoRARequest) -> bytes:
        """A number for content that can't be known yet: the same until the workers' next word."""
        which = f"{self._generation}:{request.lora_int_id}:{request.lora_path}"
        return hashlib.sha256(self._secret + which.encode()).digest()


def _mixed(contents: list[bytes]) -> bytes:
    return hashlib.sha256(b"kvmem.adapter.mixed\0" + b"".join(contents)).digest()
