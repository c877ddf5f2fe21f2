"""What the official clients, and the tokenizers that they load, read from the environment."""

from collections.abc import Mapping


def client_variables(url: str, api_key: str) -> dict[str, str]:
    """The variables by name.

    Args:
        url: of the server, without a slash at its end.
        api_key: as a shell or a process has it. The Tinker client asks for keys that begin with ``tml-``.
    """
    return {
        "LOOPS_BASE_URL": url,
        "BASETEN_API_KEY": api_key,
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": f"tml-{api_key}",
        "HF_ENDPOINT": f"{url}/hf",
    }


def chat_variables(url: str, api_key: str, given: Mapping[str, str]) -> dict[str, str]:
    """Those of the openai and anthropic libraries, and of everything that is built on them.

    Args:
        url: of the server, without a slash at its end.
        given: an environment. A script may ask the real services, too: where it has an address or a key of one, that
            library's variables are left alone.
    """
    wanted = {
        "OPENAI": {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": api_key},
        "ANTHROPIC": {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": api_key},
    }
    return {
        name: value
        for variables in wanted.values()
        if not any(given.get(name) for name in variables)
        for name, value in variables.items()
    }
