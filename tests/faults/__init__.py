"""Proof by fault: runs whose workers are killed at chosen points, and a judge who looks at what is left on disk.

`plan` draws what happens from a seed, `inject` makes it happen inside a worker, `workload` is what is trained,
`arena` plays the cluster, `audit` judges. None of them knows the others' business; `campaign` puts them together.
"""
