"""How a run ends: its exit statuses, and the errors that refuse one in a single line."""

from steppe.configs.keys import ConfigError
from steppe.data.errors import DataError

# STORAGE is EX_IOERR; STOPPED is EX_TEMPFAIL: run the same command again to continue.
FINISHED, REFUSED, ANOMALY, STORAGE, STOPPED = 0, 2, 3, 74, 75


class WorkdirError(RuntimeError):
    """The workdir cannot be used for this run; one line."""


class Unusable(ValueError):
    """A checkpoint that may not, or cannot, be restored here; one line."""


REFUSALS = (ConfigError, DataError, WorkdirError, Unusable)  # bad input, each message one line that names it
