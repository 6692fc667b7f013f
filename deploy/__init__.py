"""Ways to start Stoker: one node, systemd, containers. (A regular package: an installed `deploy` cannot shadow it.)"""
