"""Options of the command lines that more than one of them has."""

import yaml

from lmcompress.errors import BadSetting


def parse_setting(text: str) -> tuple[str, object]:
    """Return the name and the value, read as YAML, of a `-p name=value`.

    Raises:
        BadSetting: there is no "=".
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise BadSetting(f"-p {text}: write -p name=value")
    return name, yaml.safe_load(value)
