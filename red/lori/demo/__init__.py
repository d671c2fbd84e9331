"""The embedded example of LoRi: following a table for several hops, in words, in latent steps, or not at all."""


def run_demo(*args, **kwargs) -> dict:
    """See red.lori.demo.main.run_demo, imported when called: `red -h` must not load torch."""
    from red.lori.demo.main import run_demo as run

    return run(*args, **kwargs)


__all__ = ["run_demo"]
