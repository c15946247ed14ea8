from typing import Any

from ml_collections import ConfigDict

def DEFINE_config_dict(
    name: str, config: ConfigDict, help_string: str = ..., flag_values: Any = ..., *, sys_argv: list[str] | None = None
) -> Any: ...
