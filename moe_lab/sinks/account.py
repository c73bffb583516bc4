"""Is a W&B key configured here? Looked up the way wandb does, but without a prompt and without a network."""

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

OFFICIAL = {"api.wandb.ai", "api.forge.coreweave.com"}  # one service under its old and its new name
WITHOUT_KEY = "no W&B key is configured: `wandb login`, or set WANDB_API_KEY"
# wandb tries for hours to reach a server. Seconds and tries for commands that a person waits for, so that a dead or a
# silent one is told; as variables of the environment, where the user's own win.
PATIENCE = {
    "WANDB_ERROR_REPORTING": "false",  # or wandb's own telemetry connects, too
    "WANDB_X_GRAPHQL_TIMEOUT_SECONDS": "5",
    "WANDB_X_GRAPHQL_RETRY_MAX": "1",
    "WANDB_X_FILE_STREAM_TIMEOUT_SECONDS": "20",
    "WANDB_X_FILE_STREAM_RETRY_MAX": "2",
    "WANDB_X_FILE_TRANSFER_TIMEOUT_SECONDS": "20",
    "WANDB_X_FILE_TRANSFER_RETRY_MAX": "2",
    **{f"WANDB_X_{part}_RETRY_WAIT_MAX_SECONDS": "1" for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")},
    **{f"WANDB_X_{part}_RETRY_WAIT_MIN_SECONDS": "0.5" for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")},
}


def has_key() -> bool:
    """True where the environment, the netrc file or wandb's settings file holds credentials for the host in use."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    saved = _saved_settings()
    if saved.get("api_key"):
        return True
    url = os.environ.get("WANDB_BASE_URL") or saved.get("base_url")
    host = urlsplit(url).netloc if url else "api.wandb.ai"
    return bool(_netrc_hosts() & (OFFICIAL if host in OFFICIAL else {host}))


def entity() -> str:
    """The user or team that a run goes to where its config names none; empty: that of the key."""
    return os.environ.get("WANDB_ENTITY") or _saved_settings().get("entity") or ""


def _saved_settings() -> dict[str, str]:
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(folder / "settings")
        return dict(parser["default"])
    except (KeyError, OSError, configparser.Error):
        return {}


def _netrc_hosts() -> set[str]:
    """Hosts with a password; a `default` entry does not count, it is for no host in particular."""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            return {host for host, (_, _, password) in netrc.netrc(path.expanduser()).hosts.items() if password}
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError):
            return set()
    return set()
