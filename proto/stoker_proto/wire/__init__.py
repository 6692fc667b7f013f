"""Messages between loader and rank.

In: the dataclasses of `messages`. Out: one frame of bytes per message, and back (`encoding`). The connection is encrypted with
the keys in `keys`. `proto/PROTOCOL.md` is the authority. Read `messages`, then `encoding`, `piece_images` (where a PIECE has its
images), `row_bits` (some rows of a ticket), `digests` (of rows), `peer_text` (a peer's text in our logs) and `keys`.
"""
