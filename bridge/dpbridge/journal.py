"""The journal of a run: a file that holds every release, also those that a crash took back.

A checkpoint is older than the crash that makes it needed: the steps in between are lost, but they
were released. The journal has a line for each of them, on the disk before anything of the step can
be seen, so that whoever goes on from the checkpoint knows what was spent and what noise was used.

Example:
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> from dpbridge.journal_lines import EndlessStep
    >>> path = os.path.join(folder.name, "journal.jsonl")
    >>> Journal(path).write("a run", EndlessStep(1, noise_multiplier=1.1, sampling_prob=0.01))
    >>> list(Journal(path).after(0))
    [EndlessStep(step=1, noise_multiplier=1.1, sampling_prob=0.01)]
    >>> folder.cleanup()
"""

import errno
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpbridge.journal_lines import (
    BEGINNING,
    PlannedStep,
    Step,
    header_line,
    header_of,
    line_of,
    step_of,
)


class Journal:
    """An append-only file with one line of JSON for every release of one run.

    Args:
        path: The file; made if there is none, for its owner alone. It tells which draws are the
            same as those of a checkpoint: keep it as secret as that.

    Attributes:
        run: Which run it is of; None while it holds no step.
        first: How many steps were released before the first that it holds.
        last: The number of the last step that it holds; 0 if there is none.

    Raises:
        TypeError: If `path` is no path.
        ValueError: If the file cannot be made or opened, or is damaged.

    Guarantees:
        `write` returns after the line is on the disk, or raises.
        A last line without its end, as a crash leaves it, counts for nothing: its step was not
        released. Any other line that `write` did not write is refused.
        Steps of another run, or below the last one, are never added.
        A file that something else wrote to, moved or removed is refused.
    """

    run: str | None
    first: int
    last: int
    _end: int  # where the next line goes
    _size: int  # of the file, with what a crash may have left after that
    _is_settled: bool

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(checked_path(path)))
        self._file = _opened(self.path)
        weakref.finalize(self, os.close, self._file)
        self._ahead: dict[int, Step] | None = None
        self._scan()

    def is_of(self, run: str, place: int) -> bool:
        """Whether a run that has made `place` steps may go on with this journal."""
        return self.run is None or (self.run == run and self.first <= place)

    def after(self, place: int) -> Iterator[Step]:
        """Yields the steps after so many."""
        lines = self._lines()
        next(lines, None)
        for number, line in enumerate(lines, 2):
            step = step_of(line)
            if step is None:
                raise self._damage(number, line)
            if step.step > place:
                yield step

    def check(self, run: str, place: int) -> None:
        """Raises RuntimeError if step `place + 1` of this run must not be written."""
        if not self._is_settled:  # A write failed or was interrupted.
            self._scan()
        self._check_file()
        if not self.is_of(run, place):
            raise RuntimeError(
                f"`journal` must be of this run, got {self.path}, where {self.last} steps of "
                "another run, or of another beginning of it, spent privacy too. Load the last "
                "checkpoint of that run before the first step; or name a new file, and add the "
                "two epsilons."
            )

    def check_state(self, run: str, place: int, known: int | None) -> None:
        """Raises ValueError if a checkpoint cannot be gone on from with this journal.

        Args:
            run: Of the checkpoint.
            place: How many steps the checkpoint has.
            known: The last step of the journal when it was saved; None if there was no journal.
        """
        if not self.is_of(run, place):
            what = (
                "steps of another run"
                if self.run != run
                else f"one that begins after step {self.first}, later than the checkpoint"
            )
            raise ValueError(
                f"`journal` must be of the run that `state_dict` is of, got {what} in {self.path}. "
                "Name the journal that was written beside the checkpoint."
            )
        needed = known if known is not None else 0 if self.run is None else place
        if self.last < needed:
            raise ValueError(
                f"`journal` must hold the {needed} steps that the checkpoint knows of, got the "
                f"first {self.last} in {self.path}: an older copy, or another file. Name the one "
                "that was written beside the checkpoint. Where it is lost, load the checkpoint "
                "without a journal and save it again; what was released after it is not counted "
                "then."
            )

    def write(self, run: str, step: Step) -> None:
        """Puts a release on the disk, or compares it with what stands there.

        Call it before anything of the release can be seen.

        Args:
            run: Which run it is of.
            step: What is to be released. One of a plan that is there already must be equal.

        Raises:
            RuntimeError: If it must not be released.
            OSError: If the file cannot be written.
        """
        self.check(run, step.step - 1)
        if isinstance(step, PlannedStep) and step.step <= self.last:
            self._compare(step)
        else:
            self._append(run, step)

    def _compare(self, step: PlannedStep) -> None:
        if self._ahead is None:
            self._ahead = {noted.step: noted for noted in self.after(step.step - 1)}
        if self._ahead.pop(step.step, None) != step:
            raise RuntimeError(
                f"Step {step.step} was released before a crash and must be repeated bit for bit, "
                "got another gradient: the same noise on both would cancel in their difference. "
                "Nothing was released now. Load model, optimizer, loader and scheduler from one "
                "checkpoint, with settings, machine and versions as they were; or begin a new "
                "run, whose epsilon adds to that of this one."
            )

    def _append(self, run: str, step: Step) -> None:
        if step.step <= self.last:
            raise RuntimeError(
                f"Step {step.step} must not be released, got {self.last} steps in {self.path}: "
                "its noise was used. Make a new optimizer, and load the last checkpoint into it."
            )
        first, data = self.first, line_of(step)
        if self.run is None:
            first = step.step - 1
            data = header_line(run, first) + data
        self._put(data)
        self.run, self.first, self.last = run, first, step.step
        self._is_settled = True

    def _put(self, data: bytes) -> None:
        self._is_settled = False
        if self._size > self._end:
            os.ftruncate(self._file, self._end)
        if os.write(self._file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(self._file)
        self._size = self._end = self._end + len(data)
        self._check_file()  # Another process may have written in between.

    def _check_file(self) -> None:
        own = os.fstat(self._file)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(own, there) or own.st_size != self._size:
            raise RuntimeError(
                f"`journal` must be left to one optimizer, got {self.path} written to, moved or "
                "removed by another process. Run one process at a time; then make a new optimizer, "
                "and load the last checkpoint into it."
            )

    def _scan(self) -> None:
        """Reads the file, and finds where the next line goes."""
        run: str | None = None
        first, last, end = 0, 0, 0
        for number, line in enumerate(self._lines(), 1):
            header, step = header_of(line), step_of(line)
            if number == 1 and header is not None:
                run, first, last = header["run"], header["first"], header["first"]
            elif number > 1 and step is not None and step.step > last:
                last = step.step
            else:
                raise self._damage(number, line)
            end += len(line)
        if last == first:  # A header alone says nothing, so that any run may begin here.
            run, first, last, end = None, 0, 0, 0
        self.run, self.first, self.last, self._end = run, first, last, end
        self._size = os.fstat(self._file).st_size
        self._is_settled = True

    def _lines(self) -> Iterator[bytes]:
        """Yields the lines that have an end."""
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield line
                elif number == 1 and line[: len(BEGINNING)] != BEGINNING[: len(line)]:
                    raise self._damage(number, line)  # Some other file, not to be written over.

    def _damage(self, number: int, line: bytes) -> ValueError:
        return ValueError(
            f"`journal` must hold what this release wrote there, got {line!r:.80} as line "
            f"{number} of {self.path}. It is damaged, or no journal: name the one that was "
            "written beside the checkpoint, or a new file."
        )


def checked_path(path: Any) -> str:
    """Returns a path as a string; raises TypeError if it is none."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`journal` must be a path, got {path!r:.80}. Pass that of a file.")
    return os.fsdecode(path)


def _opened(path: Path) -> int:
    """Opens a file for appending, and makes it last if it is new."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    try:
        file = os.open(path, flags, 0o600)
    except OSError as error:
        raise ValueError(
            f"`journal` must name a file in a folder that exists, got {path}: {error.strerror}. "
            "Make the folder, or name another file."
        ) from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(f"`journal` must name a file, got the device {path}. Name another one.")
    if os.name != "nt":  # The folder's entry is to outlast a loss of power too.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return file
