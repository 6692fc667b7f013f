"""What must mean the same in the loader and in the trainer: config, messages, order, images, dialogue, actions."""

PROTOCOL_VERSION = 3
"""Version of the wire protocol, stated in `proto/PROTOCOL.md`; loaders and trainers of different versions refuse each other."""
