"""A recorded value that notes which of its leaves are read, so that a parameter nobody reads can fail a test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union

# Keys and indices from the root of a JSON file to a value in it.
Path = tuple[Union[str, int], ...]


def record(value: Any, reads: set[Path], path: Path = ()) -> Any:
    """Return a view of ``value`` that adds the path of each leaf to ``reads`` when the leaf is read.

    Leaves are scalars and empty containers; whoever gets one has read it. Asking a container for its length, its
    keys or the presence of a key reads nothing, handing it to ``**`` or comparing it reads all of it.
    """
    if isinstance(value, dict) and value:
        return RecordedDict(value, reads, path)
    if isinstance(value, list) and value:
        return RecordedList(value, reads, path)
    reads.add(path)
    return value


class RecordedDict(Mapping):
    """A JSON object, see :func:`record`."""

    def __init__(self, content: dict[str, Any], reads: set[Path], path: Path) -> None:
        self._content, self._reads, self._path = content, reads, path

    def __getitem__(self, key: str) -> Any:
        return record(self._content[key], self._reads, (*self._path, key))

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        return repr(self._content)


class RecordedList(Sequence):
    """A JSON array, see :func:`record`."""

    def __init__(self, content: list[Any], reads: set[Path], path: Path) -> None:
        self._content, self._reads, self._path = content, reads, path

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return record(self._content[index], self._reads, (*self._path, index))

    def __len__(self) -> int:
        return len(self._content)

    def __eq__(self, other: object) -> bool:
        return plain(self) == plain(other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self._content)


def plain(value: Any) -> Any:
    """Return a copy in Python's own dicts and lists; it reads every leaf, so take no more than is used."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, RecordedList)):
        return [plain(item) for item in value]
    return value


def leaves(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the paths of all leaves of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        yield path
    for key, item in items:
        yield from leaves(item, (*path, key))


class RecordedArrays(Mapping):
    """Named arrays, each of which is a leaf, see :func:`record`."""

    def __init__(self, content: Mapping[str, Any], reads: set[Path]) -> None:
        self._content, self._reads = content, reads

    def __getitem__(self, key: str) -> Any:
        value = self._content[key]
        self._reads.add((key,))
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)
