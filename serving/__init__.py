"""The Ray Serve application. Empty in this version: it holds the name and the border."""
