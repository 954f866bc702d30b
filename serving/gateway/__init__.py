"""OpenAI's HTTP API over the engines: who may ask, which adapter answers, what it costs, and the answer's form.

`app.create_app` makes the FastAPI application from a `Gateway` (`gateway`), which is handed all it works with. `requests`
and `responses` are the two ends of the wire, `answering` is a request's way between them; `errors` gives every failure
OpenAI's form. No torch, no Ray.
"""
