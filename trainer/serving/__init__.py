"""The policy server: observations over a WebSocket -> actions.

In: a policy, and messages of clients that speak the protocol of openpi or of vla-eval. Out: actions, or errors as the client's
protocol has them. Read `wire` (message <-> bytes), `observations` (an observation -> what the policy is told), `session` (the
rules of one connection, without a socket), `server` (the sockets), then `command` (`stoker-policy`).
"""
