"""Where PyTorch's registry of operations has those of this package.

The registry is one for the whole process, which may hold several versions of the package, each under a name of its own:
the Hub's loader makes one from the version's contents. So the namespace is that name.
"""

NAMESPACE = __package__.rpartition(".")[0].replace(".", "_")
"""Of the package, which is one above this module's."""


def add_op_namespace_prefix(name: str) -> str:
    """An operation's name in the registry. This function's own name is what the Hub's builder looks for."""
    return f"{NAMESPACE}::{name}"
