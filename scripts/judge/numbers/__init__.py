"""The statistics of a judgement: when paired seeds are enough, and an effect in tokens. Nothing here reads a run."""
