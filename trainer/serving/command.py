"""`stoker-policy --model EXPORT --bind HOST:PORT`: a trained model behind a WebSocket."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.metadata
import ipaddress
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker_proto.arguments import positive
from stoker_proto.errors import ConfigError, StokerError
from stoker_proto.host.interrupts import heed_interrupts
from stoker_proto.images.views import HAND_SHAPES
from trainer.policy_chunks import check_execute
from trainer.policy_options import add_policy_options

if TYPE_CHECKING:
    from trainer.policy import Policy  # torch: not for --help

log = logging.getLogger(__name__)

_HELP = """Serves a trained model over a WebSocket: a client sends pictures and an instruction, and gets actions.

It speaks the protocols of openpi and of vla-eval on the same port; a client needs no option for it.

  openpi-client:  policy = WebsocketClientPolicy("127.0.0.1", 8000)
                  actions = policy.infer({"observation/image": frame, "prompt": "push the cube"})["actions"]
  vla-eval:       server: {url: ws://127.0.0.1:8000}

Pictures are uint8[H, W, 3] (or depth uint16[H, W] in mm), as many as in training, in the order of the training data; name them
with --image if the client sends others too. The server resizes them as in training. A model that was trained with a state, or
with pictures around the hand, needs these measurements too: observation/state; observation/tcp_pose, observation/intrinsic_cv and
observation/extrinsic_cv. Actions are float32[K, D] in the units of the training data; vla-eval gets one of them for each
observation. `outside_mass` is the probability of tokens that are no actions: a trained model is close to 0. On connect the server
sends the inputs and outputs of the model.

GET /healthz answers 200 once the model is loaded. The connection is not encrypted. Beyond loopback clients need the key of
--api-key-file; better, let clients in through an SSH tunnel. Needs: pip install 'stoker[train,serve]'.
"""
_EXAMPLES = """examples:
  stoker-policy --model outputs/export
  stoker-policy --model outputs/checkpoints/step-00000500 --device cuda --execute 4
  stoker-policy --model outputs/export --image observation/image --image observation/wrist_image
  stoker-policy --model outputs/export --bind 0.0.0.0:8000 --api-key-file keys/policy.txt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM; returns the exit code: 0, or 1 after one line on stderr."""
    options = _parse(arguments)
    heed_interrupts()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("websockets").setLevel(logging.ERROR)
    try:
        host, port = parse_bind(options.bind)
        key = _read_key(options.api_key_file)
        check_bind(host, options.bind, has_key=key is not None)
        _check_websockets()
        policy = _load(options)
        asyncio.run(_serve(policy, options, host, port, key))
    except KeyboardInterrupt:  # while the model was loaded
        return 130
    except (StokerError, OSError) as error:
        print(f"stoker-policy: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(policy: Policy, options: argparse.Namespace, host: str, port: int, key: str | None) -> None:
    """Until a signal arrives. Raises ConfigError, OSError."""
    from trainer.serving.observations import ObservationReader
    from trainer.serving.server import Limits, PolicyServer
    from trainer.serving.session import Session

    execute = check_execute(options.execute, policy.chunk, "--execute")
    read = ObservationReader.of(policy.processor, images=tuple(options.image), state=options.state)
    most = (policy.processor.num_images or (0, 0))[1]
    if most > 1 and not read.images:
        log.warning("the model takes %d pictures, in the order of the message; name them with --image to be sure", most)
    metadata = describe(policy, options.model, execute, read.images)
    limits = Limits(message_bytes=options.max_message_mb << 20, connections=options.max_connections, api_key=key)
    server = PolicyServer(lambda: Session(policy, read, metadata, execute), limits)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with server.listening(host, port) as found:
        print(f"serving {options.model} at ws://{_shown(host)}:{found}", flush=True)
        await stopped.wait()
        log.info("stopping")


def describe(policy: Policy, folder: Path, execute: int, images: Sequence[str]) -> dict[str, Any]:
    """The metadata that a client gets on connect."""
    processor = policy.processor
    return {
        "server": f"stoker {importlib.metadata.version('stoker')}",
        "model": folder.name,
        "action_dim": policy.action_width,
        "action_horizon": execute,
        "chunk": policy.chunk,
        "num_images": list(processor.num_images) if processor.num_images is not None else None,
        "image_keys": list(images),
        "state_dim": processor.state_width,
        "measurements": {name: list(HAND_SHAPES[name]) for name in processor.needed_measurements},
    }


def parse_bind(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT or [IPv6]:PORT. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535 or (":" in host and not host.startswith("[")):
        raise ConfigError(
            f"--bind {text}: HOST:PORT is expected, such as 127.0.0.1:8000 or [::1]:8000; port 0: any free one"
        )
    return host.strip("[]"), int(port)


def check_bind(host: str, text: str, *, has_key: bool) -> None:
    """Raises ConfigError for an address that other machines reach, without a key."""
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: what it resolves to may change
        is_local = False
    if not is_local and not has_key:
        raise ConfigError(
            f"--bind {text} can be reached from other machines, and anybody there could use the model: give --api-key-file, or "
            "bind 127.0.0.1 and let clients in through an SSH tunnel (ssh -L 8000:127.0.0.1:8000 HOST)"
        )


def _read_key(file: Path | None) -> str | None:
    """Raises ConfigError."""
    if file is None:
        return None
    try:
        key = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: it cannot be read ({error})") from error
    if len(key) < 16 or not key.isprintable() or " " in key:
        raise ConfigError(
            f"--api-key-file {file}: a key of at least 16 letters and digits in one line is expected; make one with: "
            f"python -c 'import secrets; print(secrets.token_urlsafe())' > {file}"
        )
    return key


def _check_websockets() -> None:
    """Raises ConfigError, before the model is loaded."""
    try:
        importlib.import_module("websockets.asyncio.server")
    except ImportError as error:
        raise ConfigError(f"the server needs websockets ({error}): pip install 'stoker[serve]'") from error


def _load(options: argparse.Namespace) -> Policy:
    import torch
    from transformers.utils import logging as transformers_logging

    from trainer.policy import Policy

    transformers_logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return Policy.load(options.model, device=options.device)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="stoker-policy",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="an export, or a checkpoint of a run")
    add("--bind", default="127.0.0.1:8000", metavar="HOST:PORT", help="default %(default)s; port 0: any free one")
    add("--image", action="append", default=[], metavar="NAME", help="name of a picture in the observation; repeat in the "
        "order of the training data (default: all pictures, in the order of the message)")  # fmt: skip
    add(
        "--state",
        metavar="NAME",
        help="name of the state, for data.state: text (default: observation/state, state, states)",
    )
    add_policy_options(parser, threads=None)
    add("--api-key-file", type=Path, metavar="FILE", help="clients must send the key in it; needed beyond loopback")
    add("--max-connections", type=positive, default=16, metavar="N", help="default %(default)s")
    add("--max-message-mb", type=positive, default=64, metavar="MB", help="of one observation (default %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
