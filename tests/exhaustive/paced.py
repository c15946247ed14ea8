"""Runs whose steps take their time, which copy to their address often and give up early: so that outages hit them.

One process makes run after run, as the worker of a sweep does: what they compile is compiled once.
"""

import os
import time
from multiprocessing.connection import Connection

import matplotlib.pyplot  # noqa: F401  what every run would import for itself
import s3fs  # noqa: F401

from steppe.lm.keep import mirror, store
from steppe.lm.parts.memo import Memo
from steppe.lm.run import train
from steppe.scripts import train as command

SECONDS, PATIENCE, PACE = 0.4, 5.0, 0.3


def work(orders: Connection) -> None:
    """Makes the runs that arrive as (command line, environment, log), and answers with their exit statuses."""
    mirror.SECONDS, store.PATIENCE = SECONDS, PATIENCE
    memo, reader = Memo(8), train.batch_reader

    def paced(*given, **named):
        read = reader(*given, **named)

        def slow(step):
            time.sleep(PACE)
            return read(step)

        return slow

    train.batch_reader = paced
    while True:
        argv, environment, log = orders.recv()
        os.environ.update(environment)
        with open(log, "ab") as handle:
            for number in (1, 2):
                os.dup2(handle.fileno(), number)
        with memo:
            orders.send(command.main(argv))
