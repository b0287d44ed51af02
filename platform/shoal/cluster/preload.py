"""Importing this module imports what a worker needs, unless it has it from the template; see `imports`.

The raylet is told to have every worker process do so before it takes work (`ray_edge.PRELOAD`).
"""

from shoal.cluster import imports

if not imports.is_done:
    imports.import_behind_others()
