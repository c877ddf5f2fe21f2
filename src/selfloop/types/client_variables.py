"""What the official clients, and the tokenizers that they load, read from the environment."""


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
