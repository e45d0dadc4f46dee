"""Read YAML files of settings within limits that a hostile or damaged file can't get around."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from looped_fast.errors import read_file

LARGEST_FILE = 64 * 1024  # bytes; a file of all settings has 2 KB
DEEPEST = 20  # values within values
MOST_VALUES = 5000  # with each alias counted as what it stands for
LONGEST_NUMBER = 18  # characters of a whole number, which fits 64 bits then


def read_yaml(path: str | Path) -> Any:
    """Read one YAML document of plain values whose keys are all text.

    Raises:
        OSError: the file is missing or can't be read.
        ValueError: it is no regular file, not UTF-8, not YAML, or beyond one of the limits above;
            it names a setting twice, or by something that is not text. The message names the file.
    """
    content = read_file(path, LARGEST_FILE)
    try:
        loader = _Loader(content.decode("utf-8-sig"))
        loader.name = str(path)  # in messages, with line and column
        return loader.get_single_data()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#x}; save it "
            f"as UTF-8"
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # Dates such as 2020-99-99 and characters such as \UFFFFFFFF end in the latter two.
        raise ValueError(f"{path} is not YAML that can be read: {error}") from None


def without_none(settings: Mapping[str, Any]) -> str:
    """Write settings as YAML, leaving out those that are None or empty, for people to read."""

    def cleaned(values: Mapping[str, Any]) -> dict[str, Any]:
        nested = {k: cleaned(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return {k: v for k, v in nested.items() if v is not None and v != {}}

    return yaml.safe_dump(cleaned(settings), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Refuses what is beyond a limit while it composes nodes, before any value is made of them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._n_values = 0
        self._open: list[int] = []  # nodes around the current one; the height of each until now
        self._measured: dict[yaml.Node, tuple[int, int]] = {}  # values and height of each node

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        if not is_alias and event.tag is not None:
            self._refuse(f"the tag {event.tag} is not read; write a plain value", event)
        before = self._n_values
        self._open.append(0)
        self._check_limits(event)
        node: Any = super().compose_node(parent, index)
        height = self._open.pop() + 1
        if not is_alias:
            self._n_values += 1
            self._measured[node] = self._n_values - before, height
        elif node in self._measured:
            n_values, height = self._measured[node]
            self._n_values += n_values
        else:
            self._refuse(f"*{event.anchor} stands for a value that it is part of", event)
        if self._open:
            self._open[-1] = max(self._open[-1], height)
        self._check_limits(event, height)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > LONGEST_NUMBER:
            self._refuse(f"a whole number has at most {LONGEST_NUMBER} characters", node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a collection"
                self._refuse(f"{shown} is no name of a setting; text is needed", key)
            if key.value in names:
                self._refuse(f"{key.value!r} is given twice; remove one of them", key)
            names.add(key.value)
        return node

    def _check_limits(self, event: yaml.Event, height: int = 0) -> None:
        if len(self._open) + height > DEEPEST:
            self._refuse(f"values are at most {DEEPEST} deep within each other", event)
        if self._n_values > MOST_VALUES:
            self._refuse(f"a file has at most {MOST_VALUES} values, aliases written out", event)

    def _refuse(self, problem: str, at: Any) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
