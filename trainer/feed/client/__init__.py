"""The client's rules, pure: events in, commands out. No socket, clock, thread or random source.

In: decoded messages and the time. Out: what to send, to deliver, to warn of. `trainer.feed.sockets` drives it.
Read `options`, `core`, `tickets` and `work`, `fleet` and `peer`, `epochs`, `schedule`, `homes`, the pace of loaders (`balance`,
`latency`, `load`, `hedging`, `standing`, `judge`), `explain`.
"""
