"""The adapters' life in a replica: store → disk → memory → engine, by digest, checked on every load.

`cache.AdapterCache` is what a replica uses: it leases adapters to requests and decides what stays. What costs time happens in
a process of its own (`process` starts it, `worker` is its program, `loader` its work), on a disk tier that the replicas of a
node share (`disk`); there each adapter passes `admission` before the engine sees it.
"""
