"""Where an unfinished conversion stands: everything in `<output>.incomplete`, with a record of each finished part, until one rename gives it its
name. The same command goes on behind the last finished part."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_antisd.config.rules import TOKENIZER_FILES
from megatron_antisd.convert.part_file import Finisher, PartFile
from megatron_antisd.convert.progress import Progress
from megatron_antisd.convert.ranks import ConvertError, Ranks
from megatron_antisd.durable import sync, write_json
from megatron_antisd.models.weight_map import Entry
from megatron_antisd.parallel.checkpoint_files import read_json

ROOM_BESIDE = 64 << 20
"""Bytes wanted beside the weights: headers, manifest, tokenizer."""
_RECORDS, _PLAN = "conversion", "plan.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive parameters that are read and written in one go."""

    number: int
    file: str
    """Below the output."""
    entries: tuple[Entry, ...]
    nbytes: int


def plan_parts(sizes: Sequence[tuple[Entry, int]], bucket_bytes: int, name: Callable[[int, int], str]) -> list[Part]:
    """Parts of up to `bucket_bytes`; a larger parameter is one by itself. `name(number, count)` names the files."""
    groups: list[list[tuple[Entry, int]]] = []
    room = 0
    for entry, nbytes in sizes:
        if not groups or nbytes > room:
            groups.append([])
            room = bucket_bytes
        groups[-1].append((entry, nbytes))
        room -= nbytes
    return [Part(number=number, file=name(number, len(groups)), entries=tuple(entry for entry, _ in group), nbytes=sum(size for _, size in group))
            for number, group in enumerate(groups, start=1)]


def fingerprint(files: Sequence[Path], **settings: Any) -> str:
    """Of the sources (name, size, time of change) and of everything that decides what is written."""
    sources = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(json.dumps([sources, settings], sort_keys=True).encode()).hexdigest()


def require_free(output: Path) -> None:
    """Raises ConvertError where something bears the output's name already."""
    if output.exists() or output.is_symlink():
        raise ConvertError(f"{output} exists already; name another --output or remove it")


class Workspace:
    """`prepare` begins on rank 0, `convert` does the parts on all ranks, `commit` ends on rank 0."""

    def __init__(self, output: Path, parts: Sequence[Part], ranks: Ranks, say: Callable[[str], None]) -> None:
        self.output, self.parts, self.ranks, self.say = output, parts, ranks, say
        self.directory = output.with_name(f"{output.name}.incomplete")
        self._lock: TextIO | None = None

    def prepare(self, plan: str) -> None:
        """Keep what an earlier attempt at the same conversion finished. Raises ConvertError where the disk has too little room."""
        require_free(self.output)
        records = self.directory / _RECORDS
        if self.directory.exists():
            if not records.is_dir():
                raise ConvertError(f"{self.directory} exists and is not an unfinished conversion; move it away")
            self._take_lock()
            if self._plan() != plan:
                self.say(f"{self.directory} is of another conversion (other source, flags or bucket): it is thrown away")
                self.discard()
        if not self.directory.exists():
            records.mkdir(parents=True)
            self._take_lock()
            self._write_whole(records / _PLAN, plan)
        done = [part for part in self.parts if self._record(part) is not None]
        if done:
            self.say(f"resuming: {len(done)} of {len(self.parts)} parts are there")
        needed = sum(part.nbytes for part in self.parts) - sum(part.nbytes for part in done) + ROOM_BESIDE
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            if not done:
                self.discard()
            raise ConvertError(f"not enough room for {self.output}: {needed} bytes are needed, {free} are free; make room or name another --output")

    def convert(self, write: Callable[[Part, PartFile], dict[str, Any]], progress: Progress) -> list[dict[str, Any]]:
        """Each rank writes every size-th of the parts that are not there yet; `write` fills a file and returns what to remember of it. The records
        of all parts. Collective."""
        pending = self.ranks.on_main(lambda: [part.number for part in self.parts if self._record(part) is None])
        progress.begin(sum(part.nbytes for part in self.parts), done=sum(part.nbytes for part in self.parts if part.number not in pending))
        by_number = {part.number: part for part in self.parts}
        finisher = Finisher()
        for start in range(0, len(pending), self.ranks.size):
            mine = pending[start + self.ranks.rank : start + self.ranks.rank + 1]
            sizes = self.ranks.together(lambda mine=mine: self._write(by_number[mine[0]], write, progress, finisher) if mine else 0)
            progress.advance(sum(sizes) - sizes[self.ranks.rank])
        self.ranks.together(finisher.wait)
        return self.ranks.on_main(lambda: [self._finished(part) for part in self.parts])

    def commit(self, files: Sequence[Path]) -> None:
        """Give the output its name; `files` are those written beside the parts."""
        for file in files:
            sync(file)
        for folder in (*(path for path in self.directory.iterdir() if path.is_dir()), self.directory):
            sync(folder)
        require_free(self.output)
        self.directory.rename(self.output)
        sync(self.output.parent)
        shutil.rmtree(self.output / _RECORDS)

    def discard(self) -> None:
        """Throw away what turned out wrong. The name goes first: what is half deleted is never taken for an unfinished conversion."""
        doomed = self.directory.with_name(f"{self.directory.name}.deleted")
        if doomed.exists():
            shutil.rmtree(doomed)
        self.directory.rename(doomed)
        shutil.rmtree(doomed)

    def release(self) -> None:
        """Let another process go on where this one ends."""
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self) -> None:
        """Two processes would write into the same files."""
        self._lock = (self.directory / _RECORDS / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConvertError(f"another process is writing to {self.directory}; wait for it, or end it") from error

    def _plan(self) -> str | None:
        try:
            return read_json(self.directory / _RECORDS / _PLAN)
        except (FileNotFoundError, ValueError):
            return None  # cut short while it was begun

    @staticmethod
    def _write_whole(path: Path, value: Any) -> None:
        write_json(path.with_suffix(".tmp"), value)
        path.with_suffix(".tmp").rename(path)

    def _write(self, part: Part, write: Callable[[Part, PartFile], dict[str, Any]], progress: Progress, finisher: Finisher) -> int:
        path = self.directory / part.file
        path.parent.mkdir(exist_ok=True)
        file = PartFile(path, progress.advance)
        try:
            record = write(part, file)
        except (OSError, RuntimeError) as error:
            file.abandon()
            if isinstance(file.failure, OSError):
                raise self._cannot_write(file.failure) from error
            raise error if file.failure is None else file.failure from error  # torch tells an interrupted write as an error of its own
        finisher.start(lambda: self._finish(part, file, record))
        return part.nbytes

    def _finish(self, part: Part, file: PartFile, record: dict[str, Any]) -> None:
        path = self._record_path(part)
        try:
            size, sha256 = file.finish()
            self._write_whole(path, {"file": part.file, "size": size, "sha256": sha256, **record})
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> ConvertError:
        return ConvertError(f"could not write to {self.directory}: {error.strerror or error}; its finished parts are kept: make room and run the "
                            "same command again")

    def _record_path(self, part: Part) -> Path:
        return self.directory / _RECORDS / f"part-{part.number:05d}.json"

    def _record(self, part: Part) -> dict[str, Any] | None:
        """What is known of a finished part; None where it is none."""
        path, file = self._record_path(part), self.directory / part.file
        if not path.is_file() or not file.is_file():
            return None
        record = read_json(path)
        return record if file.stat().st_size == record["size"] else None

    def _finished(self, part: Part) -> dict[str, Any]:
        record = self._record(part)
        if record is None:
            raise ConvertError(f"{self.directory / part.file} was finished and is gone; run the same command again")
        return record


def missing_tokenizer(directory: Path) -> str | None:
    """A warning where there is none."""
    if any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    return f"no tokenizer in {directory} (looked for {', '.join(TOKENIZER_FILES)}); training needs one"


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
