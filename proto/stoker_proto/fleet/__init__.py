"""What a fleet shows of itself while it runs, and what that means: the same for loaders, trainers and `loader-top`.

In: figures of a loader or a trainer, by the names of one table. Out: pages over HTTP that Prometheus, Kubernetes and people
read, and a verdict in words about what limits the training. Read `metrics` (the table of names, and the text that Prometheus
scrapes), `pages` (a small HTTP server), then `verdict` (the rules).
"""
