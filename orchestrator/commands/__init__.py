"""The command's parts, one module a group; each is thin: parse, call, render. Heavy imports stay inside functions."""
