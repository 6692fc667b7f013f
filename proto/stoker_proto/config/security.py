"""`cluster.security`: the key files that encrypt and authenticate the wire between loaders and ranks.

    security:
      loader_secret: keys/loader.key_secret    # on the loaders' hosts
      allowed_ranks: [keys/rank.key]
      loader_key: keys/loader.key              # on the ranks' hosts
      rank_secret: keys/rank.key_secret

Both sides share the YAML, but each opens only its own files (`wire/keys.py`): a rank's host does not need the loaders' secret.
"""

from __future__ import annotations

from dataclasses import dataclass

from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """CURVE keys, made by `loader-keys`. Without keys a loader serves only the loopback, unless started with `--insecure`."""

    loader_secret: str | None = None
    """Loaders: file of their secret key (`*.key_secret`, mode 0600). All loaders of a run share one pair."""
    allowed_ranks: tuple[str, ...] = ()
    """Loaders: public keys of the ranks that may connect: `*.key` files or folders of them, read once at the start."""
    loader_key: str | None = None
    """Ranks: file of the loaders' public key (`*.key`). A rank accepts only loaders that have its secret half."""
    rank_secret: str | None = None
    """Ranks: file of their secret key (`*.key_secret`, mode 0600). All ranks may share one pair."""

    def check(self) -> None:
        """Check the rules between the keys. Raises ConfigError."""
        if (self.loader_secret is None) != (not self.allowed_ranks):
            raise ConfigError(
                f"cluster.security.loader_secret is {self.loader_secret!r} and allowed_ranks is {list(self.allowed_ranks)!r}: a "
                "loader needs its secret key and the public keys of the ranks it admits, or neither"
            )
        if (self.loader_key is None) != (self.rank_secret is None):
            raise ConfigError(
                f"cluster.security.loader_key is {self.loader_key!r} and rank_secret is {self.rank_secret!r}: a rank needs the "
                "loaders' public key and a secret key of its own, or neither"
            )
        if self.rank_secret is not None and self.rank_secret == self.loader_secret:
            raise ConfigError(
                f"cluster.security.rank_secret and loader_secret are both {self.rank_secret!r}: a rank that holds the loaders' "
                "secret could pass for a loader; make a second pair with loader-keys --name rank"
            )
