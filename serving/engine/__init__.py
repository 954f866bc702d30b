"""Continuous batching over one base model, each request with its own LoRA adapter or none.

`protocol` says what every engine promises and imports no torch. `local.LocalEngine` keeps the promise in this process:
`core` has the step; `scheduler` and `blocks` decide what it computes, `network`, `linears` and `attention` compute it,
`sampler`, `grammar` and `text` make answers of it. `vllm.VllmEngine` keeps it by vLLM, in a Python environment of vLLM's own;
`choice` is what a plan says of either.
"""
