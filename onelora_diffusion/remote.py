"""The Hugging Face hub: the form of an id, and whether the hub can be reached."""

import re

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TIMEOUT = 10  # seconds


def is_in_reach(hub_id: str, token: str | bool | None = None) -> bool:
    """Whether the hub answers a request for a repository. It is asked once, without the retries of a download.

    Raises:
        FileNotFoundError: the hub answers that there is no such repository, or denies access to it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi(token=token).model_info(hub_id, timeout=TIMEOUT)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"the hub has no '{hub_id}', or gives no access to it") from error
    except Exception:  # the client, httpx or the system reports that there is no network, or none that may be used
        return False
    return True
