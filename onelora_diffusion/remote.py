"""The Hugging Face hub: what an id looks like, and whether the hub answers for it."""

import re

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TIMEOUT = 10  # seconds


def is_in_reach(hub_id: str, token: str | bool | None = None) -> bool:
    """Whether the hub can be asked for a repository: it is asked once, and not with the retries of a download.

    Raises:
        FileNotFoundError: the hub answers, and has no such repository, or gives no access to it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi(token=token).model_info(hub_id, timeout=TIMEOUT)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"the hub has no '{hub_id}', or gives no access to it") from error
    except Exception:  # its client's own, httpx's or the system's: no network, or none that is allowed
        return False
    return True
