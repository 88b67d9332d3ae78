"""Files of a job: Arrow shards, grids, and how a job's shards are shared out over processes."""
