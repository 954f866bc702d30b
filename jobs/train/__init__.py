"""The fine-tune that runs on the cluster."""
