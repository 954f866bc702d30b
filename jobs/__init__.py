"""What runs on the cluster: started as `python -m jobs.…`, never imported by the control plane."""
