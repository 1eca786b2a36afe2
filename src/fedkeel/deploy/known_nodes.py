"""Flower's list of nodes with their names and public keys, which its own command leaves out.

Run as a module: `python -m fedkeel.deploy.known_nodes LINK`, in the environment of Flower's commands; JSON on stdout.
"""

from __future__ import annotations

import json
import sys


def listed(link: str) -> list[dict[str, str]]:
    """name, node (Flower's number), status, key (PEM); nodes that were shut out are among them."""
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.utils import flwr_cli_exc_handler, init_http_client_from_connection
    from flwr.proto.control_pb2 import ListNodesRequest

    client = init_http_client_from_connection(read_superlink_connection(link))
    try:
        with flwr_cli_exc_handler():
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
    finally:
        client.close()
    return [
        {
            "name": node.name,
            "node": str(node.node_id),
            "status": node.status,
            "key": node.public_key.decode(errors="replace"),
        }
        for node in nodes
    ]


def main() -> None:
    """Prints the answer as Flower's commands do."""
    found: dict[str, object]
    try:
        found = {"success": True, "nodes": listed(sys.argv[1])}
    except Exception as error:  # whoever reads the answer tells it
        found = {"success": False, "error-message": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
