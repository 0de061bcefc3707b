"""The MCP tools, in families. A handler is a few lines that call `control` or `page`; there is no logic in here."""
