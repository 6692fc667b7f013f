"""The client's rules, pure: events in, commands out. No socket, clock, thread or random source.

In: decoded messages, the consumer's calls and the time. Out: commands: what to send, to deliver, to warn of.
`trainer.feed.sockets` drives it. Read `core`, `options` and `commands`, `tickets` (sent, sent again to another loader, answered),
`fleet`, `holdings` and `merge` (loaders that hold parts of an entry), `epochs` and `schedule` (which rows a rank trains), `homes`
(which loader is asked first), `pace` (how fast loaders answer), `explain` (error texts).
"""
