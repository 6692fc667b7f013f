"""`loader-keys`: make a CURVE key pair for loaders or for ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

import zmq

from stoker_proto.wire.keys import write_pair


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line of `loader-keys`."""
    parser = argparse.ArgumentParser(
        prog="loader-keys",
        description="Make a key pair: NAME.key is public and goes to the other side, NAME.key_secret (mode 0600) stays. "
        "Loaders need one pair, ranks another; `cluster.security` of the YAML names the files. Nothing is overwritten.",
        epilog="example: loader-keys --out keys --name loader; loader-keys --out keys --name rank",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the two files; made with mode 0700")
    parser.add_argument(
        "--name", default="loader", metavar="NAME", help="name of the pair, for logs; default: %(default)s"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None) -> None:
    """Write the pair and say what to do with it. Raises ConfigError."""
    arguments = parse_arguments(argv)
    public, secret = zmq.curve_keypair()
    public_path, secret_path = write_pair(Path(arguments.out), arguments.name, public, secret)
    print(f"{public_path}  public: loaders take it in cluster.security.allowed_ranks, ranks in loader_key")
    print(f"{secret_path}  secret: its owner takes it in cluster.security.loader_secret, or rank_secret")
