"""The embedded example, end to end: one teacher, three students that differ only in their start, and what became of their reasoning."""


def run_demo(*args, **kwargs) -> dict:
    """See red.demo.main.run_demo, imported when called: `red -h` must not load torch."""
    from red.demo.main import run_demo as run

    return run(*args, **kwargs)


__all__ = ["run_demo"]
