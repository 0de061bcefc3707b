"""`python -m mcp_flow` is the `mcp-flow` command."""

from mcp_flow.cli import main

if __name__ == "__main__":
    main()
