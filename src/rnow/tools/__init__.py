"""Calling tools: routing, limits, MCP servers, and the functions of tools.py behind one protocol."""
