"""What must mean the same in the loader and in the trainer.

In: one YAML, a model's folder, observations and text. Out: the config, rows of tokens and labels, messages, the order of samples,
and actions from tokens. Read upwards, for no file imports what comes later in this list: `errors` and `hashing`; `arguments`
(types of command-line options); `host` (files, processes, limits of the machine); `fleet` (metrics, and what limits a training);
`model_folder` (JSON files of a model); `config` (the YAML); `actions` (codecs); `wire` (messages); `images`; `text` (rows);
`order` (which sample comes when); `processor` (one object that joins actions, images and text); `run_record` (what a run writes
so that any of its steps can be made again).
"""

PROTOCOL_VERSION = 5
"""Version of the wire protocol in `proto/PROTOCOL.md`. Loaders and trainers of different versions refuse each other."""
