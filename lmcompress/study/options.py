"""Options of the command lines that more than one of them has."""

import yaml

from lmcompress.errors import BadSetting


def parse_setting(text: str) -> tuple[str, object]:
    """Return the name and the value, read as YAML, of a `-p name=value`.

    Raises:
        BadSetting: there is no "=", or the value is not YAML.
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise BadSetting(f"-p {text}: write -p name=value")
    try:
        return name, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or error
        raise BadSetting(f"-p {text}: {value!r} is not YAML ({reason}); quote it as text") from error
