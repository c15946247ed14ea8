"""What can go wrong in this room, one class per remedy. Every message is one line and names the key or file."""


class DataError(ValueError):
    """Bad input: the message names the key, its value and what is accepted."""


class CorpusMismatch(DataError):
    """A prepared directory does not suit the run: prepare another one or change the named key."""


class CorpusDamaged(DataError):
    """A prepared directory is not what was prepared: a shard or the manifest is missing, cut short or altered."""


class BadRecords(DataError):
    """More records than config.data.bad_records allows could not be read."""
