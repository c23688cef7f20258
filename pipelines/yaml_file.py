"""YAML that people write: profiles, tables of resources, schedules."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from components.services.exits import DoNotRetry


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The file's one document.

    Raises:
        DoNotRetry: no file, no YAML, or a key twice; the message names file, line and column.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeError) as error:
        raise DoNotRetry(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets the errors of its own parsing of values through, such as the date 2020-99-99.
        raise DoNotRetry(f"{path} is not YAML: {error}", "correct it; each key stands once") from error
