"""What a notebook or a script uses: `connect`, and the cluster it returns.

cluster = shoal.connect()
run = cluster.train(Digits(lr=1e-3), workers="1..4").wait()
model = cluster.models.register("digits", run, alias="champion")
app = cluster.serve("serve_apps.digits:app", model="digits@champion")
"""

from shoal.api.cluster import Cluster
from shoal.api.connection import attach, bring_up, connect
from shoal.api.models import Model, Models

__all__ = ["Cluster", "Model", "Models", "attach", "bring_up", "connect"]
